"""Does it pay? Trains static and dynamic networks alike, many times, and compares them.

``study.py TABLE [--jobs 2]`` makes the runs of a table that docs/evidence.md describes, adds each
to ``docs/evidence/runs.json`` as it ends, prints them, and draws ``docs/evidence/TABLE.png``. What
is there already, also for another table, is not done again, so that a study may be stopped at any
time. ``--only-report`` trains nothing.

Data lie in ``data``, made by tools/dataset_converters/make_mini_coco.py; networks in
``work_dirs/study``.
"""

import argparse
import fcntl
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

from harness import processor
from mmengine.config import Config

from mmkw import read_checkpoint

ROOT = Path(__file__).parents[2]
WORK = 'work_dirs/study'
RESULTS = ROOT / 'docs/evidence/runs.json'
# What no two runs have in common.
WHAT = ('task', 'split', 'source epochs', 'epochs', 'options', 'seed', 'source')
IMAGES = {
    'mini_coco': '--train 1200 --val 200 --test 400',
    'mini_conditions': '--train 1200 --val 200 --test 400 --conditions',
    'mini_stamps': '--train 2000 --val 300 --test 500 --stamps STAMPS',
}


@dataclass(frozen=True)
class Task:
    """What is learnt, by which network.

    Args:
        config: The static network's, below ``configs/demo``.
        data: Its folder below ``data``.
        dynamic: Overrides that make the backbone dynamic; the budget comes on top.
        metrics: What is reported, and its name in the logs, where it has ``scale`` per cent.
        scale: See ``metrics``.
        epoch: Iterations of an epoch, where training is counted in iterations.
    """

    config: str
    data: str
    dynamic: Mapping[str, Any]
    metrics: Mapping[str, str]
    scale: float
    epoch: int | None = None

    def length(self, epochs: int) -> dict[str, Any]:
        """Overrides for so many epochs."""
        length, end = ('epochs', epochs) if self.epoch is None else ('iters', epochs * self.epoch)
        return {
            f'train_cfg.max_{length}': end,
            'param_scheduler.1.end': end,
            **({'param_scheduler.1.T_max': end} if self.epoch is None else {}),
        }

    def schedule(self, epochs: int) -> dict[str, Any]:
        """Overrides for so many epochs, with a validation after each, of which the last is kept."""
        return {
            **self.length(epochs),
            'train_cfg.val_interval': self.epoch or 1,
            'default_hooks.checkpoint.interval': self.epoch or 1,
            'default_hooks.checkpoint.max_keep_ckpts': 1,
            'default_hooks.checkpoint.save_optimizer': False,
        }

    def last(self, epochs: int) -> str:
        """The name of the last checkpoint."""
        return f'epoch_{epochs}.pth' if self.epoch is None else f'iter_{epochs * self.epoch}.pth'

    def on_test(self) -> dict[str, Any]:
        """Overrides for the test split."""
        if self.epoch is not None:
            prefix = {'img_path': 'test', 'seg_map_path': 'foreground/test'}
            return {'test_dataloader.dataset.data_prefix': prefix}
        annotations = 'annotations/instances_test.json'
        return {
            'test_dataloader.dataset.ann_file': annotations,
            'test_dataloader.dataset.data_prefix.img': 'test/',
            'test_evaluator.ann_file': f'data/{self.data}/{annotations}',
        }


KW_RESNET = {'model.backbone.type': 'mmkw.KWResNet'}
EFFICIENTNET = {
    'type': 'mmpretrain.TIMMBackbone',
    'model_name': 'tf_efficientnet_lite0',
    'features_only': True,
    'out_indices': [1, 2, 3],
    'init_cfg': {'type': 'Pretrained', 'checkpoint': 'checkpoints/efficientnet-lite0.pth'},
}
KW_EFFICIENTNET = {'_delete_': True, 'type': 'mmkw.KWModule', 'module': EFFICIENTNET}
IOU = {'mIoU': 'mIoU'}
AP = {'box AP': 'coco/bbox_mAP', 'mask AP': 'coco/segm_mAP'}
TASKS = {
    'digits': Task('mask-rcnn_r18_fpn_mini-coco', 'mini_coco', KW_RESNET, AP, 100),
    'digits, half as wide': Task(
        'mask-rcnn_r18-half_fpn_mini-coco', 'mini_coco', KW_RESNET, AP, 100
    ),
    'conditions, half as wide': Task(
        'mask-rcnn_r18-half_fpn_mini-conditions', 'mini_conditions', KW_RESNET, AP, 100
    ),
    'stamps from ImageNet': Task(
        'mask-rcnn_efficientnet-lite0_fpn_mini-stamps',
        'mini_stamps',
        {'model.backbone': KW_EFFICIENTNET},
        AP,
        100,
    ),
    'conditions from ImageNet': Task(
        'mask-rcnn_efficientnet-lite0_fpn_mini-conditions',
        'mini_conditions',
        {'model.backbone': KW_EFFICIENTNET},
        AP,
        100,
    ),
    'segmentation under conditions, half as wide': Task(
        'fpn_r18-half_mini-conditions-semantic',
        'mini_conditions',
        KW_RESNET,
        IOU,
        1,
        epoch=150,
    ),
}


@dataclass(frozen=True)
class Arm:
    """One way to train a network.

    Args:
        budget: Of KernelWarehouse; None is the static network.
        options: Overrides of the config, by their dotted names.
        epochs: Of training, if they are not the table's.
    """

    budget: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None

    def overrides(self, task: Task) -> dict[str, Any]:
        """All overrides of the static network's config."""
        network: dict[str, Any] = {}
        if self.budget is not None:
            network = {**task.dynamic, 'model.backbone.cell_num_ratio': self.budget}
        return {**network, **self.options}


@dataclass(frozen=True)
class Table:
    """Runs to be compared.

    Args:
        arms: By name; the first is the one that the others are compared with.
        seeds: Every arm is trained with each.
        epochs: Of training.
        task: Of ``TASKS``.
        split: What the networks are evaluated on after the last epoch. Choices look at ``val``.
        source: Epochs of the static network from which all start; 0 for random weights.
    """

    arms: Mapping[str, Arm]
    seeds: Sequence[int]
    epochs: int
    task: str
    split: str
    source: int


SLOW = {'optim_wrapper.optimizer.lr': 3e-4}
FAST = {'optim_wrapper.optimizer.lr': 2e-3}
FASTER = {'optim_wrapper.optimizer.lr': 4e-3}
FASTEST = {'optim_wrapper.optimizer.lr': 8e-3}
CUSTOM_KEYS = 'optim_wrapper.paramwise_cfg.custom_keys'


def annealed(epochs: int) -> dict[str, Any]:
    """Overrides for a temperature from 1 to 0 within so many epochs."""
    hooks = [
        {'type': 'mmkw.TemperatureHook', 'length': epochs},
        {'type': 'mmkw.IterationSeedHook'},
    ]
    return {'model.backbone.start_tau': 1, 'custom_hooks': hooks}


def rates(**of: float) -> dict[str, float]:
    """Overrides for rates relative to the common one, of parameters by a part of their names."""
    return {f'{CUSTOM_KEYS}.{name}.lr_mult': rate for name, rate in of.items()}


def undecayed(name: str) -> dict[str, float]:
    """Overrides that leave parameters with a part of their names without weight decay."""
    return {f'{CUSTOM_KEYS}.{name}.decay_mult': 0}


def stages(*numbers: int, layers: str = r'(conv\d|downsample\.0)') -> dict[str, Any]:
    """Overrides that make these stages of the ResNet dynamic, each with a warehouse of its own.

    Args:
        *numbers: Of the stages, counted from 1.
        layers: Which layers of a block, as a regular expression.
    """
    static = {
        'type': 'mmkw.ResNet',
        'depth': 18,
        'base_channels': 16,
        'num_stages': 3,
        'strides': [1, 2, 2],
        'dilations': [1, 1, 1],
        'out_indices': [0, 1, 2],
        'norm_eval': False,
    }
    patterns = [{'match': rf'layer{n}\..*{layers}', 'warehouse': f'layer{n}'} for n in numbers]
    wrapped = {'_delete_': True, 'type': 'mmkw.KWModule', 'module': static, 'patterns': patterns}
    return {'model.backbone': wrapped, 'model.backbone.cell_num_ratio': 1}


QUICK_ATTENTION = rates(attention=10)
# What four times the parameters of the backbone gain without dynamic convolution.
WIDE = {'model.backbone.base_channels': 64, 'model.neck.in_channels': [64, 128, 256]}
# Weights of zero rate stay as they are; so does their decay, which is of the rate.
STILL = {'backbone': 0, 'neck': 0, 'rpn_head': 0, 'roi_head': 0}
LAYER_NORM = {'model.backbone.attention_norm_cfg': {'type': 'LN'}}
# From static weights, at the three rates.
START = {**QUICK_ATTENTION, **LAYER_NORM}
FAST_START = {**FAST, **LAYER_NORM, **rates(attention=5)}
FASTER_START = {**FASTER, **LAYER_NORM, **rates(attention=2.5)}
BFLOAT16 = {
    'optim_wrapper.type': 'CPUAutocastOptimWrapper',
    'custom_imports': {'imports': ['benchmarks.cpu_autocast']},
}
# Begins with the random kernels of the static network, one to one, and without a temperature.
KEPT = {'model.backbone.keep_weights': True}
ONE_TO_ONE = {**KEPT, **START}
STATIC, CHOSEN = Arm(), Arm(1, QUICK_ATTENTION)


def by_recipe(budget: float | None, options: Mapping[str, Any], epochs: int | None = None) -> Arm:
    """An arm by configs/_base_/recipes/fine-tune.py.

    Args:
        budget: None where the options make the network dynamic.
        options: Overrides, the rate among them.
        epochs: Of training, if they are not the table's.
    """
    return Arm(budget, {**options, **LAYER_NORM}, epochs)


def choice(
    arms: Mapping[str, Arm], epochs: int = 3, task: str = 'digits', source: int = 6
) -> Table:
    """A table that a choice looks at."""
    return Table(arms, seeds=(0, 1, 2), epochs=epochs, task=task, split='val', source=source)


def confirmed(table: Table, *names: str) -> Table:
    """A table that confirms arms of another: on the test split, with other seeds.

    Args:
        table: What the choice looked at.
        *names: Of its arms, the first one that the others are compared with.
    """
    arms = {name: table.arms[name] for name in names}
    return replace(table, arms=arms, seeds=range(10, 15), split='test')


# The static network, and the dynamic one by the recipe, at two rates.
GRID = {
    'static, 2e-3': Arm(None, FAST),
    'KW 1x, 2e-3, LN': by_recipe(1, FAST),
    'static, 4e-3': Arm(None, FASTER),
    'KW 1x, 4e-3, LN': by_recipe(1, FASTER),
}
# At which rates networks go on.
RATES = {
    'static, 3e-4': Arm(None, SLOW),
    'static, 1e-3': STATIC,
    'static, 2e-3': Arm(None, FAST),
    'static, 4e-3': Arm(None, FASTER),
    'KW 1x, 3e-4': Arm(1, SLOW),
    'KW 1x, 1e-3': Arm(1),
    'KW 1x, 3e-4, attentions 3e-3': Arm(1, {**SLOW, **QUICK_ATTENTION}),
    'KW 1x, 1e-3, attentions 1e-2': CHOSEN,
    'KW 1x, 2e-3, attentions 1e-2': Arm(1, {**FAST, **rates(attention=5)}),
    'KW 1x, 4e-3, attentions 1e-2': Arm(1, {**FASTER, **rates(attention=2.5)}),
}
# How networks half as wide go on where images differ as a whole.
CONDITIONS = choice(
    {
        'static, 2e-3': Arm(None, FAST),
        'static, 4e-3': Arm(None, FASTER),
        'static, 8e-3': Arm(None, FASTEST),
        'KW 1x, 2e-3, LN': by_recipe(1, FAST),
        'KW 1x, 4e-3, LN': by_recipe(1, FASTER),
        'KW 1x, 8e-3, LN': by_recipe(1, FASTEST),
        'KW 4x, 2e-3, LN': by_recipe(4, FAST),
        'KW 4x, 4e-3, LN': by_recipe(4, FASTER),
        'KW 1x, 4e-3, LN, five epochs': by_recipe(1, FASTER, epochs=5),
    },
    task='conditions, half as wide',
    epochs=6,
)
# From trained weights.
IMAGENET = {
    'static, 1e-3': STATIC,
    'KW 1x, 1e-3, LN': by_recipe(1, {}),
    **GRID,
}
# Foreground against background, of the same images.
SEGMENTATION = choice(
    GRID,
    task='segmentation under conditions, half as wide',
    epochs=6,
)
IMAGENET_CONDITIONS = choice(
    # Compared at 2e-3, the first. Five epochs take the time of the static network's six.
    {**GRID, 'KW 1x, 2e-3, LN, five epochs': by_recipe(1, FAST, epochs=5), **IMAGENET},
    task='conditions from ImageNet',
    epochs=6,
    source=0,
)
SEGMENTED = confirmed(SEGMENTATION, 'static, 4e-3', 'KW 1x, 4e-3, LN')


def varied(arms: Mapping[str, Arm]) -> Table:
    """Arms under conditions, beside the static network and KernelWarehouse 1x by the recipe."""
    best = {name: CONDITIONS.arms[name] for name in ('static, 4e-3', 'KW 1x, 4e-3, LN')}
    return replace(CONDITIONS, arms={**best, **arms})


TABLES = {
    'rates': choice(RATES),
    'trained_out': choice(
        {
            name: RATES[name]
            for name in (
                'static, 3e-4',
                'static, 1e-3',
                'static, 2e-3',
                'KW 1x, 3e-4, attentions 3e-3',
                'KW 1x, 1e-3, attentions 1e-2',
                'KW 1x, 2e-3, attentions 1e-2',
            )
        },
        source=24,
    ),
    'one_epoch': choice(
        {
            'static': Arm(None, SLOW),
            'KW 1x': Arm(1, SLOW),
            'KW 4x': Arm(4, SLOW),
        },
        epochs=1,
    ),
    # How networks half as wide go on.
    'further': choice(
        {
            'static, 1e-3': STATIC,
            'KW 1x, 1e-3, LN, attentions 1e-2': Arm(1, START),
            'KW 4x, 1e-3, LN, attentions 1e-2': Arm(4, START),
            'KW 1x, 1e-3, attentions 1e-2': CHOSEN,
            'static, 2e-3': Arm(None, FAST),
            'KW 1x, 2e-3, LN, attentions 1e-2': Arm(1, FAST_START),
            'KW 4x, 2e-3, LN, attentions 1e-2': Arm(4, FAST_START),
            'static, 4e-3': Arm(None, FASTER),
            'KW 1x, 4e-3, LN, attentions 1e-2': Arm(1, FASTER_START),
            'KW 4x, 4e-3, LN, attentions 1e-2': Arm(4, FASTER_START),
            # As one line in a config makes it.
            'KW 1x, 4e-3': Arm(1, FASTER),
            'KW 1x, 4e-3, LN': by_recipe(1, FASTER),
            'static, 8e-3': Arm(None, FASTEST),
        },
        task='digits, half as wide',
        epochs=6,
    ),
    'conditions': CONDITIONS,
    'conditions_confirmed': confirmed(
        CONDITIONS,
        'static, 4e-3',
        'KW 1x, 4e-3, LN',
        'KW 4x, 4e-3, LN',
        'KW 1x, 4e-3, LN, five epochs',
    ),
    'temperature': varied(
        {
            'KW 1x, 1 to 0 in one epoch': by_recipe(1, {**FASTER, **annealed(1)}),
            'KW 1x, 1 to 0 in six epochs': by_recipe(1, {**FASTER, **annealed(6)}),
        }
    ),
    'decay': varied(
        {
            'KW 1x, attentions without decay': by_recipe(1, {**FASTER, **undecayed('attention')}),
            'KW 1x, cells without decay': by_recipe(
                1, {**FASTER, **undecayed('warehouse_manager')}
            ),
        }
    ),
    'layers': varied(
        {
            'KW 1x, stages 2 and 3': by_recipe(None, {**stages(2, 3), **FASTER}),
            'KW 1x, stage 3': by_recipe(None, {**stages(3), **FASTER}),
            'KW 1x, 3x3 alone': by_recipe(None, {**stages(1, 2, 3, layers=r'conv\d'), **FASTER}),
            'KW 1x, cells frozen': by_recipe(1, {**FASTER, **rates(warehouse_manager=0)}),
            'KW 1x, attentions alone': by_recipe(1, {**FASTER, **rates(attention=1, **STILL)}),
        }
    ),
    'comparators': varied(
        {
            'KW 4x, 4e-3, LN': by_recipe(4, FASTER),
            'DY-Conv 4x': Arm(4, {**FASTER, 'model.backbone.method': 'dyconv'}),
            'CondConv 8x': Arm(8, {**FASTER, 'model.backbone.method': 'condconv'}),
            'ODConv 1x, LN': by_recipe(1, {**FASTER, 'model.backbone.method': 'odconv'}),
            'ODConv 4x, LN': by_recipe(4, {**FASTER, 'model.backbone.method': 'odconv'}),
        }
    ),
    'scratch': choice(
        {
            'static': STATIC,
            'static, twice as wide': Arm(None, WIDE),
        },
        epochs=12,
        source=0,
    ),
    # At the length of configs/demo, whose dynamic network is the last.
    'six_epochs': choice(
        {
            'static, 1e-3': STATIC,
            'static, 2e-3': Arm(None, FAST),
            'static, 4e-3': Arm(None, FASTER),
            'KW 1x, one to one, 1e-3, LN': by_recipe(1, KEPT),
            'KW 1x, one to one, 2e-3, LN': by_recipe(1, {**FAST, **KEPT}),
            'KW 1x, one to one, 4e-3, LN': by_recipe(1, {**FASTER, **KEPT}),
            'KW 1x, 1 to 0 in one epoch, 1e-3': Arm(1, annealed(1)),
        },
        epochs=6,
        source=0,
    ),
    'half': choice(
        {
            'static': STATIC,
            'KW 1x, 1 to 0 in one epoch': Arm(1, annealed(1)),
            'KW 1x, one to one, LN, attentions 1e-2': Arm(1, ONE_TO_ONE),
            'KW 4x, one to one, LN, attentions 1e-2': Arm(4, ONE_TO_ONE),
            'KW 1x, one to one': Arm(1, KEPT),
        },
        task='digits, half as wide',
        epochs=12,
        source=0,
    ),
    'scratch_conditions': choice(
        {
            'static, 2e-3': Arm(None, FAST),
            'static, 4e-3': Arm(None, FASTER),
            'KW 1x, one to one, 2e-3, LN': by_recipe(1, {**FAST, **KEPT}),
            'KW 1x, one to one, 4e-3, LN': by_recipe(1, {**FASTER, **KEPT}),
            'KW 4x, one to one, 4e-3, LN': by_recipe(4, {**FASTER, **KEPT}),
            'KW 1x, 1 to 0 in one epoch, 4e-3': Arm(1, {**FASTER, **annealed(1)}),
            'KW 1x, 1 to 0 in four epochs, 4e-3': Arm(1, {**FASTER, **annealed(4)}),
        },
        task='conditions, half as wide',
        epochs=12,
        source=0,
    ),
    'imagenet': choice(
        {'static, 3e-4': Arm(None, SLOW), 'KW 1x, 3e-4, LN': by_recipe(1, SLOW), **IMAGENET},
        task='stamps from ImageNet',
        epochs=6,
        source=0,
    ),
    'imagenet_conditions': IMAGENET_CONDITIONS,
    'imagenet_conditions_confirmed': confirmed(
        IMAGENET_CONDITIONS, 'static, 2e-3', 'KW 1x, 2e-3, LN'
    ),
    'segmentation': SEGMENTATION,
    'segmentation_confirmed': replace(
        SEGMENTED,
        arms={
            **SEGMENTED.arms,
            # In the time of the static network's six: a step takes 1.4 to 1.5 times as long.
            'KW 1x, 4e-3, LN, four epochs': by_recipe(1, FASTER, epochs=4),
        },
    ),
    # Trained in bfloat16, evaluated in float32.
    'precision': replace(
        SEGMENTED,
        arms={
            **SEGMENTED.arms,
            'static, 4e-3, bfloat16': Arm(None, {**FASTER, **BFLOAT16}),
            'KW 1x, 4e-3, LN, bfloat16': by_recipe(1, {**FASTER, **BFLOAT16}),
        },
        seeds=range(10, 13),
    ),
}


class Study:
    """Makes the runs of a table.

    Args:
        name: Of the table.
        jobs: Runs at a time; they share the processor's cores.
    """

    def __init__(self, name: str, jobs: int) -> None:
        self.table = TABLES[name]
        self.task = TASKS[self.table.task]
        self.config = f'configs/demo/{self.task.config}.py'
        self.jobs = jobs
        self.lock = Lock()
        self.digest = ''
        self.runs = written()

    def make(self) -> None:
        """Makes the runs that are missing, seed by seed, and writes each down as it ends."""
        data = self.task.data
        if not (ROOT / 'data' / data).exists():
            raise SystemExit(
                f'data/{data} is missing. Run: python tools/dataset_converters/make_mini_coco.py '
                f'data/{data} {IMAGES[data]}'
            )
        if self.table.source:
            self.digest = digest(self.train(self.source, self.table.source, {}, 0))
        # What started elsewhere, with another source, stays as it is, and is not mixed with these.
        left = [
            (name, seed)
            for seed in self.table.seeds
            for name, arm in self.table.arms.items()
            if not any(
                (run['seed'], run['source']) == (seed, self.digest)
                for run in runs_of(arm, self.table, self.runs)
            )
        ]
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda run: self.add(*run), left))

    @property
    def source(self) -> str:
        """The folder of the static network from which all start."""
        return f'{WORK}/{self.table.task.replace(" ", "_")}_{self.table.source}_epochs'

    def add(self, name: str, seed: int) -> None:
        """Makes one run and writes it down."""
        arm = self.table.arms[name]
        kind = identity(arm, self.table)
        of_kind = hashlib.sha256(json.dumps([kind, self.digest]).encode()).hexdigest()[:12]
        folder = f'{WORK}/{of_kind}/seed{seed}'
        options = arm.overrides(self.task)
        if self.table.source:
            options['load_from'] = f'{self.source}/{self.task.last(self.table.source)}'
        checkpoint = self.train(folder, kind['epochs'], options, seed)
        # Of one try: what was interrupted began anew.
        lines = [
            json.loads(line)
            for line in latest(folder, '2*/vis_data/scalars.json').read_text().splitlines()
        ]
        metrics = self.task.metrics
        steps = [line for line in lines if 'time' in line and 'loss' in line]
        curve = [line for line in lines if set(metrics.values()) <= set(line)]
        found = self.test(checkpoint, folder, options) if self.table.split == 'test' else curve[-1]
        run = {
            **kind,
            'seed': seed,
            'source': self.digest,
            **{metric: self.percent(found[key]) for metric, key in metrics.items()},
            'steps': steps[-1]['step'],
            'seconds a step': round(statistics.median(line['time'] for line in steps), 3),
            'parameters': parameters(checkpoint),
            'validation': [[self.percent(line[key]) for key in metrics.values()] for line in curve],
            'processor': processor(),
            'jobs': self.jobs,
        }
        with self.lock:
            self.runs = write(run)
            values = ' / '.join(f'{run[metric]:.1f}' for metric in metrics)
            print(f'{name}, seed {seed}: {values}', flush=True)

    def percent(self, value: float) -> float:
        """In per cent, without digits that the metric does not have."""
        return round(self.task.scale * value, 2)

    def train(self, folder: str, epochs: int, options: Mapping[str, Any], seed: int) -> Path:
        """Trains unless it was done; the last checkpoint."""
        last = ROOT / folder / self.task.last(epochs)
        with alone_in(ROOT / folder):
            if not last.exists():
                schedule = {**self.task.schedule(epochs), 'randomness.seed': seed}
                self.run('train.py', self.config, folder, {**schedule, **options})
        return last

    def test(self, checkpoint: Path, folder: str, options: Mapping[str, Any]) -> dict[str, float]:
        """Evaluates on the test split; the metrics."""
        options = {**options, **self.task.on_test()}
        self.run('test.py', self.config, f'{folder}/test', options, str(checkpoint))
        return json.loads(latest(folder, 'test/*/*.json').read_text())

    def run(
        self, script: str, config: str, folder: str, options: Mapping[str, Any], *more: str
    ) -> None:
        """Runs a script of ``tools`` on its share of the cores; stops if it fails."""
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        # MMEngine reads one config at a time.
        with self.lock:
            whole = Config.fromfile(ROOT / config)
        whole.merge_from_dict(dict(options))
        whole.dump(ROOT / folder / 'config.py')
        command = [f'tools/{script}', f'{folder}/config.py', *more, '--work-dir', folder]
        threads = max((os.cpu_count() or 1) // self.jobs, 1)
        with open(ROOT / folder / f'{script}.log', 'w') as log:
            status = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, 'OMP_NUM_THREADS': str(threads)},
                stdout=log,
                stderr=subprocess.STDOUT,
            ).returncode
        if status:
            raise SystemExit(f'{" ".join(command)} failed; {log.name} says why.')


def written() -> list[dict]:
    """All runs that have ended, of all tables."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def write(run: dict) -> list[dict]:
    """Adds a run to those that have ended, also to those of another process; all of them."""
    with alone_in(RESULTS.parent):
        runs = written()
        if any(all(one[key] == run[key] for key in WHAT) for one in runs):
            # Of another process, for a table that has this arm in common.
            return runs
        runs.append(run)
        content = ',\n'.join(map(json.dumps, runs))
        # Beside the file, which is whole whenever this process is stopped.
        new = RESULTS.with_suffix('.new')
        new.write_text(f'[\n{content}\n]\n')
        new.replace(RESULTS)
    return runs


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes from the files of a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def identity(arm: Arm, table: Table) -> dict[str, Any]:
    """What makes a run what it is, beside its seed and the weights of its source."""
    return {
        'task': table.task,
        'split': table.split,
        'source epochs': table.source,
        'epochs': arm.epochs or table.epochs,
        'options': arm.overrides(TASKS[table.task]),
    }


def runs_of(arm: Arm, table: Table, runs: Sequence[dict]) -> list[dict]:
    """The runs of an arm among all, also those that another table asked for."""
    kind = identity(arm, table)
    return [run for run in runs if all(run[name] == value for name, value in kind.items())]


def of_one_source(table: Table, runs: Sequence[dict]) -> list[dict]:
    """The runs of a table that started from the same weights; of several the most that there are.

    A source that is trained anew, also by another machine, is another one: networks that go on from
    it differ by it, too.
    """
    own = [run for arm in table.arms.values() for run in runs_of(arm, table, runs)]
    most = Counter(run['source'] for run in own).most_common(1)
    return [run for run in own if run['source'] == most[0][0]]


def pairs_of(arm: Arm, table: Table, runs: Sequence[dict]) -> list[tuple[dict, dict]]:
    """The runs of an arm, each with the first arm's of the same seed, all of one source."""
    reference, *_ = table.arms.values()
    of = {run['seed']: run for run in runs_of(reference, table, runs)}
    own = [(run, of.get(run['seed'])) for run in runs_of(arm, table, runs)]
    return [(run, first) for run, first in own if first]


def relative_time(pairs: Sequence[tuple[dict, dict]]) -> float | None:
    """The median time of a step relative to the first arm's, on the same kind of processor."""
    ratios = [
        run['seconds a step'] / first['seconds a step']
        for run, first in pairs
        if run['processor'] == first['processor']
    ]
    return statistics.median(ratios) if ratios else None


def hours(runs: Sequence[dict]) -> float:
    """What the steps of all runs took, each on its share of the cores."""
    return sum(run['steps'] * run['seconds a step'] for run in runs) / 3600


def latest(folder: str, pattern: str) -> Path:
    """The newest file in a folder that matches a pattern."""
    return max((ROOT / folder).glob(pattern), key=lambda path: path.stat().st_mtime)


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The tensors of a checkpoint of ours."""
    return read_checkpoint(str(checkpoint))['state_dict']


def parameters(checkpoint: Path) -> int:
    """Parameters of a network, without the statistics of its norms."""
    statistics = ('_mean', '_var', '_tracked')
    return sum(v.numel() for k, v in state_of(checkpoint).items() if not k.endswith(statistics))


def digest(checkpoint: Path) -> str:
    """Tells the weights of one training from those of another."""
    found = hashlib.sha256()
    for tensor in state_of(checkpoint).values():
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:12]


def report(table: Table, runs: Sequence[dict]) -> str:
    """The table of a study: means and spreads, and what each arm gains over the first.

    Gains are taken seed by seed. ``p`` is that of a paired t-test, of both sides. Runs from other
    sources than most of the table's are left out.

    Args:
        table: Of the study.
        runs: As the study writes them.
    """
    from scipy.stats import ttest_rel

    runs = of_one_source(table, runs)
    reference, *_ = table.arms.values()
    metrics = TASKS[table.task].metrics
    columns = ['network (runs)', *metrics, *(f'gain in {metric}' for metric in metrics)]
    columns += [*(f'p, {metric}' for metric in metrics), 'time of a step', 'M parameters']
    lines = ['| ' + ' | '.join(columns) + ' |', '|---' * len(columns) + '|']
    for name, arm in table.arms.items():
        own = runs_of(arm, table, runs)
        if not own:
            continue
        cells = [f'{name} ({len(own)})']
        cells += [spread([run[metric] for run in own], '.1f') for metric in metrics]
        pairs = pairs_of(arm, table, runs)
        gains = {m: [run[m] - first[m] for run, first in pairs] for m in metrics}
        if arm is reference or len(pairs) < 2:
            cells += [''] * (2 * len(metrics) + 1)
        else:
            cells += [spread(values, '+.1f') for values in gains.values()]
            for metric in metrics:
                sides = zip(*((run[metric], first[metric]) for run, first in pairs))
                p = ttest_rel(*map(list, sides)).pvalue
                cells.append('< 0.001' if p < 1e-3 else f'{p:.3f}')
            ratio = relative_time(pairs)
            cells.append(f'{ratio:.2f}' if ratio else '')
        cells.append(f'{own[0]["parameters"] / 1e6:.2f}')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def draw(table: Table, runs: Sequence[dict], path: Path) -> None:
    """Draws metrics against steps, time and parameters: means, and standard deviations around.

    Time is that of the steps alone, relative to the first arm's whole training.

    Args:
        table: Of the study.
        runs: As the study writes them.
        path: Of the picture.
    """
    from matplotlib.figure import Figure

    runs = of_one_source(table, runs)
    metrics = TASKS[table.task].metrics
    figure = Figure((12, 3.2 * len(metrics)), layout='constrained')
    axes = figure.subplots(len(metrics), 3, squeeze=False, sharey='row')
    arms = {name: own for name, arm in table.arms.items() if (own := runs_of(arm, table, runs))}
    for index, (name, own) in enumerate(arms.items()):
        steps = own[0]['steps']
        pairs = pairs_of(table.arms[name], table, runs)
        ratio = relative_time(pairs)
        for row, (metric, (by_steps, by_time, by_size)) in enumerate(zip(metrics, axes)):
            color = {'color': f'C{index}'}
            points = list(zip(*([values[row] for values in run['validation']] for run in own)))
            mean = [statistics.mean(point) for point in points]
            off = [statistics.pstdev(point) for point in points]
            at = [steps * (number + 1) / len(points) for number in range(len(points))]
            curves = [(by_steps, at)]
            # Where no pair was trained on one kind of processor nothing is known of the time.
            if ratio:
                curves.append((by_time, [ratio * step / pairs[0][1]['steps'] for step in at]))
            for axis, x in curves:
                axis.plot(x, mean, label=name, **color)
                edges = [[m + sign * d for m, d in zip(mean, off)] for sign in (-1, 1)]
                axis.fill_between(x, *edges, alpha=0.2, **color)
            last = [run[metric] for run in own]
            size = own[0]['parameters'] / 1e6
            by_size.errorbar(
                size, statistics.mean(last), statistics.pstdev(last), fmt='o', capsize=3, **color
            )
            by_steps.set_ylabel(metric)
    for axis, label in zip(
        axes[-1], ('steps', "time, of the first one's training", 'M parameters')
    ):
        axis.set_xlabel(label)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    figure.savefig(path, dpi=110)


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation."""
    deviation = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{form}}{deviation}'


def main() -> None:
    """Reads the command line, makes the runs and prints their table."""
    parser = argparse.ArgumentParser(description='Compare static and dynamic networks, trained')
    parser.add_argument('table', choices=TABLES)
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time (default: 2)')
    parser.add_argument('--only-report', action='store_true', help='train nothing')
    args = parser.parse_args()
    study, begin = Study(args.table, args.jobs), time.time()
    if not args.only_report:
        study.make()
        print(f'{(time.time() - begin) / 3600:.1f} hours')
    arms = study.table.arms.values()
    own = [run for arm in arms for run in runs_of(arm, study.table, study.runs)]
    print(f'{hours(own):.1f} hours of training for this table, {hours(study.runs):.1f} for all')
    print(f'\n{report(study.table, study.runs)}')
    draw(study.table, study.runs, RESULTS.with_name(f'{args.table}.png'))


if __name__ == '__main__':
    main()

"""The configs of the paper's ImageNet table: parameters, recipe, a step, a run on real pictures."""

import pickle
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from command_util import run
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint, load_state_dict

from mmkw import set_temperature
from mmkw.checkpoints import CheckpointMismatchError
from mmkw.engine.building import build_model
from mmkw.engine.command_line import PUBLISHED_WEIGHTS
from mmkw.layers.dynamic_layers import DynamicLayer

CONFIGS = Path(__file__).parents[1] / 'configs'
# The parameters with the classifier of 1000 classes, and the top-1 accuracy, of the paper. Those of
# the static networks are what everybody counts.
TABLE = {
    'resnet18': (11_689_512, 70.44),
    'kw1d4x-resnet18': (4_031_768, 72.73),
    'kw1d2x-resnet18': (7_431_044, 73.33),
    'kw1x-resnet18': (11_932_148, 74.77),
    'kw2x-resnet18': (23_242_127, 75.19),
    'kw4x-resnet18': (45_862_085, 76.05),
    'resnet50': (25_557_032, 78.44),
    'kw1d2x-resnet50': (17_638_264, 79.30),
    'kw1x-resnet50': (28_052_310, 80.38),
    'kw4x-resnet50': (102_015_144, 81.05),
    'convnext-tiny': (28_589_128, 82.07),
    'kw1x-convnext-tiny': (39_370_674, 82.51),
    'mobilenet-v2': (3_504_872, 72.04),
    'kw1d2x-mobilenet-v2': (2_654_396, 72.59),
    'kw1x-mobilenet-v2': (5_168_146, 74.68),
    'kw4x-mobilenet-v2': (11_379_382, 75.92),
    'mobilenet-v2-0.5': (1_968_680, 64.32),
    'kw1d2x-mobilenet-v2-0.5': (1_466_888, 65.20),
    'kw1x-mobilenet-v2-0.5': (2_854_522, 68.29),
    'kw4x-mobilenet-v2-0.5': (4_648_587, 70.26),
}
# Static and dynamic twins, one of every kind, and what makes them small.
R18 = dict(stem_channels=16, base_channels=16)
CONVNEXT = dict(arch=dict(depths=[1, 1, 1, 1], channels=[16, 32, 48, 64]))
SMALL = {
    'resnet/resnet18_32xb128-300e_in1k': (R18, 128),
    'resnet/kw1d4x-resnet18_32xb128-300e_in1k': (R18, 128),
    'convnext/convnext-tiny_32xb128-300e_in1k': (CONVNEXT, 64),
    'convnext/kw1x-convnext-tiny_32xb128-300e_in1k': (CONVNEXT, 64),
    'mobilenet_v2/mobilenet-v2-0.5_8xb32-150e_in1k': (dict(), 1280),
    'mobilenet_v2/kw1d2x-mobilenet-v2-0.5_8xb32-150e_in1k': (dict(), 1280),
}
DEMO = 'configs/demo/kw1x-r18_mini-coco-digits.py'


def test_parameters_and_accuracies_of_the_paper():
    """The metafiles' parameters are counted: test_model_zoo compares them with the configs."""
    found = {}
    for folder in ('resnet', 'convnext', 'mobilenet_v2'):
        for model in yaml.safe_load((CONFIGS / folder / 'metafile.yml').read_text())['Models']:
            (result,) = model['Results']
            found[model['Name'].split('_')[0]] = (
                model['Metadata']['Parameters'],
                result['Metrics']['Top 1 Accuracy'],
            )
            weights = PUBLISHED_WEIGHTS[model['Published Weights']]
            assert f'top-1 {result["Metrics"]["Top 1 Accuracy"]:.2f}' in weights
    assert found == TABLE


@pytest.fixture(scope='module', params=SMALL)
def row(request):
    """A config, and its model made small."""
    pytest.importorskip('mmpretrain', reason='has the classifiers')
    config = Config.fromfile(CONFIGS / f'{request.param}.py')
    options, channels = SMALL[request.param]
    config.model.backbone.update(options)
    config.model.head.in_channels = channels
    model = build_model(config)
    model.init_weights()
    return SimpleNamespace(name=request.param, config=config, model=model)


def test_recipe_and_a_step(row):
    config, model, dynamic = row.config, row.model, 'kw' in row.name
    short = 'mobilenet' in row.name
    assert any(isinstance(m, DynamicLayer) for m in model.modules()) == dynamic
    assert isinstance(model.head.fc, DynamicLayer) == ('kw1d2x-mobilenet' in row.name)
    length = 15 if short else 20
    hooks = [dict(type='mmkw.TemperatureHook', length=length)] if dynamic else []
    assert config.get('custom_hooks', []) == hooks
    assert config.train_cfg.max_epochs == (150 if short else 300)
    assert config.train_dataloader.dataset.type == 'ImageNet'
    optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
    optimizer = optim_wrapper.optimizer
    kind, rate, decay = (torch.optim.SGD, 0.05, 4e-5) if short else (torch.optim.AdamW, 4e-3, 0.05)
    assert type(optimizer) is kind
    assert {group['lr'] for group in optimizer.param_groups} == {rate}
    assert {group['weight_decay'] for group in optimizer.param_groups} <= {0, decay}
    assert config.auto_scale_lr.base_batch_size == (256 if short else 4096)
    augmented = {step.type for step in config.train_dataloader.dataset.pipeline}
    assert {'RandAugment', 'RandomErasing'} <= augmented or short
    assert (model.data_preprocessor.batch_augments is None) == short
    assert type(model.head.loss_module).__name__ == (
        'CrossEntropyLoss' if short else 'LabelSmoothLoss'
    )

    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(label) for label in (3, 997)]
    batch = dict(inputs=[torch.randint(0, 255, (3, 64, 64)).byte()] * 2, data_samples=samples)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if dynamic:  # as the hook does before the first step: random cells start one to one
        set_temperature(model, 1.0)
    data = model.train().data_preprocessor(batch, True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    assert loss.isfinite()
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    optim_wrapper.step()
    changed = [name for name, p in model.named_parameters() if not p.equal(before[name])]
    assert len(changed) > 0.4 * len(before)
    predictions = model.eval().test_step(batch)
    assert all(sample.pred_score.shape == (1000,) for sample in predictions)


# What the authors call parts of a classifier, by its network.
PUBLISHED_NAMES = {
    'resnet': {'head.fc.': 'fc.'},
    'convnext': {'head.fc.': 'head.', 'backbone.norm3.': 'norm.'},
    'mobilenet_v2': {
        'head.fc.': 'classifier.1.',
        'head.warehouse_manager.weights.0': 'warehouse_manager.weights.9',
    },
}


def test_files_of_whole_imagenet_networks(row, tmp_path):
    names = PUBLISHED_NAMES[row.name.split('/')[0]]
    state = row.model.state_dict()
    file = {}
    for key, value in state.items():
        start = next((start for start in names if key.startswith(start)), 'backbone.')
        file[key.replace(start, names.get(start, ''), 1)] = value
    torch.save(dict(model=file), tmp_path / 'published.pth')
    model = build_model(row.config)
    load_checkpoint(model, str(tmp_path / 'published.pth'), strict=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_file_of_another_budget_is_refused_and_nothing_is_loaded():
    pytest.importorskip('mmpretrain', reason='has the classifiers')
    config = Config.fromfile(CONFIGS / 'resnet/kw1x-resnet18_32xb128-300e_in1k.py')
    config.model.backbone.update(R18)
    config.model.head.in_channels = 128
    file = {
        key.removeprefix('backbone.').removeprefix('head.'): value
        for key, value in build_model(config).state_dict().items()
    }
    config.model.backbone.cell_num_ratio = 2
    model = build_model(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match='With cell_num_ratio=1 it would fit'):
        load_state_dict(model, file)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def on(mini_coco):
    """Overrides that shrink the demo to seconds."""
    roots = {part: mini_coco / 'digits' / part for part in ('train', 'val')}
    roots['test'] = roots['val']
    options = {f'{part}_dataloader.dataset.data_root': str(roots[part]) for part in roots}
    return options | {
        'train_cfg.max_epochs': 1,
        'train_dataloader.batch_size': 4,
        'model.backbone.base_channels': 8,
        'model.head.in_channels': 64,
    }


def test_one_command_trains_and_tests(root, mini_coco, tmp_path):
    pytest.importorskip('mmpretrain', reason='has the classifiers')
    options = ['--cfg-options', *(f'{key}={value}' for key, value in on(mini_coco).items())]
    command = [sys.executable, 'tools/train.py', DEMO, '--work-dir', tmp_path]
    result, output = run(root, *command, *options)
    assert result.returncode == 0, output
    assert 'accuracy/top1' in output and 'temperature' in output

    command = [sys.executable, 'tools/test.py', DEMO, tmp_path / 'epoch_1.pth']
    command += ['--work-dir', tmp_path / 'test', '--out', tmp_path / 'out.pkl']
    result, output = run(root, *command, '--show-dir', tmp_path / 'pictures', *options)
    assert result.returncode == 0, output
    assert 'accuracy/top1' in output
    count = len(list((mini_coco / 'digits/val').rglob('*.png')))
    assert len(pickle.loads((tmp_path / 'out.pkl').read_bytes())) == count > 0
    assert len(list((tmp_path / 'pictures').glob('*.png'))) == count


def test_the_static_twin_trains_and_is_tested_with_flips(root, mini_coco, tmp_path):
    pytest.importorskip('mmpretrain', reason='has the classifiers')
    config = Config.fromfile(root / DEMO.replace('kw1x-', ''))
    config.merge_from_dict(on(mini_coco) | {'work_dir': str(tmp_path)})
    runner = Runner.from_cfg(config)
    runner.train()
    assert not any(isinstance(m, DynamicLayer) for m in runner.model.modules())
    assert 0 <= runner.test()['accuracy/top1'] <= 100

    # What --tta does.
    runpy.run_path(str(root / 'tools/test.py'))['augment_at_test_time'](config)
    dataset = runner.build_dataloader(config.test_dataloader).dataset
    batch = pseudo_collate([dataset[0], dataset[1]])
    assert [len(views) for views in batch['inputs']] == [2, 2]
    config.model.module.data_preprocessor = config.data_preprocessor
    predictions = MODELS.build(config.model).eval().test_step(batch)
    assert [sample.pred_score.shape for sample in predictions] == [(10,), (10,)]

"""Every config builds, trains a step and infers; new configs are found by themselves."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from configs_util import SIZE, build_model, detection_batch, made_small, segmentation_batch
from conftest import exhaustively
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, init_default_scope
from torch.nn.modules.batchnorm import _BatchNorm

from mmkw.engine import building
from mmkw.engine.command_line import PUBLISHED_WEIGHTS
from mmkw.layers import Attention
from mmkw.layers.dynamic_layers import DynamicLayer

CONFIGS = Path(__file__).parents[1] / 'configs'
LEAVES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob('*.py')
    if '_base_' not in path.relative_to(CONFIGS).parts
    # Those are in test_classification.py and test_model_converters.py.
    and not path.stem.endswith(('_in1k', '-digits'))
    and 'efficientnet-lite0' not in path.stem
)
# They have another budget, method, backbone or data set than one of the others.
REPEATED = [
    name
    for name in LEAVES
    if re.search('/mask-rcnn_(kw1d2x|kw4x|dyconv4x|kw1x-swin|kw1x-regnetx|kw2x-x50)-', name)
    or re.search(
        'hrnet|retinanet_kw1x-r50|retinanet_r50_kw4x|pspnet|mini-stamps'
        '|_r18-half_(fpn_)?mini-conditions',
        name,
    )
]
BACKBONES = sorted(path.stem for path in (CONFIGS / '_base_/backbones').iterdir())
SEGMENTATION = ('ade20k', 'cityscapes', 'coco-stuff', 'semantic')
BOTH = ('mask2former',)


def is_dynamic(name):
    """Whether a config's name says that layers are dynamic."""
    return any(method in name for method in ('kw', 'dyconv', 'odconv'))


def load(name):
    """Reads a config; skips the test where a library that the config needs is not installed."""
    segmentation = any(dataset in name for dataset in SEGMENTATION)
    pytest.importorskip('mmseg' if segmentation else 'mmdet', reason='the config inherits from it')
    if any(method in name for method in BOTH):
        pytest.importorskip('mmdet', reason="uses MMDetection's decoder")
    return Config.fromfile(CONFIGS / name)


def batches(config, model):
    """A batch to train on and one to infer from."""
    if config.default_scope == 'mmseg':
        return segmentation_batch(), segmentation_batch()
    stuff = hasattr(model, 'semantic_head')
    return detection_batch(masks=model.with_mask, stuff=stuff), detection_batch()


def check_prediction(config, sample):
    if config.default_scope == 'mmseg':
        assert sample.pred_sem_seg.data.shape == (1, SIZE, SIZE)
    elif 'pred_panoptic_seg' in sample:
        assert sample.pred_panoptic_seg.sem_seg.shape == (1, SIZE, SIZE)
    else:
        assert sample.pred_instances.bboxes.shape[1] == 4


@pytest.mark.parametrize('name', exhaustively(LEAVES, REPEATED))
def test_config_trains_a_step_and_infers(name):
    """Those that are left to ``--exhaustive`` are built by the model zoo's check, as all are."""
    config = load(name)
    init_default_scope(config.default_scope)
    for hook in config.get('custom_hooks', []):
        # The runner takes the priority.
        HOOKS.build({k: v for k, v in hook.items() if k != 'priority'})
    made_small(config.model)
    model = build_model(config)
    assert any(isinstance(m, DynamicLayer) for m in model.modules()) == is_dynamic(name)
    optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            # Random weights leave the range of their activations under running statistics.
            module.train()
    training, testing = batches(config, model)
    # What the runner tells; some preprocessors resize every so many iterations.
    MessageHub.get_current_instance().update_info('iter', 0)
    data = model.data_preprocessor(training, True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    assert loss.isfinite()
    loss.backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    optim_wrapper.step()
    changed = [n for n, p in model.named_parameters() if p.requires_grad and not p.equal(before[n])]
    # Residual branches end in a norm of zeros: what lies before it waits for the second step.
    assert len(changed) > 0.4 * len(before)

    model.eval()
    with torch.no_grad():
        results = model.test_step(testing)
    for sample in results:
        check_prediction(config, sample)
    assert (config.train_cfg.get('max_epochs') or config.train_cfg.get('max_iters')) > 0
    assert config.train_dataloader.dataset.pipeline


@pytest.mark.parametrize('library, cells', [('mmdet', 348), ('mmseg', 87)])
def test_config_of_the_readme_builds(tmp_path, library, cells):
    pytest.importorskip(library, reason='the example inherits from it')
    readme = (CONFIGS.parent / 'README.md').read_text()
    (example,) = [part for part in readme.split('```python')[1:] if f"= '{library}::" in part]
    (tmp_path / 'my_config.py').write_text(example.split('```')[0])
    model = build_model(Config.fromfile(tmp_path / 'my_config.py'))
    assert len(model.backbone.warehouse_manager.weights[0]) == cells


@pytest.mark.parametrize('name', BACKBONES)
def test_another_backbone_is_another_line(name, tmp_path):
    """As docs/model_zoo.md says."""
    pytest.importorskip('mmdet', reason='the config inherits from it')
    path = CONFIGS / f'_base_/backbones/{name}.py'
    assert list(Config.fromfile(path)) == ['backbone']
    config = (CONFIGS / 'faster_rcnn/faster-rcnn_kw1x-r50_fpn_1x_coco.py').read_text()
    before = "'../_base_/backbones/kw1x-r50.py'"
    assert before in config
    config = config.replace(before, f"'{path}'")
    channels = {
        'r18': [64, 128, 256, 512],
        'mobilenet': [24, 32, 96, 1280],
        'convnext': [96, 192, 384, 768],
    }
    for network in channels:
        if network in name:
            config += f'model.update(neck=dict(in_channels={channels[network]}))\n'
    (tmp_path / 'config.py').write_text(config)
    config = Config.fromfile(tmp_path / 'config.py')
    assert config.model.backbone.init_cfg.checkpoint in PUBLISHED_WEIGHTS
    model = building.build_model(config, on_meta=True).eval()
    assert any(isinstance(m, DynamicLayer) for m in model.modules()) == is_dynamic(name)
    outputs = model.neck(model.backbone(torch.empty(1, 3, SIZE, SIZE, device='meta')))
    assert [y.shape[-1] for y in outputs] == [SIZE // stride for stride in (4, 8, 16, 32, 64)]


@pytest.mark.parametrize('name', ['fine_tune', 'from_scratch'])
def test_a_recipe_is_inherited_in_one_line(name, tmp_path):
    """It adds its options to the network, and leaves all else as the static config has it."""
    pytest.importorskip('mmdet', reason='the config inherits from it')
    static = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
    configs = []
    for base, network in (
        (f"'{static}'", "type='mmkw.KWResNet'"),
        (
            f"['{static}', 'mmkw::_base_/recipes/{name.replace('_', '-')}.py']",
            f"type='mmkw.KWResNet', **_base_.{name}",
        ),
    ):
        (tmp_path / 'config.py').write_text(
            f'_base_ = {base}\nmodel = dict(backbone=dict({network}))\n'
        )
        configs.append(Config.fromfile(tmp_path / 'config.py'))
    plain, tuned = (config.to_dict() for config in configs)
    recipe = tuned.pop(name)
    assert tuned['model']['backbone'] == {**plain['model']['backbone'], **recipe}
    tuned['model']['backbone'] = plain['model']['backbone']
    assert tuned == plain
    # A config that is written down is read again.
    configs[1].dump(tmp_path / 'dumped.py')
    model = building.build_model(Config.fromfile(tmp_path / 'dumped.py'), on_meta=True)
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    assert len(attentions) == 50
    assert all(isinstance(attention.norm1, torch.nn.LayerNorm) for attention in attentions)


def test_configs_that_are_named_exist():
    root = CONFIGS.parent
    files = [*root.glob('*.md'), root / 'Makefile', root / 'model-index.yml']
    for folder in ('configs', 'docs', 'mmkw', 'tests', 'tools'):
        for suffix in ('md', 'py', 'sh', 'yml'):
            files += (root / folder).rglob(f'*.{suffix}')
    text = '\n'.join(file.read_text() for file in files)
    names = set(re.findall(r'\bconfigs/[\w./-]+\.(?:py|yml)\b', text))
    assert len(names) > len(LEAVES)
    assert not [name for name in sorted(names) if not (root / name).is_file()]


def test_loss_of_the_demo_falls():
    """Twenty steps on one batch."""
    config = load('demo/mask-rcnn_kw1x-r18_fpn_mini-coco.py')
    model = build_model(config)
    model.train()
    optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
    batch = detection_batch()
    losses = [
        model.train_step(batch, optim_wrapper)['loss'].item() for _ in itertools.repeat(None, 20)
    ]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

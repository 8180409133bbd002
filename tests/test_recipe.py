"""The configs of the paper's table train as its authors did: every parameter, block and norm.

What is expected is written down here by names and shapes, not read from the configs.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkw.backbones.convnext import ConvNeXtBlock
from mmkw.engine.building import build_model
from mmkw.layers import Attention
from mmkw.layers.dynamic_layers import DynamicLayer

pytest.importorskip('mmdet', reason='the recipe is for Mask R-CNN')
from mmcv.cnn.bricks import DropPath
from mmdet.models.backbones.mobilenet_v2 import InvertedResidual
from mmdet.models.backbones.resnet import Bottleneck

CONFIGS = Path(__file__).parents[1] / 'configs/mask_rcnn'
# Every network of the table, static and with its budgets: of each its number of warehouses.
ROWS = {
    'r50': 0,
    'kw1x-r50': 4,
    'kw4x-r50': 4,
    'mobilenet-v2': 0,
    'kw1x-mobilenet-v2': 13,
    'kw4x-mobilenet-v2': 19,
    'convnext-tiny': 0,
    'kw1x-convnext-tiny': 12,
}
LR, DECAY = 1e-4, 0.05
FROZEN = {
    'r50': ('backbone.conv1.', 'backbone.bn1.', 'backbone.layer1.'),
    'mobilenet-v2': ('backbone.conv1.', 'backbone.layer1.', 'backbone.layer2.'),
    'convnext-tiny': (),
}
# How often the rate of ConvNeXt is multiplied by .95, by the beginning of a name.
LAYERS_ABOVE = {
    'backbone.downsample_layers.0.': 7,
    'backbone.stages.0.': 6,
    'backbone.downsample_layers.1.': 5,
    'backbone.stages.1.': 5,
    'backbone.downsample_layers.2.': 4,
    **{f'backbone.stages.2.{block}.': 4 for block in (0, 1, 2)},
    **{f'backbone.stages.2.{block}.': 3 for block in (3, 4, 5)},
    **{f'backbone.stages.2.{block}.': 2 for block in (6, 7, 8)},
    'backbone.downsample_layers.3.': 1,
    'backbone.stages.3.': 1,
}
SHORT_SIDES = [(side, 1333) for side in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)]


def expected_group(network, name, parameter):
    """Learning rate and weight decay."""
    if network != 'convnext-tiny':
        return LR, 0 if 'norm' in name else DECAY
    above = [n for start, n in LAYERS_ABOVE.items() if name.startswith(start)]
    decay = 0 if parameter.ndim == 1 or name.endswith('.bias') else DECAY
    return LR * 0.95 ** sum(above), decay


@pytest.fixture(scope='module', params=ROWS)
def row(request):
    """A row of the table: its model and optimizer as built for training, then set to training."""
    config = Config.fromfile(CONFIGS / f'mask-rcnn_{request.param}_fpn_adamw-1x_coco.py')
    model = build_model(config)
    # The optimizer is built before the model is set to training, as in MMEngine's runner.
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    model.train()
    norms = {m: m.training for m in model.modules() if isinstance(m, _BatchNorm)}
    for norm in norms:
        # With random weights nothing would be left of the image under running statistics.
        norm.train()
    sum(y.square().mean() for y in model.backbone(torch.randn(2, 3, 64, 64))).backward()
    return SimpleNamespace(
        network=request.param.removeprefix('kw1x-').removeprefix('kw4x-'),
        warehouses=ROWS[request.param],
        config=config,
        model=model,
        optimizer=optimizer,
        norms=norms,
    )


def test_every_parameter_has_its_rate_and_decay(row):
    assert type(row.optimizer) is torch.optim.AdamW
    names = {p: name for name, p in row.model.named_parameters()}
    found, expected = {}, {}
    for group in row.optimizer.param_groups:
        assert group['betas'] == (0.9, 0.999)
        for parameter in group['params']:
            name = names[parameter]
            assert name not in found
            found[name] = (group['lr'], group['weight_decay'])
            expected[name] = pytest.approx(expected_group(row.network, name, parameter), rel=1e-9)
    assert found == expected
    assert {name for p, name in names.items() if p.requires_grad} <= set(found)


def test_stages_are_frozen_and_all_warehouses_learn(row):
    frozen = {name for name, p in row.model.named_parameters() if not p.requires_grad}
    starts = FROZEN[row.network]
    assert frozen == {name for name, _ in row.model.named_parameters() if name.startswith(starts)}
    if row.network == 'mobilenet-v2':
        blocks = [m for m in row.model.modules() if isinstance(m, InvertedResidual)]
        learn = [all(p.requires_grad for p in block.parameters()) for block in blocks]
        assert learn == [False] * 3 + [True] * 14
    assert hasattr(row.model.backbone, 'warehouse_manager') == bool(row.warehouses)
    if row.warehouses:
        weights = row.model.backbone.warehouse_manager.weights
        assert len(weights) == row.warehouses
        assert all(w.requires_grad and w.grad.isfinite().all() and w.grad.any() for w in weights)


def test_norms_keep_their_statistics(row):
    attentions = [m for m in row.model.modules() if isinstance(m, Attention)]
    assert bool(attentions) == bool(row.warehouses)
    if row.network == 'convnext-tiny':
        assert not row.norms
        assert {type(attention.norm1) for attention in attentions} <= {nn.LayerNorm}
    else:
        assert len(row.norms) > len(attentions) and not any(row.norms.values())
        assert all(attention.norm1 in row.norms for attention in attentions)


def test_blocks_drop_their_paths(row):
    blocks = [m for m in row.model.modules() if isinstance(m, (Bottleneck, ConvNeXtBlock))]
    drops = [m for m in row.model.modules() if isinstance(m, DropPath)]
    rates = [getattr(getattr(b, 'drop_path', None), 'drop_prob', 0) for b in blocks]
    if row.network == 'convnext-tiny':
        assert rates == pytest.approx([0.4 * index / 17 for index in range(18)])
        assert all(block.gamma.eq(1).all() for block in blocks)
    elif row.network == 'r50':
        assert rates == [0.1 if row.warehouses else 0] * 16
    assert len(drops) == sum(rate > 0 for rate in rates)


def test_temperature_is_zero(row):
    layers = [m for m in row.model.modules() if isinstance(m, DynamicLayer)]
    assert bool(layers) == bool(row.warehouses)
    assert all(layer.attention.temperature == 0 for layer in layers)
    assert not row.config.get('custom_hooks')
    hooks = {hook.type for hook in row.config.default_hooks.values()}
    assert hooks == {
        'IterTimerHook',
        'LoggerHook',
        'ParamSchedulerHook',
        'CheckpointHook',
        'DistSamplerSeedHook',
        'DetVisualizationHook',
    }


def test_schedule(row):
    config = row.config
    assert config.train_cfg.type == 'EpochBasedTrainLoop' and config.train_cfg.max_epochs == 12
    assert config.train_dataloader.batch_size == 2
    assert config.auto_scale_lr.base_batch_size == 16
    # Neither clipping nor automatic mixed precision.
    given = set(config.optim_wrapper) - {'constructor', 'paramwise_cfg'}
    assert given == {'type', 'optimizer'} and config.optim_wrapper.type == 'OptimWrapper'
    # Whose base a scheduler is of does not matter.
    warm_up, steps = (
        {k: v for k, v in s.items() if k != '_scope_'} for s in config.param_scheduler
    )
    assert warm_up == dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500)
    milestones = [9, 11] if row.network == 'convnext-tiny' else [8, 11]
    assert steps == dict(
        type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=milestones, gamma=0.1
    )


def test_augmentation(row):
    multi_scale = dict(type='RandomChoiceResize', scales=SHORT_SIDES, keep_ratio=True)
    smaller = [(400, 1333), (500, 1333), (600, 1333)]
    crop = dict(crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True)
    assert row.config.train_dataloader.dataset.pipeline == [
        dict(type='LoadImageFromFile', backend_args=None),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='RandomFlip', prob=0.5),
        dict(
            type='RandomChoice',
            transforms=[
                [multi_scale],
                [
                    dict(type='RandomChoiceResize', scales=smaller, keep_ratio=True),
                    dict(type='RandomCrop', **crop),
                    multi_scale,
                ],
            ],
        ),
        dict(type='PackDetInputs'),
    ]

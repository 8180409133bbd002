"""Rates of layers and shared warehouses, in the groups of a real optimizer."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmkw.backbones import ConvNeXt, KWConvNeXt

ARCH = dict(depths=[1, 1, 9, 1], channels=[8, 16, 24, 32])


def rates(backbone, **paramwise):
    model = nn.Module()
    model.backbone = backbone
    model.head = nn.Linear(4, 4)
    cfg = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
        constructor='mmkw.LayerDecayConstructor',
        paramwise_cfg=dict(num_layers=6, decay_rate=0.5, norm_decay_mult=0.0, **paramwise),
    )
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    by_id = {id(p): group for group in groups for p in group['params']}
    return {n: by_id[id(p)] for n, p in model.named_parameters() if id(p) in by_id}


@pytest.mark.parametrize('build', [ConvNeXt, KWConvNeXt])
def test_rates_follow_the_depth(build):
    groups = rates(build(ARCH))
    expected = {
        'head.weight': 1,
        'backbone.norm0.weight': 1,
        'backbone.stages.3.0.gamma': 0.5,
        'backbone.downsample_layers.3.0.weight': 0.5,
        'backbone.stages.2.8.norm.weight': 0.5**2,
        'backbone.stages.2.3.norm.weight': 0.5**3,
        'backbone.stages.2.2.norm.weight': 0.5**4,
        'backbone.downsample_layers.2.1.bias': 0.5**4,
        'backbone.stages.1.0.dwconv.bias': 0.5**5,
        'backbone.downsample_layers.1.1.bias': 0.5**5,
        'backbone.stages.0.0.dwconv.bias': 0.5**6,
        'backbone.downsample_layers.0.0.bias': 0.5**7,
    }
    assert {name: groups[name]['lr'] for name in expected} == expected
    assert groups['backbone.stages.0.0.norm.weight']['weight_decay'] == 0
    assert groups['head.weight']['weight_decay'] == 0.05


def test_a_shared_warehouse_takes_the_largest_rate_of_its_layers():
    network = KWConvNeXt(ARCH)
    groups = rates(network)
    names = [p.name for p in network.warehouse_manager.partitions]
    lr = {n: groups[f'backbone.warehouse_manager.weights.{i}']['lr'] for i, n in enumerate(names)}
    assert lr['stem'] == 0.5**7 and lr['stage1_depthwise'] == 0.5**6
    # Blocks 0 to 8 of the third stage are layers 3 to 5.
    assert lr['stage3_depthwise'] == lr['stage3_pointwise'] == 0.5**2
    attention = 'backbone.stages.2.0.dwconv.attention.fc1.weight'
    assert groups[attention]['lr'] == 0.5**4


def test_rates_given_by_name_do_not_fall_with_depth():
    keys = {
        'warehouse_manager': dict(lr_mult=1.0),
        'head': dict(lr_mult=3.0, decay_mult=0.5),
        'gamma': dict(decay_mult=0.0),
    }
    groups = rates(KWConvNeXt(ARCH), custom_keys=keys, flat_decay_mult=0.0)
    cells = [group for name, group in groups.items() if 'warehouse_manager' in name]
    assert len(cells) == 12
    assert all(group['lr'] == 1 and group['weight_decay'] == 0.05 for group in cells)
    assert (groups['head.weight']['lr'], groups['head.weight']['weight_decay']) == (3, 0.025)
    # A key that says nothing of the rate leaves it to the depth.
    gamma = groups['backbone.stages.0.0.gamma']
    assert (gamma['lr'], gamma['weight_decay']) == (0.5**6, 0)
    attention = groups['backbone.stages.0.0.dwconv.attention.fc1.bias']
    assert (attention['lr'], attention['weight_decay']) == (0.5**6, 0)


def test_frozen_parameters_keep_out_of_the_way():
    network = KWConvNeXt(ARCH, frozen_stages=1)
    groups = rates(network, bypass_duplicate=True)
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert {f'backbone.{n}' for n in trained} <= set(groups)
    model = network(torch.randn(1, 3, 32, 32))
    assert len(model) == 4


@pytest.mark.parametrize(
    'paramwise, message',
    [
        (dict(num_layers=3), 'num_layers must be an integer of at least 4, got 3'),
        (dict(num_layers=6, decay_rate=0), r'decay_rate must be a number in \(0, 1\], got 0'),
        (dict(decay_rate=0.9), 'num_layers must be .*, got None'),
    ],
)
def test_arguments_out_of_range_are_refused(paramwise, message):
    cfg = dict(
        optimizer=dict(type='AdamW', lr=1.0),
        constructor='mmkw.LayerDecayConstructor',
        paramwise_cfg=paramwise,
    )
    with pytest.raises(ValueError, match=message):
        build_optim_wrapper(nn.Linear(1, 1), cfg)


def test_another_backbone_is_refused():
    cfg = dict(
        optimizer=dict(type='AdamW', lr=1.0),
        constructor='mmkw.LayerDecayConstructor',
        paramwise_cfg=dict(num_layers=6, decay_rate=0.9),
    )
    model = nn.ModuleDict(dict(backbone=nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match='found no ConvNeXt at `backbone` of this ModuleDict'):
        build_optim_wrapper(model, cfg)

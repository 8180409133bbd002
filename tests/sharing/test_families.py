"""Rules for any network, and the splitting of warehouses that would be useless."""

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmkw import KWModule, KWResNet
from mmkw.sharing import family_rule, mobilenet_v2_rule, resnet_rule, split_groups
from mmkw.sharing.families import MAX_OVERHEAD, attention_overhead, plannable_layers


def build(library, **config):
    pytest.importorskip(library, reason='the network is its')
    # Transformers read numbers from tensors while they are built.
    device = 'cpu' if 'Transformer' in config['type'] else 'meta'
    with DefaultScope.overwrite_default_scope(library), torch.device(device):
        return MODELS.build(dict(config, type=f'{library}.{config["type"]}'))


def warehouses(pairs):
    members = {}
    for layer, warehouse in pairs:
        members.setdefault(warehouse, []).append(layer)
    return members


@pytest.mark.parametrize('depth', [18, 50])
def test_the_paper_s_plans_are_not_split(depth):
    network = build('mmdet', type='ResNet', depth=depth)
    assert family_rule(network) == resnet_rule(network)
    network = build('mmdet', type='MobileNetV2')
    joint = mobilenet_v2_rule(network, 'joint')
    assert [layer for layer, _ in family_rule(network)] == [layer for layer, _ in joint]


@pytest.mark.parametrize('dynamic', [KWModule, KWResNet])
def test_no_warehouse_of_a_resnext_is_useless(dynamic):
    resnext = dict(depth=50, groups=32, base_width=4)
    static = build('mmdet', type='ResNeXt', **resnext)
    layers = plannable_layers(static)
    for members in warehouses(family_rule(static)).values():
        assert attention_overhead(members, layers) <= MAX_OVERHEAD or len(members) == 1
    argument = dict(module=dict(type='mmdet.ResNeXt')) if dynamic is KWModule else {}
    with DefaultScope.overwrite_default_scope('mmdet'), torch.device('meta'):
        network = dynamic(**argument, **resnext)
    found = [
        (p.name, s.kernel.layer) for p in network.warehouse_manager.partitions for s in p.layers
    ]
    assert sorted(found) == sorted((home, name) for name, home in family_rule(static))
    parameters = [sum(p.numel() for p in net.parameters()) for net in (network, static)]
    assert parameters[0] < 1.6 * parameters[1]


def test_res2net_s_split_convolutions_are_planned():
    planned = dict(family_rule(build('mmdet', type='Res2Net', depth=50)))
    assert {'layer1.0.convs.0', 'layer4.2.convs.2', 'layer2.0.downsample.1'} <= set(planned)


@pytest.mark.parametrize('blocks, stages', [(12, 4), (24, 4)])
def test_a_vit_s_value_projections_and_mlps_share_in_four_stages(blocks, stages):
    network = build(
        'mmseg', type='VisionTransformer', num_layers=blocks, embed_dims=192, num_heads=3
    )
    members = warehouses(family_rule(network))
    assert list(members)[:2] == ['stage1_value', 'stage1_mlp']
    assert len(members) == 2 * stages
    assert members['stage1_value'] == [f'layers.{i}.attn.attn.value' for i in range(blocks // 4)]
    assert members['stage1_mlp'][:2] == ['layers.0.ffn.layers.0.0', 'layers.0.ffn.layers.1']
    assert sum(map(len, members.values())) == 3 * blocks


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_a_swin_shares_by_its_stages(library):
    network = build(library, type='SwinTransformer', embed_dims=24, num_heads=(1, 2, 3, 4))
    members = warehouses(family_rule(network))
    assert members['stages_2_value'] == [
        f'stages.2.blocks.{i}.attn.w_msa.qkv.value' for i in range(6)
    ]
    assert len(members['stages_2_mlp']) == 12


def test_mit_s_depthwise_convolutions_stay_static():
    network = build('mmseg', type='MixVisionTransformer', embed_dims=16)
    layers = plannable_layers(network)
    assert all(getattr(layers[name], 'groups', 1) == 1 for name, _ in family_rule(network))


def test_the_general_rule_leaves_images_predictions_and_tiny_kernels_static():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 64, 3)
            self.stage1 = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=64))
            self.stage2 = nn.Sequential(nn.Conv2d(64, 128, 1), nn.Conv2d(128, 128, 3, groups=2))
            self.linear = nn.Linear(128, 128)
            self.head = nn.Conv2d(128, 9, 1)
            self.up = nn.ConvTranspose2d(128, 128, 2)

    assert family_rule(Network()) == [
        ('stage1.0', 'stage1_conv'),
        ('stage2.0', 'stage2_conv'),
        ('stage2.1', 'stage2_grouped'),
        ('linear', 'network_linear'),
    ]


def test_a_group_whose_divisor_is_small_is_split():
    layers = {
        'a': nn.Conv2d(64, 64, 3),
        'b': nn.Conv2d(64, 63, 1),
        'c': nn.Conv2d(64, 64, 1),
        'd': nn.Conv2d(63, 63, 3),
    }
    pairs = [(name, 'w') for name in layers]
    assert attention_overhead(list(layers), layers) > MAX_OVERHEAD
    split = split_groups(pairs, layers)
    assert [name for name, _ in split] == list(layers)
    assert dict(split)['a'] == dict(split)['c'] != dict(split)['b']
    for members in warehouses(split).values():
        assert attention_overhead(members, layers) <= MAX_OVERHEAD


def test_too_many_layers_of_one_small_shape_are_split_into_runs():
    layers = {f'{i}': nn.Conv2d(32, 32, 3) for i in range(40)}
    members = warehouses(split_groups([(name, 'w') for name in layers], layers))
    assert 1 < len(members) < 40
    assert [name for part in members.values() for name in part] == list(layers)
    assert all(attention_overhead(part, layers) <= MAX_OVERHEAD for part in members.values())

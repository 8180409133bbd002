"""KWModule: any registered module, its own class, its own arguments."""

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from mmkw.backbones import residual
from mmkw.layers import KWConv2d, PlanError
from mmkw.layers.attention import Attention
from mmkw.sharing import static_networks

pytest.importorskip('mmdet', reason='the modules are its')


@pytest.fixture(autouse=True)
def _mmdet():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def build(**config):
    return MODELS.build(dict(type='mmkw.KWModule', **config))


def test_arguments_of_the_static_module_may_stand_beside_it():
    """As they do where a config inherits them from the static one."""
    merged = build(module=dict(type='ResNet'), depth=18, base_channels=8, frozen_stages=1)
    nested = build(module=dict(type='ResNet', depth=18, base_channels=8, frozen_stages=1))
    assert type(merged).__name__ == 'ResNet'
    assert {n: p.requires_grad for n, p in merged.named_parameters()} == {
        n: p.requires_grad for n, p in nested.named_parameters()
    }
    both = build(module=dict(type='ResNet', depth=18, base_channels=8), depth=50)
    assert both.depth == 18


def test_it_is_kw_resnet_where_that_is_the_family():
    with torch.device('meta'):
        wrapped = build(module=dict(type='ResNet', depth=18), cell_num_ratio=2)
        own = MODELS.build(dict(type='mmkw.KWResNet', depth=18, cell_num_ratio=2))
    assert {k: v.shape for k, v in wrapped.state_dict().items()} == {
        k: v.shape for k, v in own.state_dict().items()
    }


def test_the_former_name():
    with torch.device('meta'):
        new = build(module=dict(type='ResNet'), depth=18, cell_num_ratio=2)
        old = dict(type='mmkw.KWBackbone', backbone=dict(type='ResNet'), depth=18, cell_num_ratio=2)
        old = MODELS.build(old)
    assert type(old) is type(new)
    assert {k: v.shape for k, v in old.state_dict().items()} == {
        k: v.shape for k, v in new.state_dict().items()
    }


def test_patterns_and_options():
    patterns = [dict(match=r'layer4\.\d\.conv2', warehouse='last', cell_num_ratio=2)]
    config = dict(type='ResNet', depth=18, base_channels=8)
    network = build(module=config, patterns=patterns, reduction=0.5)
    dynamic = [n for n, m in network.named_modules() if isinstance(m, KWConv2d)]
    assert dynamic == ['layer4.0.conv2', 'layer4.1.conv2']
    assert network.layer4[0].conv2.attention.fc1.out_features == 32
    with pytest.raises(PlanError, match="match='nothing' decides nothing"):
        build(module=config, patterns=[dict(match='nothing')])


@pytest.mark.parametrize(
    'static, kind', [(dict(norm_cfg=dict(type='SyncBN')), 'SyncBatchNorm'), ({}, 'BatchNorm1d')]
)
def test_the_norm_of_the_attentions_follows_the_module(static, kind):
    network = build(module=dict(type='ResNet', depth=18, base_channels=8, **static))
    norms = {type(m.norm1).__name__ for m in network.modules() if isinstance(m, Attention)}
    assert norms == {kind}
    swin = dict(type='SwinTransformer', embed_dims=24, num_heads=(1, 2, 3, 4))
    norms = {
        type(m.norm1).__name__ for m in build(module=swin).modules() if isinstance(m, Attention)
    }
    assert norms == {'LayerNorm'}


def test_a_neck_and_a_head():
    neck = build(module=dict(type='FPN', in_channels=[16, 32], out_channels=16, num_outs=3))
    outputs = neck([torch.randn(2, 16, 8, 8), torch.randn(2, 32, 4, 4)])
    assert [y.shape[-1] for y in outputs] == [8, 4, 2]
    towers = [dict(match=r'(cls|reg)_convs\.\d\.conv', warehouse=r'\1')]
    head = build(
        module=dict(type='RetinaHead', num_classes=3, in_channels=16, feat_channels=16),
        patterns=towers,
        train_cfg=None,
        test_cfg=None,
    )
    scores, boxes = head([torch.randn(2, 16, 8, 8), torch.randn(2, 16, 4, 4)])
    assert len(scores) == len(boxes) == 2
    assert len(head.warehouse_manager.weights) == 2


@pytest.mark.parametrize(
    'config, blocks',
    [
        (dict(type='ResNet', depth=18, base_channels=8), 8),
        (dict(type='SwinTransformer', embed_dims=24, num_heads=(1, 2, 3, 4), drop_path_rate=0), 12),
    ],
)
def test_activations_are_recomputed_within_the_one_backward_pass(config, blocks, monkeypatch):
    """Re-entrant passes would mark a shared warehouse ready once a block."""
    torch.manual_seed(0)
    network = build(module=config)
    torch.manual_seed(0)
    saving = build(module=config, with_cp=True)
    calls = []
    checkpoint = residual.checkpoint
    monkeypatch.setattr(
        residual, 'checkpoint', lambda *a, **k: calls.append(k) or checkpoint(*a, **k)
    )
    x = torch.randn(2, 3, 64, 64)
    for model in (network, saving):
        sum(y.square().mean() for y in model(x)).backward()
    assert calls == [dict(use_reentrant=False)] * blocks
    for (name, p), q in zip(network.named_parameters(), saving.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name, atol=1e-6, rtol=1e-4)


def test_the_static_twin_of_a_config_is_built_beside_it():
    config = dict(type='ResNet', depth=18, base_channels=8)
    with static_networks():
        static = build(module=config)
    assert not hasattr(static, 'warehouse_manager')
    assert hasattr(build(module=config), 'warehouse_manager')


def test_what_is_no_config_is_refused():
    with pytest.raises(TypeError, match=r"dict\(type='ResNet', depth=50\), got 'ResNet'"):
        build(module='ResNet')


@pytest.mark.parametrize('own', [True, False])
def test_a_network_without_plain_layers_says_what_it_has_instead(own):
    config = dict(depth=18, base_channels=8, conv_cfg=dict(type='ConvWS'))
    with pytest.raises(
        PlanError, match=r'no layer that could be dynamic: conv1 is a ConvWS2d.*conv_cfg'
    ):
        if own:
            MODELS.build(dict(type='mmkw.KWResNet', **config))
        else:
            build(module=dict(type='ResNet', **config))


@pytest.mark.parametrize('kind', ['mmkw.KWResNet', 'mmkw.ResNet', 'mmdet.ResNet'])
def test_images_may_be_named(kind):
    network = MODELS.build(dict(type=kind, depth=18, base_channels=8))
    network.eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert all(map(torch.equal, network(x=x), network(x)))
    if kind != 'mmdet.ResNet':
        with pytest.raises(ValueError, match='got an image of 2 x 32 pixels'):
            network(x=x[..., :2, :])


NETWORKS = {
    'mmkw.KWResNet': ('ResNet', dict(depth=18, base_channels=8)),
    'mmkw.KWMobileNetV2': ('MobileNetV2', dict(widen_factor=0.25)),
    'mmkw.KWConvNeXt': ('mmkw.ConvNeXt', dict(arch=dict(depths=[1] * 4, channels=[16] * 4))),
}


NORMS = [None, dict(type='GN', num_groups=2), dict(type='SyncBN')]


@pytest.mark.parametrize(
    'kind, norm_cfg',
    # The norms of a ConvNeXt are LayerNorms.
    [(kind, norm) for kind in NETWORKS for norm in NORMS if norm is None or 'ConvNeXt' not in kind],
)
@pytest.mark.parametrize('given', [None, dict(type='LN', eps=1e-3)])
def test_both_ways_to_a_network_give_it_the_same_norms(kind, norm_cfg, given):
    static, config = NETWORKS[kind]
    config = config if norm_cfg is None else dict(config, norm_cfg=norm_cfg)
    options = {} if given is None else dict(attention_norm_cfg=given)
    with torch.device('meta'):
        own = MODELS.build(dict(type=kind, **config, **options))
        wrapped = build(module=dict(type=static, **config), **options)
    norms = [
        {str(m.norm1) for m in network.modules() if isinstance(m, Attention)}
        for network in (own, wrapped)
    ]
    assert norms[0] == norms[1]
    if given is not None:
        assert all('LayerNorm' in norm and 'eps=0.001' in norm for norm in norms[0])

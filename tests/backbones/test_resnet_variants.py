"""Dilated, V1c, V1d and grouped ResNets against an independent slow network, in either library."""

import pytest
import torch
from mmengine.registry import DefaultScope
from published_oracle import Network, resnet

from mmkw.backbones import KWResNet, KWResNetV1c, KWResNetV1d
from mmkw.layers import set_temperature

OS8 = dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
# name: scope, ours, its arguments, those of the oracle
WITH_ORACLE = {
    'output stride 8': ('mmseg', KWResNet, dict(depth=50, **OS8), OS8),
    'V1c, contracted dilation': (
        'mmseg',
        KWResNetV1c,
        dict(depth=50, contract_dilation=True, **OS8),
        dict(deep=True, contract=True, **OS8),
    ),
    'V1c, basic blocks': ('mmseg', KWResNetV1c, dict(depth=18, **OS8), dict(deep=True, **OS8)),
    'V1d': ('mmdet', KWResNetV1d, dict(depth=50), dict(deep=True, pool=True)),
    'ResNeXt': (
        'mmdet',
        KWResNet,
        dict(depth=50, groups=4, base_width=16),
        dict(groups=4, group_width=16),
    ),
}


@pytest.mark.parametrize('name', WITH_ORACLE)
@pytest.mark.parametrize('tau', [0, 0.5, 1])
def test_features_equal_those_of_an_independent_network(name, tau):
    scope, kind, arguments, variant = WITH_ORACLE[name]
    pytest.importorskip(scope)
    with DefaultScope.overwrite_default_scope(scope):
        network = kind(base_channels=16, stem_channels=16, **arguments)
    network.eval()
    assert type(network).__module__.startswith(f'{scope}.')
    shapes = [tuple(weight.shape[:3]) for weight in network.warehouse_manager.weights]
    net = Network(' '.join(f'{n}x({out},{inner})' for n, out, inner in shapes), 1)
    x = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        expected = net.run(resnet(arguments['depth'], base=16, **variant), x, tau)
        missing, unexpected = network.load_state_dict(net.state, strict=False)
        assert not missing and not unexpected
        set_temperature(network, tau)
        for ours, theirs in zip(network(x), expected, strict=True):
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-4


MMSEG_ONLY = dict(multi_grid=(1, 2, 4), contract_dilation=True, **OS8)


@pytest.mark.parametrize(
    'kind, static', [('KWResNetV1c', 'ResNetV1c'), ('KWResNetV1d', 'ResNetV1d')]
)
def test_geometry_is_that_of_mmseg_s_network(kind, static):
    pytest.importorskip('mmseg')
    from mmengine.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    arguments = dict(depth=50, base_channels=8, stem_channels=8, **MMSEG_ONLY)
    with DefaultScope.overwrite_default_scope('mmseg'):
        twin = MODELS.build(dict(type=f'mmseg.{static}', **arguments))
        network = MODELS.build(dict(type=f'mmkw.KW{static}', **arguments))
    for name, layer in twin.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            ours = network.get_submodule(name)
            for part in ('stride', 'padding', 'dilation', 'groups'):
                assert getattr(ours, part) == getattr(layer, part), (name, part)
    x = torch.randn(1, 3, 45, 67)
    network.eval(), twin.eval()
    assert [o.shape for o in network(x)] == [o.shape for o in twin(x)]


def test_attentions_are_synchronised_where_the_network_is():
    pytest.importorskip('mmseg')
    with DefaultScope.overwrite_default_scope('mmseg'):
        network = KWResNet(18, base_channels=8, norm_cfg=dict(type='SyncBN', requires_grad=True))
        plain = KWResNet(18, base_channels=8)
    norm = 'layer2.0.conv1.attention.norm1'
    assert isinstance(network.get_submodule(norm), torch.nn.SyncBatchNorm)
    assert isinstance(plain.get_submodule(norm), torch.nn.BatchNorm1d)
    assert set(network.state_dict()) == set(plain.state_dict())

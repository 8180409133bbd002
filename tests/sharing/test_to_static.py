"""Back to the static network, where that computes the same."""

import copy
import pickle

import pytest
import torch
from torch import nn
from twin_networks import BACKBONES, HEADS, build, outputs

import mmkw
from mmkw.layers import KWConv2d, KWLinear, StandsForStatic
from mmkw.sharing import SharingPlan


@pytest.mark.parametrize('kind', [*BACKBONES, *HEADS])
def test_it_computes_the_same(kind):
    torch.manual_seed(0)
    static, dynamic = build(kind, False), build(kind, True)
    mmkw.set_temperature(dynamic, 1)
    dynamic.eval()
    with torch.no_grad():
        expected = outputs(kind, dynamic)
        again = mmkw.to_static(dynamic)
        found = outputs(kind, again)
    assert again is dynamic and not mmkw.is_converted(again)
    assert not any(isinstance(module, StandsForStatic) for module in again.modules())
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in static.state_dict().items()
    }
    # It is a static network in all: it loads, starts, copies and learns as one.
    again.load_state_dict(static.state_dict())
    again.init_weights()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(again)))
    names = {name for name, p in static.named_parameters() if p.requires_grad}
    assert {name for name, p in copied.named_parameters() if p.requires_grad} == names


@pytest.mark.parametrize('ratio', [0.5, 2])
def test_a_static_checkpoint_comes_back(ratio):
    static = nn.Module()
    static.a, static.b = nn.Conv2d(8, 8, 3), nn.Linear(8, 16)
    kept = copy.deepcopy(static.state_dict())
    plan = SharingPlan.make(
        [('a', 'one'), ('b', 'two')], cell_num_ratio=ratio, cell_inplane_ratio=0.5
    )
    network = mmkw.convert(static, plan, start_tau=1)
    network.load_state_dict(kept)
    found = mmkw.to_static(network).state_dict()
    if ratio > 1:
        assert all(torch.equal(found[name], value) for name, value in kept.items())
    else:
        # Half of the pieces have no cell.
        lost = (found['a.weight'] == 0).float().mean()
        assert 0.4 < lost < 0.6


def test_layers_alone():
    network = nn.Sequential(KWConv2d(4, 4, 3), nn.Sequential(KWLinear(4, 4)))
    mmkw.set_temperature(network, 1)
    x = torch.randn(2, 4, 6, 6)
    expected = network(x)
    torch.testing.assert_close(mmkw.to_static(network)(x), expected)
    assert type(network[0]) is nn.Conv2d and type(network[1][0]) is nn.Linear
    layer = KWConv2d(4, 4, 3)
    mmkw.set_temperature(layer, 1)
    torch.testing.assert_close(mmkw.to_static(layer)(x), layer(x))


def test_what_is_no_static_network():
    with pytest.raises(ValueError, match='Sequential has no dynamic layer'):
        mmkw.to_static(nn.Sequential(nn.Linear(2, 2)))
    network = nn.Sequential(KWLinear(4, 4), KWLinear(4, 4))
    mmkw.set_temperature(network[0], 1)
    mmkw.set_temperature(network[1], 0.5)
    with pytest.raises(ValueError, match=r'1\.attention has the temperature 0\.5'):
        mmkw.to_static(network)
    assert isinstance(network[0], KWLinear)


def test_it_can_be_converted_again():
    network = nn.Module()
    network.a = nn.Conv2d(8, 8, 3)
    plan = SharingPlan.make([('a', 'one')])
    mmkw.set_temperature(mmkw.convert(network, plan), 1)
    mmkw.convert(mmkw.to_static(network), plan)
    state = network.state_dict()
    network.load_state_dict(state)
    assert mmkw.is_converted(network) and isinstance(network.a, KWConv2d)


def test_a_network_without_values_is_refused_whole():
    with torch.device('meta'):
        network = mmkw.KWResNet(18, base_channels=8)
    mmkw.set_temperature(network, 1)
    with pytest.raises(ValueError, match=r'layer1\.0\.conv1 has no values in this process'):
        mmkw.to_static(network)
    assert mmkw.is_converted(network)

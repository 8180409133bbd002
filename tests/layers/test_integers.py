"""Cells stored as integers compute what cells with these values compute."""

import copy
import io
import math

import pytest
import torch
from conftest import exhaustively
from torch.nn.utils import parametrize, prune

import mmkw
from mmkw.deploy import export
from mmkw.layers import WarehouseManager
from mmkw.layers.integers import IntegerCells
from mmkw.ops import backend

LAYERS = {
    '1d': (mmkw.KWConv1d, dict(in_channels=12, out_channels=8, kernel_size=3), (9,)),
    '3x3': (mmkw.KWConv2d, dict(in_channels=16, out_channels=32, kernel_size=3), (9, 8)),
    '1x1 4x': (
        mmkw.KWConv2d,
        dict(in_channels=16, out_channels=16, kernel_size=1, cell_num_ratio=4),
        (5, 5),
    ),
    'whole cells': (
        mmkw.KWConv2d,
        dict(in_channels=8, out_channels=16, kernel_size=3, groups=8, cell_outplane_ratio=0.5),
        (7, 7),
    ),
    '3d': (mmkw.KWConv3d, dict(in_channels=6, out_channels=4, kernel_size=3), (5, 5, 5)),
    'linear': (mmkw.KWLinear, dict(in_features=24, out_features=10), None),
    'dyconv': (mmkw.DYConv2d, dict(in_channels=8, out_channels=8, kernel_size=3), (7, 7)),
    'odconv': (mmkw.ODConv2d, dict(in_channels=8, out_channels=8, kernel_size=3), (7, 7)),
}


def made(kind, batch=3):
    """A layer whose attentions tell images apart, and images."""
    layer_class, options, size = LAYERS[kind]
    layer = layer_class(**options).eval()
    for parameter in layer.attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    features = options.get('in_channels', options.get('in_features'))
    shape = (batch, 4, features) if size is None else (batch, features, *size)
    return layer, torch.randn(shape)


def with_stored_values(layer):
    """A copy whose cells are the values that the integers stand for."""
    copied, stored = copy.deepcopy(layer), IntegerCells()
    for module in copied.modules():
        if isinstance(module, WarehouseManager):
            for cells in module.weights:
                cells.data = stored(*stored.right_inverse(cells.data))
    return copied


@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'half first', 'autocast'])
@pytest.mark.parametrize('on', [True, False], ids=['compiled', 'PyTorch'])
@pytest.mark.parametrize('kind', exhaustively(LAYERS, ['1d', '3d', 'dyconv']))
def test_a_layer_computes_with_the_stored_values(kind, on, precision, monkeypatch):
    monkeypatch.setattr(backend, '_switched_on', on)
    layer, x = made(kind)
    exact = with_stored_values(layer)
    if precision == 'half first':
        layer, x = layer.bfloat16(), x.bfloat16()
        exact = with_stored_values(layer)
    assert mmkw.quantize_cells(layer) is layer
    if precision == 'bfloat16':
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=precision == 'autocast'):
        found, again = layer(x), layer(x)
    with torch.no_grad():
        expected = exact.double()(x.double())
    assert found.dtype == (torch.float32 if precision == 'float32' else torch.bfloat16)
    rounding = 1e-5 if precision == 'float32' else 0.02
    assert float((found - expected).norm()) <= rounding * float(expected.norm())
    assert found.equal(again)


@pytest.mark.skipif(backend.why_not_compiled() is not None, reason='no compiled kernels')
def test_compiled_kernels_read_the_integers(monkeypatch):
    """Cells are not computed from them, except where gradients are wanted."""
    layer, x = made('3x3')
    mmkw.quantize_cells(layer)
    made_of, whole = [], backend.mixing_of
    monkeypatch.setattr(
        backend, 'mixing_of', lambda *args: made_of.append(args[2].dtype) or whole(*args)
    )
    with torch.no_grad():
        layer(x)
        assert layer(x[:0]).shape == (0, 32, 7, 6)
    layer(x)
    # The bias alone learns.
    layer.attention.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.bias.grad is not None
    assert made_of == [torch.int8, torch.float32, torch.float32, torch.float32]
    with torch.no_grad(), pytest.raises(RuntimeError, match='type'):
        layer(x.bfloat16())


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_rounded_to_the_nearest(dtype):
    """No sign flips where rounding takes the largest magnitude beyond the largest integer."""
    sizes = torch.logspace(-6, 3, 200).view(-1, 1, 1, 1, 1)
    cells = (torch.randn(200, 4, 3, 1, 1) * sizes).to(dtype)
    cells[2] = 0
    stored = IntegerCells()
    integers, magnitudes = stored.right_inverse(cells)
    assert integers.dtype == torch.int8 and magnitudes.dtype == dtype
    assert magnitudes.shape == (200, 1, 1, 1, 1)
    largest = integers.flatten(1).abs().amax(1).tolist()
    assert largest == [127] * 2 + [0] + [127] * 197
    found = stored(integers, magnitudes)
    assert found.dtype == dtype
    # A half of the last digit of the integers, and of that of the precision.
    info = torch.finfo(dtype)
    limit = magnitudes.double() * (0.501 / 127 + info.eps) + info.smallest_normal * info.eps
    assert bool(((found.double() - cells.double()).abs() <= limit).all())


def test_attentions_go_on_learning_and_cells_do_not():
    layer, x = made('3x3')
    exact = with_stored_values(layer)
    mmkw.quantize_cells(layer)
    for network in (layer, exact):
        network(x).square().mean().backward()
    own, expected = (dict(network.named_parameters()) for network in (layer, exact))
    assert own.keys() == {name for name in expected if 'warehouse_manager' not in name}
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, expected[name].grad)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 16, 3)
        self.second = torch.nn.Conv2d(16, 16, 3, groups=4)

    def forward(self, x):
        return self.second(self.first(x).relu())


def network(seed=0):
    torch.manual_seed(seed)
    plan = mmkw.SharingPlan.make([('first', 'a'), ('second', 'b')])
    return mmkw.convert(Network(), plan).eval()


def test_a_network_is_saved_loaded_and_copied():
    x, first, second = torch.randn(2, 3, 9, 9), network(0), network(1)
    plain = copy.deepcopy(first.state_dict())
    for one in (first, second):
        mmkw.quantize_cells(one)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        expected = first(x)
        assert second(x).equal(expected) and copy.deepcopy(first)(x).equal(expected)
    stored = [value for value in first.state_dict().values() if value.dtype == torch.int8]
    cells = [value for key, value in plain.items() if 'warehouse_manager' in key]
    assert sum(map(torch.numel, stored)) == sum(map(torch.numel, cells)) > 0
    for state in (plain, Network().state_dict()):
        with pytest.raises(RuntimeError, match=r'Load it before mmkw\.quantize_cells'):
            first.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Call mmkw\.quantize_cells on the network before'):
        network().load_state_dict(second.state_dict())
    for part, spoil in (('original0', torch.Tensor.float), ('original1', lambda v: v * math.nan)):
        damaged = second.state_dict()
        (name,) = (key for key in damaged if key.endswith(f'.0.{part}'))
        damaged[name] = spoil(damaged[name])
        with pytest.raises(RuntimeError, match=name):
            first.load_state_dict(damaged)


def test_a_layer_of_its_own_is_not_loaded_in_part():
    """MMEngine loads what fits, and warns."""
    (layer, _), (other, _) = made('3x3'), made('3x3')
    plain, static = other.state_dict(), torch.nn.Conv2d(16, 32, 3).state_dict()
    mmkw.quantize_cells(layer)
    before = copy.deepcopy(layer.state_dict())
    for state in (plain, static):
        with pytest.raises(RuntimeError, match=r'Load it before mmkw\.quantize_cells'):
            layer.load_state_dict(state, strict=False)
    assert all(value.equal(before[name]) for name, value in layer.state_dict().items())


def test_it_is_compiled():
    layer, x = made('3x3')
    mmkw.quantize_cells(layer)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend='eager')(x), layer(x))


def test_the_static_twin_is_that_of_the_stored_values():
    """At temperature 1 a kernel is its cells."""
    first, second = network(), with_stored_values(network())
    mmkw.quantize_cells(first)
    twins = []
    for one in (first, second):
        mmkw.set_temperature(one, 1)
        twins.append(mmkw.to_static(one).state_dict())
    for name, value in twins[0].items():
        torch.testing.assert_close(value, twins[1][name], rtol=1e-6, atol=0)


@pytest.mark.filterwarnings('ignore')
def test_an_exported_network_computes_the_same(tmp_path):
    one, example = mmkw.quantize_cells(network()), torch.randn(1, 3, 16, 16)
    parity = export(one, example, tmp_path / 'network.pt2')
    assert max(found.difference for found in parity) < 1e-5


def pruned():
    one = network()
    prune.l1_unstructured(one.warehouse_manager.weights, '0', 0.5)
    return one


def not_finite():
    one = network()
    one.warehouse_manager.weights[0].data[1] = float('nan')
    return one


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: torch.nn.Conv2d(3, 4, 3), 'got a Conv2d without. See mmkw.convert'),
        (lambda: None, 'got a NoneType without'),
        (lambda: mmkw.quantize_cells(network()), 'quantized already'),
        (pruned, 'cells that are pruned'),
        (not_finite, 'not finite, in warehouse 0'),
        (lambda: network().to('meta'), 'on the meta device'),
    ],
    ids=['static', 'nothing', 'twice', 'pruned', 'not finite', 'meta'],
)
def test_what_cannot_be_quantized_stays_as_it_was(make, message):
    one = make()
    state = {} if one is None else copy.deepcopy(one.state_dict())
    with pytest.raises(ValueError, match=message):
        mmkw.quantize_cells(one)
    if one is not None:
        found = one.state_dict()
        assert found.keys() == state.keys()
        for name, value in state.items():
            assert value.is_meta or found[name].equal(value) or 'weights' in name
            assert found[name].dtype == value.dtype


def test_both_parts_of_a_model_are_quantized_or_none():
    two = torch.nn.ModuleList([network(), not_finite()])
    with pytest.raises(ValueError, match='not finite'):
        mmkw.quantize_cells(two)
    assert not parametrize.is_parametrized(two[0].warehouse_manager.weights)
    assert two[0].warehouse_manager.weights.is_plain

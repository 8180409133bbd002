"""The whole operator equals its definition on every path, in its values and all its gradients."""

import copy
import math
import sys
from functools import partial

import pytest
import torch
from command_util import run
from conftest import exhaustively
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmkw.layers import KWConv1d, KWConv2d, KWLinear
from mmkw.ops import (
    SampleConv,
    SampleLinear,
    apply_mixed,
    backend,
    dynamic,
    gradient,
    mix_cells,
    mixing,
)
from mmkw.ops.compiled import MISSING, CompiledMixing, multiplies_bfloat16, pack_cells
from mmkw.ops.kernels import is_regular
from mmkw.sharing import SharingPlan, convert

needs_native = pytest.mark.skipif(MISSING is not None, reason=f'compiled kernels: {MISSING}')
PATHS = [pytest.param('native', marks=needs_native), 'torch']


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Forces one of the two ways to mix, and tells which."""
    monkeypatch.setattr(backend, '_switched_on', request.param == 'native')
    return request.param


@pytest.fixture(params=['whole', 'kept', 'parts', 'single images'])
def pieces(request, monkeypatch):
    """What is done at a time: everything; a block of images in parts; one image.

    Or the kernels are kept for the backward pass.
    """
    if request.param == 'kept':
        monkeypatch.setattr(mixing, 'KEPT_CELLS', 1)
    elif request.param != 'whole':
        monkeypatch.setitem(mixing.PART_BYTES, 'cpu', 1)
        monkeypatch.setattr(gradient.CellSum, 'WAITING_BYTES', 1)
    if request.param == 'single images':
        monkeypatch.setitem(mixing.BLOCK_BYTES, 'cpu', 1)
    return request.param


# grid (*spatial, out, in), cell shape, SampleConv's arguments, image size
CASES = {
    '3x3': ((3, 3, 1, 2), (8, 4, 1, 1), ((1, 1), (1, 1), (1, 1)), (6, 5)),
    '3x3 in blocks': ((3, 3, 2, 1), (5, 37, 1, 1), ((2, 2), (1, 1), (1, 1)), (7, 6)),
    '1x1': ((1, 1, 2, 3), (4, 40, 1, 1), ((1, 1), (0, 0), (1, 1)), (4, 5)),
    '1x1 with stride': ((1, 1, 1, 2), (64, 32, 1, 1), ((2, 2), (0, 0), (1, 1)), (5, 6)),
    '1x1 padded': ((1, 1, 1, 1), (3, 5, 1, 1), ((1, 1), (1, 1), (1, 1)), (3, 3)),
    'dilated': ((3, 3, 1, 1), (6, 6, 1, 1), ((1, 1), (2, 2), (2, 2)), (6, 6)),
    'grouped': ((3, 3, 2, 1), (6, 3, 1, 1), ((1, 1), (1, 1), (1, 1), 2), (5, 5)),
    'depthwise': ((7, 7, 1, 1), (9, 1, 1, 1), ((1, 1), (3, 3), (1, 1), 9), (8, 8)),
    'whole cells': ((1, 1, 2, 2), (3, 20, 3, 3), ((1, 1), (1, 1), (1, 1)), (5, 5)),
    '2x4': ((2, 4, 1, 1), (8, 70, 1, 1), ((1, 1), (0, 0), (1, 1)), (5, 6)),
    '1d': ((3, 1, 2), (4, 300, 1), ((1,), (1,), (1,)), (6,)),
    '3d': ((2, 2, 2, 1, 1), (4, 6, 1, 1, 1), ((1, 1, 1), (0, 0, 0), (1, 1, 1)), (3, 3, 3)),
    'spatial cells of 2': ((2, 1, 1, 1), (3, 4, 2, 3), ((1, 1), (0, 0), (1, 1)), (6, 6)),
    'linear': ((1, 2, 1), (30, 24, 1), None, (3, 5)),
    'linear without tokens': ((1, 1, 2), (6, 10, 1), None, ()),
}


def operands(case, batch, num_cells, dtype=torch.double):
    grid, cell_shape, arguments, size = CASES[case]
    sample_map = SampleLinear() if arguments is None else SampleConv(*arguments)
    groups = getattr(sample_map, 'groups', 1)
    channels = grid[-1] * cell_shape[1] * groups
    shape = (batch, *size, channels) if arguments is None else (batch, channels, *size)
    tensors = [
        torch.randn(shape),
        torch.randn(batch, math.prod(grid), num_cells),
        torch.randn(num_cells, *cell_shape),
        torch.randn(grid[-2] * cell_shape[0]),
    ]
    return [t.to(dtype).requires_grad_() for t in tensors], grid, sample_map


def definition(x, attention, cells, grid, sample_map, bias):
    return sample_map(x, mix_cells(attention, cells, grid), bias)


def with_gradients(function, tensors, grid, sample_map):
    x, attention, cells, bias = tensors
    y = function(x, attention, cells, grid, sample_map, bias)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), tensors)]


def assert_close(results, expected, tolerance):
    for result, value in zip(results, expected):
        scale = value.abs().max().item() + 1
        torch.testing.assert_close(result.double(), value, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('case', CASES)
def test_equals_its_definition(path, case, batch, pieces):
    tensors, grid, sample_map = operands(case, batch, num_cells=11)
    expected = with_gradients(definition, tensors, grid, sample_map)
    assert_close(with_gradients(apply_mixed, tensors, grid, sample_map), expected, 1e-12)
    single = [t.detach().float().requires_grad_() for t in tensors]
    assert_close(with_gradients(apply_mixed, single, grid, sample_map), expected, 1e-5)
    with torch.no_grad():
        x, attention, cells, bias = single
        y = apply_mixed(x, attention, cells, grid, sample_map, bias)
    assert_close([y], expected, 1e-5)


@pytest.fixture(params=[1, 3], ids=['one thread', 'three threads'])
def threads(request):
    """Of PyTorch, whatever the environment says."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_native
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    # The number of threads is the same for all examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 3),
    cells=st.integers(1, 20) | st.integers(190, 200),
    blocks=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 40) | st.sampled_from([16, 64, 256])),
    taps=st.sampled_from([(1, 1), (2, 1), (3, 3), (5, 1)]),
    whole=st.booleans(),
)
def test_compiled_kernels_equal_pytorch(threads, batch, cells, blocks, channels, taps, whole):
    """Blocks, lanes and tails of all lengths; few mixtures and many, few cells and many."""
    spatial, size = ((1, 1), taps) if whole else (taps, (1, 1))
    grid = (*spatial, *blocks)
    attention = torch.randn(batch, math.prod(grid), cells)
    store = torch.randn(cells, *channels, *size)
    assert backend.is_compiled(attention, store) and is_regular(store, grid)
    compiled = CompiledMixing(store, grid, store.dtype)
    kernels = compiled.kernels(attention)
    gradients = list(torch.randn_like(kernels))
    total = gradient.CellSum(compiled.cells)
    for _ in range(2):
        grad_attention, parts = compiled.backward([gradients], attention, total, None, True)
    [(_, mixed)] = parts
    results = [kernels, mixed, grad_attention, total.total() / 2]
    check_half(compiled, attention, kernels, gradients)
    check_packed(compiled, attention, gradients)
    check_integers(compiled, attention)

    attention, store = (t.double().requires_grad_() for t in (attention, store))
    slow = mix_cells(attention, store, grid)
    slow_gradients = torch.autograd.grad(slow, (attention, store), torch.stack(gradients).double())
    assert_close(results, [slow, slow, *slow_gradients], 1e-5)


def check_half(compiled, attention, kernels, gradients):
    """What is stored in bfloat16 is read as it is, and rounded once when it is written.

    With many mixtures matrix instructions, where there are any, read cells in bfloat16.
    """
    half, few = torch.bfloat16, attention.shape[:2].numel() < 12
    into_half = CompiledMixing(compiled.cells, compiled.grid, half)
    mixed = into_half.kernels(attention)
    assert not few or mixed.equal(kernels.to(half))
    assert float((mixed - kernels).norm()) <= 0.01 * float(kernels.norm())
    rounded = [one.to(half) for one in gradients]
    found = []
    for one, grads in ((into_half, rounded), (compiled, [grad.float() for grad in rounded])):
        total = gradient.CellSum(one.cells)
        grad_attention, [(_, mixed)] = one.backward([grads], attention, total, None, True)
        found.append([grad_attention, total.total(), mixed.to(half)])
    assert all(map(torch.equal, *found))
    stored = compiled.cells.to(half)
    mixed, expected = (
        CompiledMixing(cells, compiled.grid, torch.float32).kernels(attention)
        for cells in (stored, stored.float())
    )
    assert not few or mixed.equal(expected)
    assert float((mixed - expected).norm()) <= 1e-5 * float(expected.norm())


def check_packed(compiled, attention, gradients):
    """Packed cells are rounded, as the gradients are; besides them the attention alone is."""
    if not multiplies_bfloat16(compiled.cells):
        return
    half, grid = torch.bfloat16, compiled.grid
    packed = CompiledMixing(compiled.cells, grid, half, lambda: pack_cells(compiled.cells))
    kernels, total = packed.kernels(attention), gradient.CellSum(packed.cells)
    gradients = [one.to(half) for one in gradients]
    for _ in range(2):
        grad_attention, parts = packed.backward([gradients], attention, total, None, True)
    [(_, again)] = parts
    assert again.dtype == half and again.equal(kernels)

    operands = [tensor.double().requires_grad_() for tensor in (attention, compiled.cells.to(half))]
    right = mix_cells(*operands, grid)
    below = torch.autograd.grad(right, operands, torch.stack(gradients).double())
    found = kernels, grad_attention, total.total() / 2
    for one, value, error in zip(found, (right.detach(), *below), (5e-3, 1e-5, 4e-3)):
        assert float((one - value).norm()) <= error * float(value.norm())


@needs_native
def test_a_mixture_of_hardly_more_than_one_cell_is_not_rounded_as_a_whole():
    """The largest weight of a mixture is exact, whatever its size and sign."""
    cells = torch.randn(5, 8, 8, 1, 1).bfloat16()
    for largest in (1.001, -0.9991, 3e-5, -7e9, 0.0):
        attention = torch.zeros(1, 9, 5)
        attention[:, :, 3] = largest
        kernels = CompiledMixing(cells, (3, 3, 1, 1), torch.bfloat16).kernels(attention)
        expected = (largest * cells[3].float()).to(torch.bfloat16)
        assert kernels.equal(expected.expand(1, 8, 8, 3, 3))


def check_integers(compiled, attention):
    """Integers are read as they are, by matrix instructions, too, which hold them exactly."""
    integers = torch.randint(-127, 128, compiled.cells.shape, dtype=torch.int8)
    exact = mix_cells(attention.double(), integers.double(), compiled.grid)
    few = attention.shape[:2].numel() < 12
    for dtype in (torch.float32, torch.bfloat16):
        found, floats = (
            CompiledMixing(cells, compiled.grid, dtype).kernels(attention)
            for cells in (integers, integers.float())
        )
        assert found.dtype == dtype and (not few or found.equal(floats))
        rounding = 1e-5 if dtype == torch.float32 else 4e-3
        assert float((found - exact).norm()) <= rounding * float(exact.norm())


@needs_native
def test_what_is_no_number_stays_so_in_half_precision():
    values = [
        math.nan,
        math.inf,
        -math.inf,
        3.4e38,
        -3.4e38,
        0.0,
        1e-40,
        1.0,
        1 + 2**-8,
        1 + 3 * 2**-8,
    ]
    cells = torch.tensor(values * 4).view(1, 40, 1, 1, 1)
    kernels = CompiledMixing(cells, (1, 1, 1, 1), torch.bfloat16).kernels(torch.ones(1, 1, 1))
    expected = cells.bfloat16()
    torch.testing.assert_close(kernels, expected, rtol=0, atol=0, equal_nan=True)


CAPABILITIES = ['default', 'avx2', 'avx512']


@needs_native
@pytest.mark.parametrize('capability', exhaustively(CAPABILITIES, ['avx2']))
def test_compiled_kernels_of_every_processor_equal_pytorch(capability, root):
    """PyTorch's variable chooses among the generations of x86 that the machine knows."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    if best not in CAPABILITIES[CAPABILITIES.index(capability) + 1 :]:
        # Its own generation is what the test above has.
        pytest.skip(f'this processor has {best}')
    name = 'test_compiled_kernels_equal_pytorch[three threads]'
    command = [sys.executable, '-m', 'pytest', f'{__file__}::{name}']
    result, output = run(root, *command, ATEN_CPU_CAPABILITY=capability)
    assert result.returncode == 0, output
    assert '1 passed' in output


def test_the_choice_is_made_once_for_a_call(monkeypatch):
    made, whole = [], backend.mixing_of
    monkeypatch.setattr(backend, 'mixing_of', lambda *args: made.append(whole(*args)) or made[-1])
    KWConv2d(4, 4, 3)(torch.randn(2, 4, 5, 5)).sum().backward()
    assert len(made) == 1


@needs_native
def test_the_compiled_kernels_are_chosen_where_they_serve(monkeypatch):
    x, attention, cells = torch.randn(1, 4, 5, 5), torch.randn(1, 9, 9), torch.randn(9, 4, 4, 1, 1)
    grid = (3, 3, 1, 1)

    def kind(attention, cells, learning=True):
        sample_map = SampleConv((1, 1), (1, 1), (1, 1))
        settings = (grid, sample_map, cells.dtype)
        return type(backend.mixing_of(x, attention, cells, *settings, learning)(cells))

    assert kind(attention, cells) is CompiledMixing
    assert kind(attention.double(), cells.double()) is mixing.Mixing
    half = attention.bfloat16(), cells.bfloat16()
    assert kind(*half, learning=False) is CompiledMixing
    assert kind(attention, cells.to(torch.int8), learning=False) is CompiledMixing
    assert kind(*half) is kind(attention.half(), cells.half(), learning=False) is mixing.Mixing
    assert kind(attention, cells.view(9, 4, 2, 1, 2)) is mixing.Mixing
    monkeypatch.setattr(backend, '_switched_on', False)
    assert kind(attention, cells) is mixing.Mixing
    assert 'switched off' in backend.why_not_compiled()


@needs_native
@pytest.mark.parametrize('batch', [1, 8])
def test_compiled_kernels_give_the_same_bits_every_time(threads, batch):
    """Whichever thread works on which columns; a resumed training depends on it."""
    torch.manual_seed(0)
    attention, cells = torch.randn(batch, 9, 24), torch.randn(24, 128, 128, 1, 1)
    gradients = list(torch.randn(batch, 128, 128, 3, 3))
    found = set()
    for _ in range(30):
        compiled = CompiledMixing(cells, (3, 3, 1, 1), cells.dtype)
        total = gradient.CellSum(compiled.cells)
        result, parts = compiled.backward([gradients], attention, total, None, True)
        [(_, mixed)] = parts
        tensors = (result, mixed, total.total())
        found.add(b''.join(tensor.numpy().tobytes() for tensor in tensors))
    assert len(found) == 1


@needs_native
def test_compiled_kernels_refuse_operands_that_do_not_fit():
    with pytest.raises(RuntimeError, match=r'does not fit grid \[3, 3, 1, 1\]'):
        torch.ops.mmkw.mix_cells(torch.randn(1, 8, 9), torch.randn(9, 4, 4, 1, 1), (3, 3, 1, 1))


@pytest.mark.parametrize('case', ['3x3', '1x1 with stride', 'depthwise', 'linear'])
def test_second_derivatives(case):
    tensors, grid, sample_map = operands(case, 2, num_cells=3)
    tensors = [t.detach()[..., :2].requires_grad_() if t.dim() == 1 else t for t in tensors]
    x, attention, cells, _ = tensors

    def run(x, attention, cells):
        return apply_mixed(x, attention, cells, grid, sample_map)

    assert torch.autograd.gradgradcheck(run, (x, attention, cells), fast_mode=True, atol=1e-6)


class Chain(nn.Module):
    """Three layers of one warehouse and one of another, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 1)
        self.c = nn.Conv2d(8, 16, 3, padding=1)
        self.d = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(self.a(x).tanh()).tanh()).tanh()).tanh())


def chain():
    plan = [('a', 'body'), ('b', 'body'), ('c', 'body'), ('d', 'head')]
    return convert(Chain(), SharingPlan.make(plan, cell_num_ratio=2), dict(type='LN'))


def gradients(network, x):
    network.zero_grad()
    network(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def slow_gradients(network, x):
    """Of the definition, in double precision."""
    network = copy.deepcopy(network).double()
    patch = pytest.MonkeyPatch()
    patch.setattr(backend, 'mixing_of', lambda *_: None)
    try:
        return gradients(network, x.double())
    finally:
        patch.undo()


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item() + 1e-3
        torch.testing.assert_close(found[name].double(), value, atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize('batch', [1, 4])
def test_layers_of_a_warehouse_add_up(path, batch, pieces):
    network, x = chain(), torch.randn(batch, 8, 6, 6)
    assert_same_gradients(gradients(network, x), slow_gradients(network, x))
    # A second pass starts from nothing.
    assert_same_gradients(gradients(network, x), slow_gradients(network, x))


def test_gradients_accumulate_over_backward_passes():
    network = chain()
    x, z = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
    expected = [slow_gradients(network, image) for image in (x, z)]
    first, second = network(x).square().sum(), network(z).square().sum()
    network.zero_grad()
    second.backward()
    first.backward(retain_graph=True)
    first.backward()
    found = {n: p.grad for n, p in network.named_parameters()}
    twice = {n: 2 * expected[0][n] + expected[1][n] for n in found}
    assert_same_gradients(found, twice)


def test_a_backward_pass_that_stops_early_leaves_nothing():
    network = chain()
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    loss = network(x).square().sum()
    (to_image,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert to_image.abs().sum() > 0
    network.zero_grad()
    loss.backward()
    found = {n: p.grad for n, p in network.named_parameters()}
    assert_same_gradients(found, slow_gradients(network, x.detach()))


def test_the_sum_is_handed_over_without_a_copy(monkeypatch):
    sums = []
    total = gradient.CellSum.total
    monkeypatch.setattr(
        gradient.CellSum, 'total', lambda self: sums.append(total(self).data_ptr()) or total(self)
    )
    network = chain()
    gradients_of = network(torch.randn(2, 8, 6, 6)).sum()
    gradients_of.backward()
    assert {w.grad.data_ptr() for w in network.warehouse_manager.weights} == set(sums)


@pytest.mark.parametrize(
    'layer, shape',
    [
        (KWConv2d(4, 6, 1), (2, 4, 5, 5)),
        (KWConv2d(4, 4, 3, groups=4, padding=1), (2, 4, 5, 5)),
        (KWConv2d(4, 6, 3), (2, 4, 5, 5)),
        (KWConv2d(4, 6, 3), (1, 4, 5, 5)),
        (KWConv2d(4, 6, 1), (2, 4, 5, 5)),
        (KWConv1d(4, 6, 1), (2, 4, 5)),
        (KWLinear(4, 6), (2, 5, 4)),
    ],
)
def test_results_may_be_changed_in_place(layer, shape):
    """As activations do that follow a layer."""
    plain = torch.randn(shape)
    layer.eval()
    for x in (plain, plain.movedim(1, -1).contiguous().movedim(-1, 1)):
        (expected,) = torch.autograd.grad(layer(x).relu().square().sum(), layer.cells)
        (found,) = torch.autograd.grad(layer(x).relu_().square().sum(), layer.cells)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('case', CASES)
def test_gradients_of_images_may_be_added_to_in_place(case):
    """Autograd does so with what the attention adds, but not with views."""
    tensors, grid, sample_map = operands(case, 2, 5, torch.float)
    if tensors[0].dim() == 4:
        tensors[0] = tensors[0].detach().contiguous(memory_format=torch.channels_last)
        tensors[0].requires_grad_()
    y = apply_mixed(*tensors[:3], grid, sample_map, tensors[3])
    (grad,) = torch.autograd.grad(y.sum(), tensors[0])
    assert not grad._is_view() and not y._is_view()


def test_no_kernel_of_few_cells_is_kept_for_the_backward_pass():
    layer = KWConv2d(64, 64, 3, bias=False)
    x, kept = torch.randn(8, 64, 4, 4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, id):
        layer(x)
    assert max(kept) <= max(x.numel(), layer.cells.numel()) < 8 * 64 * 64 * 9


def test_kernels_of_many_cells_are_kept_by_their_shapes(path, monkeypatch):
    """Those of the first images, in every layer and every forward pass alike."""
    network, x = chain(), torch.randn(4, 8, 6, 6)
    monkeypatch.setattr(mixing, 'KEPT_CELLS', 1)
    # An image at a time.
    monkeypatch.setitem(mixing.BLOCK_BYTES, 'cpu', 1)
    body, head = network.warehouse_manager.weights
    monkeypatch.setitem(mixing.KEPT_BYTES, 'cpu', 4 * 2 * body.numel())
    in_head = min(2 * body.numel() // head.numel(), 4)
    kernels = {
        (1, 8, 8, 3, 3): 4,
        (1, 8, 8, 1, 1): 2,
        (1, 16, 8, 3, 3): 2,
        (1, 4, 16, 1, 1): in_head,
    }
    for _ in range(2):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, shapes=shapes: shapes.append(tuple(tensor.shape)) or tensor,
            lambda tensor: tensor,
        ):
            loss = network(x).square().sum()
        assert {shape: shapes.count(shape) for shape in kernels} == kernels
        network.zero_grad()
        loss.backward()
        found = {n: p.grad.clone() for n, p in network.named_parameters()}
        assert_same_gradients(found, slow_gradients(network, x))


@pytest.mark.parametrize('learns', [False, True])
def test_kernels_are_mixed_again_for_the_images_alone(path, learns, monkeypatch):
    layer = KWConv2d(4, 4, 3)
    x = torch.randn(2, 4, 5, 5, requires_grad=learns)
    y = layer(x)
    mixed = []
    if path == 'native':
        memory = CompiledMixing._memory
        monkeypatch.setattr(
            CompiledMixing, '_memory', lambda *args: mixed.append(1) or memory(*args)
        )
    else:
        assemble = mixing.assemble
        monkeypatch.setattr(mixing, 'assemble', lambda *args: mixed.append(1) or assemble(*args))
    y.sum().backward()
    assert bool(mixed) == learns


def test_cells_changed_before_the_backward_pass_are_refused():
    layer = KWConv2d(4, 4, 3)
    y = layer(torch.randn(2, 4, 5, 5)).sum()
    with torch.no_grad():
        layer.cells.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.backward()


def test_freezing_and_thawing_is_seen():
    layer, x = KWConv2d(4, 4, 3), torch.randn(2, 4, 5, 5)
    for needs in (True, False, True):
        layer.cells.requires_grad_(needs)
        layer.zero_grad()
        layer(x).sum().backward()
        assert (layer.cells.grad is not None) == needs
        assert layer.attention.fc2.weight.grad.abs().sum() > 0
    layer.attention.requires_grad_(False)
    layer.zero_grad()
    layer(x).sum().backward()
    assert layer.cells.grad.abs().sum() > 0 and layer.attention.fc2.weight.grad is None


def test_a_copy_made_between_the_passes_is_independent():
    network, x = chain(), torch.randn(2, 8, 6, 6)
    loss = network(x).square().sum()
    twin = copy.deepcopy(network)
    network.zero_grad()
    loss.backward()
    found = {n: p.grad for n, p in network.named_parameters()}
    assert_same_gradients(found, slow_gradients(network, x))
    assert_same_gradients(gradients(twin, x), slow_gradients(network, x))


def test_function_transformations():
    layer = KWConv2d(4, 4, 3, attention_norm_cfg=dict(type='LN')).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.double, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    found = torch.func.grad(lambda image: layer(image).square().sum())(x.detach())
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(x)
    _, slope = torch.func.jvp(
        lambda image: layer(image).square().sum(), (x.detach(),), (direction,)
    )
    torch.testing.assert_close(slope, (expected * direction).sum())


@pytest.mark.parametrize('kind, arguments', [(KWConv2d, [3]), (KWConv2d, [1]), (KWLinear, [])])
@pytest.mark.parametrize('batch', [1, 2])
def test_compiled_in_one_graph(path, kind, arguments, batch):
    layer = kind(8, 8, *arguments).eval()
    x = torch.randn(batch, 5, 8) if isinstance(layer, KWLinear) else torch.randn(batch, 8, 5, 5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
        layer.cells.mul_(2)
        torch.testing.assert_close(compiled(x), layer(x))


def test_compiled_training_step():
    network, x = chain(), torch.randn(2, 8, 6, 6)
    expected = slow_gradients(network, x)
    network.zero_grad()
    torch._dynamo.reset()
    torch.compile(network, backend='aot_eager')(x).square().sum().backward()
    found = {n: p.grad for n, p in network.named_parameters()}
    assert_same_gradients(found, expected)


def test_exported_for_any_batch_with_pytorch_operators_only():
    network = chain().eval()
    batch = {0: torch.export.Dim('batch', min=2, max=64)}
    program = torch.export.export(network, (torch.randn(3, 8, 6, 6),), dynamic_shapes=(batch,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert targets and not [target for target in targets if 'mmkw' in target]
    for size in (2, 5):
        x = torch.randn(size, 8, 6, 6)
        torch.testing.assert_close(program.module()(x), network(x), atol=1e-5, rtol=1e-4)


def test_autocast_keeps_gradients_in_full_precision():
    network, x = chain(), torch.randn(2, 8, 6, 6)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = network(x).float().square().sum()
    loss.backward()
    for name, expected in slow_gradients(network, x).items():
        found = dict(network.named_parameters())[name].grad
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.double(), expected, atol=0.1 * expected.abs().max().item() + 1e-2, rtol=0
        )


def learned_in_half(function, tensors, grid, sample_map):
    """The output under autocast, and the gradients."""
    x, attention, cells, bias = tensors
    with torch.autocast('cpu', torch.bfloat16):
        y = function(x, attention, cells, grid, sample_map, bias)
    weights = torch.linspace(-1, 2, y.numel()).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), tensors)]


def rounded_definition(x, attention, cells, grid, sample_map, bias):
    """What autocast would make of the definition: it rounds all operands."""
    half = torch.bfloat16
    kernels = mix_cells(attention.to(half), cells.to(half), grid)
    return sample_map(x.to(half), kernels, bias.to(half))


# Cells of as many values as vectors hold, and others.
@pytest.mark.parametrize('case', ['3x3', '1x1', '1x1 with stride', 'linear'])
def test_under_autocast_gradients_are_as_precise_as_of_the_definition(path, case, pieces):
    tensors, grid, sample_map = operands(case, 3, num_cells=11)
    exact = with_gradients(definition, tensors, grid, sample_map)
    single = [t.detach().float().requires_grad_() for t in tensors]
    found, plain = (
        learned_in_half(function, single, grid, sample_map)
        for function in (apply_mixed, rounded_definition)
    )
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        errors = [float((one - right).norm() / right.norm()) for one in (ours, theirs)]
        assert errors[0] <= 1.1 * errors[1] + 1e-3, errors


@needs_native
def test_cells_are_packed_once_for_all_layers_until_they_change(monkeypatch):
    cells = torch.randn(6, 8, 8, 1, 1, requires_grad=True)
    if not multiplies_bfloat16(cells):
        pytest.skip('this processor does not multiply in bfloat16')
    taken = []
    monkeypatch.setattr(
        dynamic, 'pack_cells', lambda cells: taken.append(pack_cells(cells)) or taken[-1]
    )
    sample_maps = [SampleConv((1, 1), (0, 0), (1, 1)) for _ in range(2)]

    def network(x):
        attention = torch.linspace(-1, 1, 12).view(2, 1, 6)
        with torch.autocast('cpu', torch.bfloat16):
            for sample_map in sample_maps:
                x = apply_mixed(x, attention, cells, (1, 1, 1, 1), sample_map)
        return x

    x = torch.randn(2, 8, 3, 3)
    before = network(x)
    with torch.no_grad():
        cells += 1
    # The graph of the old cells still lives.
    after = network(x)
    for panels, rounded in zip(taken, (cells - 1, cells), strict=True):
        assert panels[0, :, :64].equal(rounded.flatten(1).bfloat16())
    after.sum().backward()
    assert len(taken) == 2
    # Packed cells go with the gradient, whether the graph does or not.
    assert gradient.Token.of(cells)._packing._made is None
    # What the layers of the old graphs hold goes with them.
    del before, after
    assert not gradient._tokens


def fused(cells):
    torch.optim.AdamW([cells], lr=0.5, fused=True).step()


def by_hand(cells):
    cells.data -= 0.5 * cells.grad.sign()


def exchanged(cells):
    cells.data = cells.data - 0.5 * cells.grad.sign()


def in_place(cells):
    with torch.no_grad():
        cells -= 0.5 * cells.grad.sign()


def nothing(loss, x, cells):
    cells.grad = torch.randn_like(cells)


def backward(loss, x, cells):
    loss.backward()


def backward_twice(loss, x, cells):
    for _ in range(2):
        loss.backward(retain_graph=True)


def of_the_input(loss, x, cells):
    cells.grad = torch.randn_like(cells)
    torch.autograd.grad(loss, x)


def of_the_input_afterwards(loss, x, cells):
    loss.backward(retain_graph=True)
    torch.autograd.grad(loss, x, retain_graph=True)


@needs_native
@pytest.mark.parametrize(
    'call, times, again',
    [
        (lambda layer, x: layer(x), 1, 2),
        (partial(checkpoint, use_reentrant=False), 1, 2),
        # Nothing learns in its forward pass; what is computed again has a backward pass of its own.
        (partial(checkpoint, use_reentrant=True), 4, 0),
    ],
)
def test_cells_are_packed_as_often_as_they_may_have_changed(call, times, again, monkeypatch):
    network = nn.Module()
    network.a, network.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    convert(network, SharingPlan.make([('a', 'w'), ('b', 'w')]))
    if not multiplies_bfloat16(network.a.cells):
        pytest.skip('this processor does not multiply in bfloat16')
    packed = []
    monkeypatch.setattr(
        dynamic, 'pack_cells', lambda cells: packed.append(pack_cells(cells)) or packed[-1]
    )
    x = torch.randn(2, 8, 3, 3, requires_grad=True)

    def loss_of(one, *layers):
        y = x
        with torch.autocast('cpu', torch.bfloat16):
            for name in layers:
                y = call(one.get_submodule(name), y)
        return y.float().square().sum()

    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, fused=True)
    held = []
    for step in (1, 2):
        held.append(loss_of(network, 'a', 'b'))
        held[-1].backward()
        assert len(packed) == step * times
        optimizer.step()
    assert loss_of(network, 'a', 'b').equal(loss_of(copy.deepcopy(network), 'a', 'b'))
    # Where a layer comes again, the next pass may have begun.
    before = len(packed)
    loss_of(network, 'a', 'b', 'b')
    assert len(packed) == before + again


@pytest.mark.parametrize('change', [fused, by_hand, exchanged, in_place])
@pytest.mark.parametrize(
    'between', [nothing, backward, backward_twice, of_the_input, of_the_input_afterwards]
)
def test_layers_that_learned_compute_with_new_cells(change, between):
    """Though the last graph lives, as in loops that print its loss; beside the static layer."""
    static, dynamic = nn.Conv2d(8, 8, 1), KWConv2d(8, 8, 1)
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    for layer, weight in ((static, 'weight'), (dynamic, 'warehouse_manager.weights.0')):
        before = copy.deepcopy(layer)
        with torch.autocast('cpu', torch.bfloat16):
            loss = layer(x).float().square().sum()
        between(loss, x, layer.get_parameter(weight))
        change(layer.get_parameter(weight))
        with torch.autocast('cpu', torch.bfloat16):
            found, right, old = layer(x), copy.deepcopy(layer)(x), before(x)
        assert found.equal(right) and not found.equal(old)


def test_layers_of_a_warehouse_may_compute_in_two_ways(monkeypatch):
    grid, sample_map = (3, 3, 1, 1), SampleConv((1, 1), (1, 1), (1, 1))
    cells = torch.randn(6, 8, 8, 1, 1, requires_grad=True)
    attention, x = torch.randn(2, 9, 6), torch.randn(2, 8, 5, 5)

    def gradient_of(*ways):
        y = x
        for switched_on in ways:
            monkeypatch.setattr(backend, '_switched_on', switched_on)
            with torch.autocast('cpu', torch.bfloat16):
                y = apply_mixed(y, attention, cells, grid, sample_map)
        return torch.autograd.grad(y.float().sum(), cells)[0]

    right = gradient_of(False, False, False)
    for ways in ((True, False, True), (False, True, False), (True, True, True)):
        found = gradient_of(*ways)
        assert float((found - right).norm()) <= 2e-2 * float(right.norm())

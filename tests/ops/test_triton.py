"""The GPU kernels against PyTorch: on a GPU, or in Triton's interpreter on the CPU."""

import math
from functools import partial

import pytest
import torch

from mmkw.ops import apply_mixed, backend
from mmkw.ops.gradient import CellSum
from mmkw.ops.kernels import cut, mix_cells
from mmkw.ops.sample_conv import SampleConv
from mmkw.ops.ways import Images

pytest.importorskip('triton', reason='Triton is not installed')
from mmkw.ops import fused
from mmkw.ops.triton import convolution, mixing

HAS_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if HAS_GPU else 'cpu'
# The interpreter cannot multiply matrices of bfloat16.
HALF = torch.bfloat16 if HAS_GPU else torch.float16
# On a GPU products are in TF32 where the kernels say so.
ROUNDING = 2e-3 if HAS_GPU else 1e-5


def distance(result, exact):
    """The relative difference of two tensors."""
    return ((result.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ('num_cells', 'cell', 'grid', 'images'),
    [
        (87, (16, 8, 1, 1), (3, 3, 1, 1), 2),
        (20, (8, 16, 1, 1), (1, 1, 4, 1), 3),
        (20, (8, 4, 1, 1), (3, 1, 2, 3), 5),
        (9, (8, 4, 3, 3), (1, 1, 2, 3), 30),
        (9, (8, 40, 1), (1, 2, 3), 20),
    ],
)
def test_mixing(num_cells, cell, grid, images, dtype, channels_last):
    mixtures = math.prod(grid)
    cells = torch.randn(num_cells, *cell, device=DEVICE)
    # The attentions of the zero cell are cut off.
    attention = torch.randn(images, mixtures, num_cells + 1, device=DEVICE)[..., :-1]
    exact = mix_cells(attention, cells, grid)

    def like(exact, kind):
        out, into, *size = exact.shape[1:]
        if not channels_last:
            return exact.new_full(exact.shape, float('nan'), dtype=kind)
        shape = (len(exact), out, *size, into)
        return exact.new_full(shape, float('nan'), dtype=kind).movedim(-1, 2)

    rounding = max(ROUNDING, 1e-2 if dtype == torch.bfloat16 else 2e-3 * (dtype == torch.float16))
    kernels = like(exact, dtype)
    mixing.mix(attention, cells, grid, kernels)
    assert distance(kernels, exact) < rounding

    gradients = like(exact, dtype).copy_(torch.randn_like(exact))
    rows = torch.full((images, mixtures, *cell), float('nan'), dtype=dtype, device=DEVICE)
    grad_attention = mixing.unmix(gradients, cells, grid, mixtures, rows)
    exact_rows = cut(gradients.contiguous(), grid, cell).reshape(rows.shape)
    assert torch.equal(rows, exact_rows)
    flat = exact_rows.flatten(0, 1).flatten(1).double()
    exact_grad = (flat @ cells.flatten(1).double().t()).view(grad_attention.shape)
    assert distance(grad_attention, exact_grad) < ROUNDING
    without_rows = mixing.unmix(gradients, cells, grid, mixtures, None)
    assert torch.equal(without_rows, grad_attention)

    total = torch.full_like(cells, float('nan'))
    weights = attention.flatten(0, 1)
    for begin in (True, False):
        mixing.add_to_cells(weights, rows.flatten(0, 1), total, begin)
    assert distance(total / 2, (weights.double().t() @ flat).view(cells.shape)) < ROUNDING


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('images', [2, 9])
@pytest.mark.parametrize('grid', [(3, 3, 1, 1), (3, 3, 2, 2), (1, 1, 1, 4)])
def test_few_mixtures_and_many(grid, images, channels_last):
    """One kernel, or a product of matrices: the same results."""
    mixtures = math.prod(grid)
    images *= 9 // mixtures or 1
    cells = torch.randn(21, 8, 16, 1, 1, device=DEVICE)
    attention = torch.randn(images, mixtures, 22, device=DEVICE)[..., :-1]
    fast = fused.FusedMixing(cells, grid, HALF, channels_last)
    exact = mix_cells(attention, cells, grid)
    ((_, kernels),) = fast.mixed(attention)
    assert kernels.dtype == HALF
    assert distance(kernels, exact) < 1e-2
    gradients = torch.randn_like(exact).to(HALF)
    total = CellSum(fast.cells)
    grad_attention, parts = fast.backward([list(gradients)], attention, total, None, True)
    fast.backward([gradients], attention, total, kernels, False)
    assert all(distance(kernels, exact) < 1e-2 for _, kernels in parts)
    rows = cut(gradients.double(), grid, cells.shape[1:]).reshape(images * mixtures, -1)
    exact = (rows @ cells.double().flatten(1).t()).view(attention.shape)
    assert distance(grad_attention, exact) < 1e-2
    exact = attention.flatten(0, 1).double().t() @ rows
    assert distance(total.total() / 2, exact.view(cells.shape)) < 1e-2


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize(
    'conv', [SampleConv((1, 1), (1, 1), (1, 1)), SampleConv((2, 2), (0, 1), (1, 1))]
)
def test_the_whole_operator(conv, channels_last, monkeypatch):
    def mixing_of(x, attention, cells, grid, sample_map, dtype, learning):
        return partial(fused.FusedMixing, grid=grid, dtype=dtype, channels_last=channels_last)

    monkeypatch.setattr(backend, 'mixing_of', mixing_of)
    x, attention, cells = (
        torch.randn(shape, device=DEVICE, requires_grad=True)
        for shape in ((3, 32, 7, 6), (3, 18, 21), (21, 8, 16, 1, 1))
    )
    grid = (3, 3, 1, 2)
    y = apply_mixed(x, attention, cells, grid, conv)
    with torch.no_grad():
        assert distance(apply_mixed(x, attention, cells, grid, conv), y) < 1e-5
    exact = conv(x.double(), mix_cells(attention.double(), cells.double(), grid))
    assert distance(y, exact) < ROUNDING
    grad, learned = torch.randn_like(y), (x, attention, cells)
    found = torch.autograd.grad(y, learned, grad)
    for ours, right in zip(found, torch.autograd.grad(exact, learned, grad.double())):
        assert distance(ours, right) < ROUNDING


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize(
    ('channels', 'size', 'kernel', 'conv'),
    [
        ((20, 24), (9, 7), (3, 3), SampleConv((1, 1), (1, 1), (1, 1))),
        ((16, 40), (8, 11), (3, 1), SampleConv((2, 1), (1, 0), (1, 1))),
        ((8, 8), (9, 9), (3, 3), SampleConv((2, 2), (2, 2), (2, 2))),
        ((130, 136), (3, 12), (3, 3), SampleConv((1, 1), (1, 1), (1, 1))),
    ],
)
def test_convolution(channels, size, kernel, conv, channels_last):
    images = 2
    x = torch.randn(images, channels[0], *size, device=DEVICE)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    kernels = torch.randn(images, channels[1], channels[0], *kernel, device=DEVICE)
    settings = conv.stride, conv.padding, conv.dilation
    y = convolution.forward(x, kernels, *settings)
    exact = Images.forward(conv, x.double(), kernels.double(), None)
    assert distance(y, exact) < ROUNDING
    grad = torch.randn_like(y)
    grad_x = convolution.backward_x(grad, x, kernels, *settings)
    exact_x = Images.x(conv, grad.double(), x.double(), kernels.double())
    assert distance(grad_x, exact_x) < ROUNDING
    grad_kernels = convolution.backward_kernels(grad, x, kernel, *settings)
    exact_kernels = Images.kernels(conv, grad.double(), x.double(), kernels.double(), None)
    assert distance(grad_kernels, torch.stack(exact_kernels)) < ROUNDING

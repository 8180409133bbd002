"""Kernels whose taps are scaled: the definition, its gradients, and mixing in blocks."""

import pytest
import torch
from torch import nn

from mmkw.ops import SampleConv, apply_mixed, mix_cells, mixing, use_compiled

# Whole kernels, and kernels of cells of size one; and the shape of the cells.
WHOLE = ((1, 1, 1, 1), (3, 6, 4, 2, 3))
CUT = ((2, 3, 2, 1), (7, 3, 4, 1, 1))


def operands(dtype, kind, groups=1, batch=5):
    grid, cells = kind
    cells = (*cells[:2], cells[2] // groups, *cells[3:])
    mixtures = torch.Size(grid).numel()
    shapes = [(batch, 4, 6, 5), (batch, mixtures, cells[0]), cells, (6,), (batch, 2, 3)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def expected(grid, x, attention, cells, bias, taps, groups=1):
    """Image by image, by PyTorch's convolution."""
    kernels = mix_cells(attention, cells, grid)
    return torch.cat(
        [
            nn.functional.conv2d(image[None], kernel * scales, bias, groups=groups)
            for image, kernel, scales in zip(x, kernels, taps)
        ]
    )


@pytest.mark.parametrize('compiled', [True, False])
@pytest.mark.parametrize('kind, groups', [(WHOLE, 1), (WHOLE, 2), (CUT, 1)])
@pytest.mark.parametrize('block_bytes', [1, 2_000, 40 << 20])
@pytest.mark.parametrize('keeps', [True, False])
def test_taps_scale_as_they_are_defined(kind, groups, block_bytes, compiled, keeps, monkeypatch):
    for limits in (mixing.BLOCK_BYTES, mixing.PART_BYTES):
        monkeypatch.setitem(limits, 'cpu', block_bytes)
    if keeps:
        monkeypatch.setattr(mixing, 'KEPT_CELLS', 1)
    tensors = operands(torch.float, kind, groups)
    sample_map = SampleConv((1, 1), (0, 0), (1, 1), groups)
    use_compiled(compiled)
    try:
        found = apply_mixed(*tensors[:3], kind[0], sample_map, *tensors[3:])
        reference = expected(kind[0], *tensors, groups)
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-5)
        weights = torch.randn_like(found)
        for some in (tensors, tensors[-1:], tensors[:1], tensors[1:3]):
            losses = [(y * weights).sum() for y in (found, reference)]
            grads = [torch.autograd.grad(loss, some, retain_graph=True) for loss in losses]
            torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            again = apply_mixed(*tensors[:3], kind[0], sample_map, *tensors[3:])
        torch.testing.assert_close(again, reference, atol=1e-5, rtol=1e-5)
    finally:
        use_compiled(True)


@pytest.mark.parametrize('kind', [WHOLE, CUT])
def test_taps_are_differentiated_twice(kind):
    sample_map = SampleConv((1, 1), (0, 0), (1, 1))

    def layer(x, attention, cells, bias, taps):
        return apply_mixed(x, attention, cells, kind[0], sample_map, bias, taps)

    tensors = operands(torch.double, kind, batch=2)
    assert torch.autograd.gradcheck(layer, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, tensors, fast_mode=True)


def test_under_compile():
    tensors = operands(torch.float32, WHOLE)
    sample_map = SampleConv((1, 1), (0, 0), (1, 1))

    def layer(*tensors):
        return apply_mixed(*tensors[:3], WHOLE[0], sample_map, *tensors[3:])

    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), layer(*tensors), atol=1e-5, rtol=1e-5)

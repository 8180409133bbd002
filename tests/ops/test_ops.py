"""The tensor functions by themselves: properties over random shapes."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkw.ops import SampleConv, SampleLinear, mix_cells

sizes = st.integers(1, 3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=sizes,
    cells=st.integers(1, 5),
    blocks=st.tuples(sizes, sizes),
    channels=st.tuples(sizes, sizes),
    kernel=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3),
)
def test_one_hot_attention_lays_cells_where_they_belong(batch, cells, blocks, channels, kernel):
    """Every value of the kernel is the value of the cell that its mixture picked."""
    spatial, cell_kernel = zip(*kernel)
    grid = (*spatial, *blocks)
    pick = torch.randint(cells, (batch, math.prod(grid)))
    store = torch.randn(cells, *channels, *cell_kernel)
    kernels = mix_cells(torch.nn.functional.one_hot(pick, cells).float(), store, grid)

    size = [s * e for s, e in zip(spatial, cell_kernel)]
    assert kernels.shape == (batch, blocks[0] * channels[0], blocks[1] * channels[1], *size)
    picked = pick.view(batch, *grid)
    for image, out, into, *place in torch.ones(kernels.shape).nonzero().tolist():
        at = [p // e for p, e in zip(place, cell_kernel)]
        cell = picked[(image, *at, out // channels[0], into // channels[1])]
        inside = [p % e for p, e in zip(place, cell_kernel)]
        expected = store[(cell, out % channels[0], into % channels[1], *inside)]
        assert kernels[(image, out, into, *place)] == expected


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=sizes,
    groups=sizes,
    channels=st.tuples(sizes, sizes),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dims=st.integers(1, 3),
    bias=st.booleans(),
)
def test_a_batch_is_its_images(batch, groups, channels, kernel, stride, padding, dims, bias):
    """The convolution of a batch is the ordinary convolution of every image."""
    conv = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[dims]
    x = torch.randn(batch, groups * channels[0], *[4] * dims, dtype=torch.double)
    shape = (batch, groups * channels[1], channels[0], *[kernel] * dims)
    kernels = torch.randn(shape, dtype=torch.double)
    offset = torch.randn(shape[1], dtype=torch.double) if bias else None
    settings = ((stride,) * dims, (padding,) * dims, (1,) * dims, groups)
    result = SampleConv(*settings)(x, kernels, offset)
    expected = [conv(x[i : i + 1], kernels[i], offset, *settings) for i in range(batch)]
    torch.testing.assert_close(result, torch.cat(expected))


def test_linear_maps_every_sample_by_its_own_kernel():
    x, kernels, bias = torch.randn(3, 2, 4, 5), torch.randn(3, 6, 5), torch.randn(6)
    expected = torch.stack([x[i] @ kernels[i].T + bias for i in range(3)])
    torch.testing.assert_close(SampleLinear()(x, kernels.unsqueeze(-1), bias), expected)

"""In a compiled graph the convolution is one operator, so the graph holds for every batch."""

import copy

import pytest
import torch
from conftest import exhaustively
from torch._dynamo.utils import counters
from torch.nn import functional as F

from mmkw import KWConv1d, KWConv2d, KWConv3d
from mmkw.ops import SampleConv

SETTINGS = [
    dict(kernel=(3, 3)),
    dict(kernel=(3, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    dict(kernel=(3, 3), padding=(1, 1), groups=4),
    dict(kernel=(2, 3), groups=2, padding=(1, 1)),
    dict(kernel=(3,), stride=(2,), padding=(1,)),
    dict(kernel=(2, 1, 3), padding=(0, 1, 1)),
]


def operands(kernel, stride=1, padding=0, dilation=1, groups=1, batch=3):
    conv = SampleConv(
        *(v if isinstance(v, tuple) else (v,) * len(kernel) for v in (stride, padding, dilation)),
        groups,
    )
    x = torch.randn(batch, 4, *[7, 6, 5][: len(kernel)])
    kernels = torch.randn(batch, 8, 4 // groups, *kernel)
    return conv, x, kernels, (conv.stride, conv.padding, conv.dilation, groups)


@pytest.mark.parametrize('settings', SETTINGS, ids=str)
@pytest.mark.parametrize('batch', exhaustively([0, 1, 3], [1]))
def test_what_pytorch_is_told_of_the_operators_is_true(settings, batch):
    _, x, kernels, arguments = operands(**settings, batch=batch)
    x, kernels = x.requires_grad_(), kernels.requires_grad_()
    ops = torch.ops.mmkw
    torch.library.opcheck(ops.convolve.default, (x, kernels, *arguments))
    grad = torch.randn_like(ops.convolve(x, kernels, *arguments))
    constants = grad, x.detach(), kernels.detach(), *arguments
    torch.library.opcheck(ops.convolve_backward_x.default, constants)
    torch.library.opcheck(ops.convolve_backward_kernels.default, constants)


@pytest.mark.parametrize('settings', SETTINGS, ids=str)
@pytest.mark.parametrize('memory_format', ['contiguous', 'strided'])
def test_it_equals_pytorch_s_convolutions(settings, memory_format):
    _, x, kernels, arguments = operands(**settings)
    x, kernels = x.double(), kernels.double()
    if memory_format == 'strided':
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x, kernels = x.requires_grad_(), kernels.requires_grad_()
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.dim() - 2]
    images = [convolution(x[i : i + 1], kernels[i], None, *arguments) for i in range(len(x))]
    expected, found = torch.cat(images), torch.ops.mmkw.convolve(x, kernels, *arguments)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    found, expected = (torch.autograd.grad(y, (x, kernels), grad) for y in (found, expected))
    torch.testing.assert_close(found, expected)


def graphs(layer, shapes, train):
    """How many graphs serve all shapes; every result equals that without compiling."""
    plain = copy.deepcopy(layer)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True, dynamic=True)
    for shape in shapes:
        images, results = torch.randn(shape), []
        for network, own in ((compiled, layer), (plain, plain)):
            x = images.clone().requires_grad_(train)
            own.zero_grad()
            y = network(x)
            if train:
                y.square().sum().backward()
            results.append([y, x.grad, *(p.grad for p in own.parameters())])
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    return counters['stats']['unique_graphs']


@pytest.mark.parametrize(
    'kind, arguments, sizes, train',
    exhaustively(
        KINDS := [
            (KWConv2d, dict(kernel_size=3, padding=1), [(9, 12), (10, 13)], True),
            (KWConv2d, dict(kernel_size=1, stride=2), [(9, 12), (10, 13)], True),
            (KWConv2d, dict(kernel_size=3, stride=2, groups=8), [(9, 12), (10, 13)], True),
            (KWConv1d, dict(kernel_size=3), [(9,), (11,)], False),
            (KWConv3d, dict(kernel_size=(1, 3, 3)), [(4, 5, 6), (5, 6, 7)], False),
        ],
        KINDS[2:],
    ),
    ids=['3x3', '1x1', 'depthwise', '1d', '3d'],
)
def test_as_many_graphs_as_the_static_layer(kind, arguments, sizes, train):
    shapes = [(batch, 8, *size) for batch, size in zip((2, 3, 5, 4), sizes * 2)]
    dynamic = kind(8, 16, **arguments).train(train)
    found = graphs(dynamic, shapes, train)
    assert found == graphs(dynamic.static_twin(), shapes, train) == 1

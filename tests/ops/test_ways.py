"""All ways of convolving give the same, and the fastest is chosen and remembered."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmkw
from mmkw.layers import KWConv1d, KWConv2d, KWConv3d, KWLinear, set_temperature
from mmkw.ops import SampleConv, SampleLinear, backend, choosing
from mmkw.ops.compiled import CompiledMap
from mmkw.ops.memory import Scratch
from mmkw.ops.sample_conv import _WAYS

ops = torch.ops.mmkw
needs_kernels = pytest.mark.skipif(
    backend.why_not_compiled() is not None, reason='the compiled kernels are missing'
)

DEVICES = [
    'cpu',
    pytest.param(
        'cuda',
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='this machine has no GPU'),
    ),
]


@pytest.fixture
def timed(monkeypatch):
    """Ways are timed on the CPU, too, and what was measured before is forgotten."""
    monkeypatch.setattr(choosing, 'TIMED', {'cpu', 'cuda'})
    choosing.forget()
    yield
    choosing.forget()


@pytest.fixture
def two_threads():
    """One thread convolves by products."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


CONVS = {
    '1d': (SampleConv((1,), (1,), (1,)), (8, 12, 3), (8, 20)),
    '2d': (SampleConv((2, 1), (1, 0), (1, 2)), (8, 12, 3, 3), (8, 9, 11)),
    'grouped': (SampleConv((1, 1), (1, 1), (1, 1), 2), (4, 12, 3, 3), (8, 9, 11)),
    '3d': (SampleConv((1, 1, 1), (1, 1, 1), (1, 1, 1)), (8, 12, 3, 3, 3), (8, 4, 5, 6)),
}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('kind', CONVS)
def test_all_ways_agree(kind, channels_last, device):
    conv, (into, out, *kernel), shape = CONVS[kind]
    x = torch.randn(3, *shape, dtype=torch.float64, device=device)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    kernels = torch.randn(3, out, into, *kernel, dtype=torch.float64, device=device)
    bias = torch.randn(out, dtype=torch.float64, device=device)
    results = {}
    for name in ('images', 'groups'):
        way = _WAYS[name]
        y = way.forward(conv, x, kernels, bias)
        grad = y.sin()
        gradients = way.kernels(conv, grad, x, kernels, Scratch())
        results[name] = [y, way.x(conv, grad, x, kernels), *gradients]
    for one, other in zip(*results.values()):
        assert torch.allclose(one, other)


POINTWISE_CONVS = {
    '1d of size one': (SampleConv((2,), (0,), (1,)), (8, 12, 1), (8, 20)),
    'size one': (SampleConv((2, 1), (0, 0), (1, 1)), (8, 12, 1, 1), (8, 9, 11)),
    'grouped of size one': (SampleConv((1, 1), (0, 0), (1, 1), 2), (4, 12, 1, 1), (8, 9, 11)),
    'into fewer channels': (SampleConv((1, 1), (0, 0), (1, 1)), (600, 70, 1, 1), (600, 7, 7)),
    'into more channels': (SampleConv((1, 1), (0, 0), (1, 1)), (70, 600, 1, 1), (70, 7, 7)),
    'tokens': (SampleLinear(), (8, 12, 1), (5, 3, 8)),
}


@needs_kernels
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('kind', CONVS | POINTWISE_CONVS)
def test_all_ways_of_the_compiled_operators_are_as_in_float64(kind, channels_last, batch, dtype):
    sample_map, (into, out, *kernel), shape = (CONVS | POINTWISE_CONVS)[kind]
    x, kernels, bias = (
        torch.randn(sizes).to(dtype)
        for sizes in ((batch, *shape), (batch, out, into, *kernel), (out,))
    )
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    precise = [t.double().requires_grad_() for t in (x, kernels, bias)]
    right = sample_map(*precise)
    grad = torch.randn(right.shape).to(dtype)
    right_x, right_kernels = torch.autograd.grad(right, precise[:2], grad.double())
    settings = sample_map.settings
    tolerance = dict(atol=1e-4, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.1, rtol=0.02)
    ways = [None, 'images', *(['products'] if kind in POINTWISE_CONVS else ['groups'])]
    if kind in POINTWISE_CONVS and dtype == torch.float32:
        ways.append('tiles')
    for way in ways:
        y = ops.apply_kernels(x, kernels, bias, *settings, way)
        found_x = ops.backward_images(grad, x, kernels, *settings, None, way)
        found = ops.backward_kernels(grad, x, kernels.shape[1:], *settings, way)
        for ours, exact in ((y, right), (found_x, right_x), (torch.cat(found), right_kernels)):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), exact, **tolerance)


def test_the_fastest_is_chosen_once_for_a_kind_of_shape(timed, monkeypatch):
    calls = []

    def way(name):
        return lambda: calls.append(name)

    costs = dict(slow=3.0, fast=1.0, rule=2.0)
    monkeypatch.setattr(choosing, '_time', lambda x, way: costs[(way(), calls[-1])[1]])
    ways = {name: way(name) for name in costs}

    def chosen(x, kind=('forward', 3)):
        return choosing.choose(kind, x, 'rule', ways)

    assert chosen(torch.rand(2, 3, 100, 100)) == 'fast'
    timed_calls = len(calls)
    assert chosen(torch.rand(2, 3, 104, 98)) == 'fast'
    assert len(calls) == timed_calls, 'a size of the same class is not timed again'
    costs['fast'] = 9.0
    # Another size, batch, layout, precision, or operation may have another fastest way.
    for x in (
        torch.rand(2, 3, 200, 200),
        torch.rand(3, 3, 100, 100),
        torch.rand(2, 3, 100, 100).to(memory_format=torch.channels_last),
        torch.rand(2, 3, 100, 100, dtype=torch.float64),
    ):
        assert chosen(x) == 'rule'
    assert chosen(torch.rand(2, 3, 100, 100), ('x', 3)) == 'rule'
    assert chosen(torch.rand(2, 3, 100, 100)) == 'fast'
    choosing.forget()
    assert chosen(torch.rand(2, 3, 100, 100)) == 'rule'


def test_a_way_without_enough_memory_is_not_chosen(timed):
    def too_large():
        raise torch.OutOfMemoryError

    ways = dict(large=too_large, small=lambda: None)
    assert choosing.choose(('a',), torch.rand(2, 3, 4, 4), 'large', ways) == 'small'


def test_what_autograd_records_no_kernel_of_our_own_computes(timed, monkeypatch):
    """It could not be differentiated, as second derivatives need."""
    offered = []
    monkeypatch.setattr(backend, 'computes_by_tiles', lambda x: True)
    monkeypatch.setattr(
        choosing, '_fastest', lambda x, rule, ways: (offered.append(set(ways)), rule)[1]
    )
    conv, x, kernels = CONVS['2d'][0], torch.rand(2, 8, 9, 11), torch.rand(2, 12, 8, 3, 3)
    for learns in (False, True, False):
        assert conv(x, kernels.requires_grad_(learns)).requires_grad == learns
    assert offered == [{'images', 'groups', 'tiles'}, {'images', 'groups'}]


@pytest.mark.parametrize('where', ['algorithms', 'cudnn'])
def test_nothing_is_timed_where_all_runs_must_compute_the_same_bits(timed, where, monkeypatch):
    if where == 'cudnn':
        monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    else:
        torch.use_deterministic_algorithms(True)
    try:
        ways = dict(rule=lambda: 1 / 0)
        assert choosing.choose(('a',), torch.rand(2, 3, 4, 4), 'rule', ways) == 'rule'
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_layer_computes_the_same_while_its_ways_are_timed(timed):
    conv = SampleConv((1, 1), (1, 1), (1, 1))
    x, kernels = torch.rand(3, 4, 9, 9), torch.rand(3, 6, 4, 3, 3)
    expected = torch.cat([conv.one(image[None], kernel) for image, kernel in zip(x, kernels)])
    for _ in range(2):
        assert torch.allclose(conv(x, kernels), expected, atol=1e-5)
    assert [key[0] for key in choosing._chosen] == ['forward']


def test_each_image_of_a_batch_is_one_of_a_transformation():
    """Where channels lie cannot be asked inside."""
    layer, images = KWConv2d(16, 16, 3, groups=16).eval(), torch.randn(3, 2, 16, 8, 18)[..., ::2]
    found = torch.func.vmap(layer)(images)
    torch.testing.assert_close(found, torch.stack([layer(x) for x in images]))


LAYERS = {
    '3x3': (16, 8, 3, 1, 1),
    'strided': (16, 8, 3, 2, 1),
    'patches': (16, 8, 2, 2, 0),
    'depthwise': (16, 16, 3, 1, 1, 1, 16),
    'pointwise': (16, 8, 1),
}


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('kind', LAYERS)
def test_channels_lie_as_those_of_a_static_layer(kind, channels_last, batch):
    """In results and in gradients, which autograd can add to in place: they are no views."""
    dynamic = KWConv2d(*LAYERS[kind])
    set_temperature(dynamic, 1)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(batch, 16, 12, 10).contiguous(memory_format=memory_format)
    found = []
    for layer in (dynamic, dynamic.static_twin()):
        x = images.clone().requires_grad_()
        y = layer(x)
        found.append([y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))])
    for ours, static in zip(*found):
        torch.testing.assert_close(ours, static, atol=1e-5, rtol=1e-5)
        assert ours.is_contiguous(memory_format=memory_format)
        assert static.is_contiguous(memory_format=memory_format)
        assert not ours._is_view()


@pytest.mark.parametrize('learns', [False, True])
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('channels_last', [False, True])
def test_one_pixel_lies_as_that_of_a_static_layer(channels_last, batch, learns):
    """Whoever makes it larger asks its strides where the channels of the result should lie."""
    dynamic = KWConv2d(16, 8, 1)
    set_temperature(dynamic, float(learns))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images, found = torch.randn(batch, 16, 1, 1).contiguous(memory_format=memory_format), []
    for layer in (dynamic.eval(), dynamic.static_twin()):
        x = images.clone().requires_grad_()
        with torch.set_grad_enabled(learns):
            y = layer(x)
        enlarged = F.interpolate(y, (3, 3), mode='bilinear')
        found.append(enlarged.stride())
    assert found[0] == found[1]


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('kind', LAYERS)
def test_constant_results_can_be_changed_in_place(kind, batch):
    """As by what learns after a frozen network, whose results no view may be."""
    dynamic = KWConv2d(*LAYERS[kind]).eval()
    images = torch.randn(batch, 16, 12, 10).contiguous(memory_format=torch.channels_last)
    for layer in (dynamic, dynamic.static_twin()):
        with torch.no_grad():
            y = layer(images)
        y.mul_(torch.nn.Parameter(torch.ones(1))).sum().backward()


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('dims', [1, 3])
def test_channels_of_tokens_lie_first(dims, batch):
    """In results of kernels of size one, as in PyTorch's. Where volumes' lie is up to its ways."""
    dynamic = (KWConv1d if dims == 1 else KWConv3d)(16, 8, 1).eval()
    x = torch.randn(batch, *[4] * dims, 16).movedim(-1, 1)
    with torch.no_grad():
        ours, static = dynamic(x), dynamic.static_twin()(x)
    assert dims > 1 or (ours.is_contiguous() and static.is_contiguous())
    kernels = torch.randn(batch, 8, 16, *[1] * dims)
    conv = SampleConv(*[(1,) * dims, (0,) * dims, (1,) * dims])
    expected = torch.cat([conv.one(x[i : i + 1], kernels[i]) for i in range(batch)])
    torch.testing.assert_close(conv(x, kernels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64, torch.complex64])
def test_autocast_casts_real_numbers_alone(dtype, batch):
    dynamic = KWConv2d(16, 8, 3).eval()
    images = torch.ones(batch, 16, 6, 6).to(dtype)
    for layer in (dynamic, dynamic.static_twin()):
        autocast = torch.autocast('cpu', torch.bfloat16)
        with torch.no_grad(), autocast, pytest.raises(RuntimeError):
            layer(images)


# Layer, size of the images, and how many convolutions compute forward and backward for four images.
SMALL = {
    'small images': ((16, 8, 3, 1, 1), (12, 10), 1, 2),
    'strided and dilated': ((16, 24, 3, 2, 2, 2), (9, 17), 1, 2),
    'large images': ((16, 8, 3, 1, 1), (33, 40), 4, 8),
    'small images, wide kernels': ((64, 128, 3, 1, 1), (6, 5), 1, 5),
    'small images, wider kernels': ((128, 256, 3, 1, 1), (6, 5), 4, 8),
    'small images, large kernels': ((8, 8, 5, 1, 2), (12, 10), 4, 8),
    'groups': ((16, 8, 3, 1, 1, 1, 2), (12, 10), 4, 8),
}


@pytest.mark.skipif(not torch.backends.mkldnn.enabled, reason='this PyTorch is without oneDNN')
@pytest.mark.parametrize('kind', SMALL)
def test_small_images_are_convolved_at_once(kind):
    """PyTorch would take its slow way for one of them, though not for the static layer's batch."""
    args, size, forward, backward = SMALL[kind]
    layer = KWConv2d(*args)
    set_temperature(layer, 0.3)
    images = torch.randn(4, args[0], *size)

    def compute(layer, images):
        x = images.clone().requires_grad_()
        y = layer(x)
        return [y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])]

    with torch.profiler.profile() as profile:
        found = compute(layer, images)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls['aten::convolution'] == forward
    assert calls['aten::convolution_backward'] == backward
    if forward == 1:
        with torch.profiler.profile() as profile:
            compute(layer.static_twin(), images)
        slow = '_slow_conv2d_forward', 'aten::_slow_conv2d_forward'
        assert not {event.key for event in profile.key_averages()}.union(calls) & set(slow)
    expected = compute(layer.double(), images.double())
    for ours, exact in zip(found, expected):
        torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1e-4)


def as_chosen(conv, compiled):
    """What applies kernels of constants, by compiled operators or by PyTorch's."""
    return CompiledMap.of(conv) if compiled else conv


@pytest.mark.parametrize('multiplier', [1, 2])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=needs_kernels)])
def test_many_channels_are_convolved_depthwise(compiled, memory_format, multiplier):
    """In parts, where oneDNN is slow at all of them."""
    channels, out_channels = 600, 600 * multiplier
    conv = as_chosen(SampleConv((2, 1), (2, 2), (1, 1), channels), compiled)
    x = torch.randn(2, channels, 13, 12).contiguous(memory_format=memory_format)
    kernels = torch.randn(2, out_channels, 1, 5, 5)
    grad = torch.randn(2, out_channels, 7, 12).contiguous(memory_format=memory_format)
    found = conv.backward_kernels(grad, x, kernels.shape[1:], Scratch())
    for i in range(2):
        kernel = kernels[i].requires_grad_()
        one = F.conv2d(x[i : i + 1], kernel, None, (2, 1), 2, groups=channels)
        expected = torch.autograd.grad(one, kernel, grad[i : i + 1])[0]
        torch.testing.assert_close(found[i].view(kernel.shape), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('batch', [2, 5])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=needs_kernels)])
def test_small_images_are_convolved_with_their_own_kernels(compiled, batch, memory_format):
    conv = as_chosen(SampleConv((2, 1), (1, 0), (1, 2)), compiled)
    x = torch.randn(batch, 8, 9, 11).contiguous(memory_format=memory_format)
    kernels, bias = torch.randn(batch, 12, 8, 3, 3), torch.randn(12)
    y = conv(x, kernels, bias)
    assert y.is_contiguous(memory_format=memory_format)
    grad = torch.randn_like(y)
    found_x = conv.backward_x(grad, x, kernels)
    found = conv.backward_kernels(grad, x, kernels.shape[1:], Scratch())
    assert len(found) == batch
    for i in range(batch):
        image, kernel = (t.clone().requires_grad_() for t in (x[i : i + 1], kernels[i]))
        one = F.conv2d(image, kernel, bias, (2, 1), (1, 0), (1, 2))
        expected = torch.autograd.grad(one, [image, kernel], grad[i : i + 1])
        for ours, reference in zip(
            (y[i], found_x[i], found[i]), (one[0], expected[0][0], expected[1])
        ):
            torch.testing.assert_close(
                ours, reference.detach().view(ours.shape), atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize(
    'kind', [(KWConv1d, (1600,)), (KWConv2d, (40, 41)), (KWConv3d, (8, 9, 23))]
)
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('stride', [1, 2])
def test_many_pixels_are_multiplied_as_in_float64(kind, batch, stride):
    """By kernels of size one, while they learn and as constants."""
    make, size = kind
    layer = make(64, 40, 1, stride=stride).eval()
    x = torch.randn(batch, 64, *(stride * side for side in size))
    precise = make(64, 40, 1, stride=stride).eval().double()
    precise.load_state_dict(layer.state_dict())
    results = []
    for one, images in (
        (layer, x.requires_grad_()),
        (precise, x.detach().double().requires_grad_()),
    ):
        y = one(images)
        learned = [parameter for parameter in one.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(y.square().mean(), [images, *learned])
        with torch.no_grad():
            results.append([y, one(images), *gradients])
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), right, atol=1e-4, rtol=1e-3)


# Layers of size one with 48 channels in and 64 out, and images for them.
CONVOLVED = {
    f'{name}, stride {stride}': (lambda kind=kind, stride=stride: kind(48, 64, 1, stride), shape)
    for name, kind, shape in (
        ('sequence', KWConv1d, (48, 601)),
        ('map', KWConv2d, (48, 41, 30)),
        ('volume', KWConv3d, (48, 5, 8, 15)),
    )
    for stride in (1, 2)
}
CONVOLVED['tokens'] = (lambda: KWLinear(48, 64), (20, 30, 48))


@needs_kernels
@pytest.mark.parametrize('case', CONVOLVED)
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('batch', [1, 3])
def test_kernels_of_size_one_are_convolved_as_they_are_multiplied(
    case, channels_last, batch, monkeypatch
):
    make, shape = CONVOLVED[case]
    layer = make()
    x = torch.randn(batch, *shape)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_()
    precise = copy.deepcopy(layer).double()

    def compute(layer, images):
        y = layer(images)
        learned = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(y.sin().sum(), [images, *learned])
        with torch.no_grad():
            return [y, layer(images), *gradients]

    right = compute(precise, x.double())
    names = ('apply_kernels', 'backward_kernels', 'backward_images')
    operators = {name: getattr(ops, name) for name in names}
    calls, layouts = [], []
    for way in ('images', 'products', 'tiles'):
        for name, operator in operators.items():
            monkeypatch.setattr(ops, name, partial(operator, way=way))
        with torch.profiler.profile() as profile:
            found = compute(layer, x)
        calls.append(sum('convolution' in event.key for event in profile.key_averages()))
        layouts.append([found[0].stride(), found[2].stride()])
        for ours, exact in zip(found, right, strict=True):
            torch.testing.assert_close(ours.double(), exact, atol=1e-3, rtol=1e-3)
    assert calls[0] and not calls[1] and not calls[2]
    # PyTorch convolves in these layouts alone.
    if 'map' in case or not channels_last:
        assert layouts[0] == layouts[1] == layouts[2]


@needs_kernels
@pytest.mark.filterwarnings('ignore:TF32 acceleration')
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.usefixtures('two_threads')
def test_kernels_of_size_one_are_convolved_where_that_may_be_faster(channels_last):
    """Whatever this processor is faster at, as nothing is measured."""

    def faster(what, *sizes, saved=0.5):
        return torch.ops.mmkw.is_convolution_faster(what, *sizes, channels_last, saved)

    parts = 'forward', 'x', 'kernels'
    # Of fewer channels than tiles are for.
    many = [('forward', 2, 24, 64, 9216), ('x', 2, 64, 24, 9216), ('kernels', 2, 64, 24, 9216)]
    assert all(faster(*sizes) for sizes in many)
    assert not any(faster(*sizes, saved=0.02) for sizes in many)
    assert not any(faster(part, 0, *sizes) for part, _, *sizes in many), 'of no images'
    assert not any(faster(part, 2, 64, 64, 49) for part in parts)
    assert not faster('forward', 1, 4096, 256, 49), 'PyTorch gives these to no library'
    assert not faster('kernels', 1, 512, 2048, 49), 'of few pixels'
    assert not faster('kernels', 1, 3072, 768, 196), 'of many weights'
    with torch.backends.mkldnn.flags(enabled=False):
        assert not any(faster(*sizes) for sizes in many)
    try:
        torch.use_deterministic_algorithms(True)
        assert not any(faster(*sizes) for sizes in many)
    finally:
        torch.use_deterministic_algorithms(False)
    measured = [faster(*sizes, saved=None) for sizes in many]
    assert measured == [faster(*sizes, saved=None) for sizes in many], 'once for the process'
    torch.set_num_threads(1)
    assert not any(faster(*sizes) for sizes in many), 'one thread multiplies'


def test_products_under_autocast_are_those_of_pytorch():
    """Whether or not their number of pixels is one of those that tiles of our own multiply."""
    conv = SampleConv((1, 1), (0, 0), (1, 1))
    for side in (8, 48):
        x, kernels = torch.randn(2, 64, side, side), torch.randn(2, 40, 64, 1, 1)
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
            assert conv(x, kernels).dtype == F.conv2d(x, kernels[0]).dtype == torch.bfloat16


class Pointwise(nn.Module):
    def __init__(self, into=64, out=40, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(into, out, 1, stride, bias=False)
        self.linear = nn.Linear(out, into)

    def forward(self, x):
        y = self.conv(x)
        return y, self.linear(y.movedim(1, -1).contiguous())


# Of many pixels, and of many channels.
POINTWISE = {
    'pixels': ((64, 40), (48, 33)),
    'channels': ((512, 256), (14, 15)),
    'few pixels': ((512, 768), (7, 7)),
    'stride': ((512, 256, 2), (27, 30)),
}


@pytest.mark.parametrize('batch', [0, 1, 2])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('sizes', POINTWISE)
@pytest.mark.usefixtures('two_threads')
def test_products_beside_the_static_layer(sizes, memory_format, batch):
    """Dynamic layers start as their static ones, which PyTorch computes."""
    args, size = POINTWISE[sizes]
    static = Pointwise(*args)
    dynamic = mmkw.convert(copy.deepcopy(static))
    assert isinstance(dynamic.conv, KWConv2d) and isinstance(dynamic.linear, KWLinear)
    results = []
    for network in (static, dynamic):
        x = torch.randn(batch, args[0], *size, generator=torch.Generator().manual_seed(0))
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        y, tokens = network.train()(x)
        assert not batch or y.is_contiguous(memory_format=memory_format)
        gradients = torch.autograd.grad(tokens.sin().sum(), [y, x])
        with torch.no_grad():
            results.append([y, tokens, *network.eval()(x), *gradients])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

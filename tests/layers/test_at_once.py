"""Layers on the CPU by one call are as by their steps: of one constant image, and what learns."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mmkw import quantize_cells
from mmkw.layers import KWConv1d, KWConv2d, KWConv3d, KWLinear, set_temperature
from mmkw.layers import dynamic_layers as module
from mmkw.ops import backend, mixing

pytestmark = pytest.mark.skipif(
    backend.why_not_compiled() is not None, reason='no compiled kernels'
)

LAST = torch.channels_last
LAYERS = {
    '1d': (KWConv1d, (8, 16, 3), dict(stride=2, padding=1), (8, 9)),
    '3x3': (KWConv2d, (8, 16, 3), dict(padding=1, stride=(1, 2)), (8, 9, 8)),
    '1x1': (KWConv2d, (8, 16, 1), dict(), (8, 9, 8)),
    '1x1 of every other pixel': (KWConv2d, (8, 16, 1), dict(stride=2, bias=False), (8, 9, 8)),
    '1x1, padded': (KWConv2d, (8, 16, 1), dict(padding=1), (8, 9, 8)),
    '1x1 in groups': (KWConv2d, (8, 16, 1), dict(groups=2), (8, 9, 8)),
    'dilated': (KWConv2d, (8, 16, 3), dict(dilation=2, cell_num_ratio=4), (8, 9, 8)),
    'depthwise': (KWConv2d, (8, 8, 3), dict(groups=8, padding=1), (8, 9, 8)),
    'around the edges': (KWConv2d, (8, 16, 3), dict(padding=1, padding_mode='circular'), (8, 9, 8)),
    'more behind': (KWConv2d, (8, 16, 2), dict(padding='same'), (8, 9, 8)),
    'whole kernels as cells': (KWConv2d, (8, 16, 3), dict(spatial_partition=False), (8, 9, 8)),
    '3d': (KWConv3d, (8, 16, 2), dict(padding=1), (8, 4, 5, 3)),
    'tokens': (KWLinear, (8, 16), dict(), (5, 7, 8)),
    'vector': (KWLinear, (8, 16), dict(bias=False), (8,)),
}


def spied(name, monkeypatch):
    found, real = [], getattr(module, name)

    def spy(*args):
        y = real(*args)
        found.append(y is not None)
        return y

    monkeypatch.setattr(module, name, spy)
    return found


@pytest.fixture
def at_once(monkeypatch):
    """Collects whether the operator of one image has computed, call by call."""
    return spied('apply_to_image', monkeypatch)


@pytest.fixture
def learned(monkeypatch):
    """Collects whether a layer has learned by one call."""
    return spied('learn', monkeypatch)


def made(name, norm='BN1d'):
    kind, args, kwargs, shape = LAYERS[name]
    layer = kind(*args, **kwargs, attention_norm_cfg=dict(type=norm)).eval()
    for parameter in layer.attention.parameters():
        parameter.data.uniform_(-1, 1)
    if norm == 'BN1d':
        layer.attention.norm1.running_mean.normal_()
        layer.attention.norm1.running_var.uniform_(0.5, 2)
    return layer, torch.randn(1, *shape) + 1


def by_the_whole_way(layer, x):
    """As one image of a batch, each of which has a kernel of its own."""
    return layer(torch.cat([x, torch.zeros_like(x)]))[:1]


@pytest.mark.parametrize('norm', ['BN1d', 'LN'])
@pytest.mark.parametrize('name', LAYERS)
def test_it_is_computed_as_in_a_batch(name, norm, at_once):
    layer, x = made(name, norm)
    with torch.no_grad():
        y = layer(x)
        assert at_once == [True]
        torch.testing.assert_close(y, by_the_whole_way(layer, x))
        # What the next call computes is elsewhere.
        kept = y.clone()
        other = layer(x + 1)
        assert torch.equal(y, kept) and not torch.equal(y, other)
        # Activations change the result in place.
        torch.testing.assert_close(nn.ReLU(inplace=True)(y), kept.relu())
    with torch.inference_mode():
        assert torch.equal(layer(x), kept)
    # And what learns has its gradients.
    assert layer(x).requires_grad
    assert at_once == [True] * 3 + [False]


@pytest.mark.parametrize('name', ['3x3', '1x1', '1x1 of every other pixel', 'depthwise', '3d'])
def test_channels_lie_as_a_static_layer_lays_them(name, at_once):
    layer, x = made(name)
    last = torch.channels_last_3d if name == '3d' else LAST
    twin, x = layer.static_twin(), x.to(memory_format=last)
    twin.weight.data = torch.randn(twin.weight.shape)
    with torch.no_grad():
        y = layer(x)
        assert at_once == [True]
        if name != '3d':
            assert y.is_contiguous(memory_format=last) and twin(x).is_contiguous(memory_format=last)
        torch.testing.assert_close(y, by_the_whole_way(layer, x.contiguous()))


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('autocast', [False, True])
def test_in_half_precision(name, autocast, at_once):
    """It comes as near to the result in single precision as a batch does."""
    layer, x = made(name)
    with torch.no_grad():
        right = by_the_whole_way(layer, x)
        if not autocast:
            layer, x = layer.bfloat16(), x.bfloat16()
        with torch.autocast('cpu', enabled=autocast):
            y, other = layer(x), by_the_whole_way(layer, x)
    assert y.dtype == other.dtype == torch.bfloat16
    assert at_once == [True]
    assert (y - right).norm() < 1.2 * (other - right).norm() < 0.1 * right.norm()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def heat(layer):
    set_temperature(layer, 0.5)


def train(layer):
    layer.train()


def hook(layer):
    layer.attention.register_forward_hook(lambda *args: args[-1] / 2)


def hook_inside(layer):
    layer.attention.fc1.register_forward_hook(lambda *args: args[-1] / 2)


def hook_before(layer):
    layer.attention.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 2,))


def replace_a_part(layer):
    part = layer.attention.fc2
    layer.attention.fc2 = Doubled(part.in_features, part.out_features)


def replace_the_attention(layer):
    layer.attention = nn.Sequential(layer.attention, nn.Hardtanh(-0.1, 0.1))


def derive_the_attention(layer):
    class Halved(type(layer.attention)):
        def forward(self, pooled):
            return super().forward(pooled) / 2

    layer.attention.__class__ = Halved


def patch(layer):
    attend = layer.attention.forward
    layer.attention.forward = lambda pooled: attend(pooled) / 2


def prune_cells(layer):
    prune.l1_unstructured(layer.warehouse_manager.weights, '0', amount=0.5)


def parametrize_a_part(layer):
    nn.utils.parametrizations.weight_norm(layer.attention.fc1)
    layer.attention.fc1.parametrizations.weight.original0.data.mul_(2)


def quantize(layer):
    quantize_cells(layer)


def to_double(layer):
    layer.double()


CHANGES = [heat, train, hook, hook_inside, hook_before, replace_a_part, replace_the_attention]
CHANGES += [derive_the_attention, patch, prune_cells, parametrize_a_part, quantize, to_double]


@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_counts(change, at_once, monkeypatch):
    layer, x = made('3x3', 'BN1d')
    with torch.no_grad():
        before = layer(x)
        assert at_once == [True]
        change(layer)
        x = x.to(next(layer.attention.parameters()).dtype)
        changed = copy.deepcopy(layer) if change is train else layer
        y = changed(x)
        assert not any(at_once[1:])
        monkeypatch.setattr(module, 'apply_to_image', lambda *args: None)
        monkeypatch.setattr(backend, '_switched_on', False)
        torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-4)
        if change not in (train, quantize, to_double):
            assert not torch.allclose(y, before, atol=1e-3)


def test_values_and_settings_changed_later_count(at_once):
    layer, x = made('3x3')
    with torch.no_grad():
        layer(x)
        layer.cells.mul_(2)
        layer.attention.fc2.weight = nn.Parameter(layer.attention.fc2.weight * 3)
        layer.attention.norm1.running_mean = layer.attention.norm1.running_mean + 1
        layer.bias.fill_(5)
        layer.stride, layer.dilation = 1, (2, 1)
        torch.testing.assert_close(layer(x), by_the_whole_way(layer, x))
    assert at_once == [True, True]


def test_cast_images_are_refused_as_by_a_static_layer():
    layer, x = made('3x3')
    static = nn.Conv2d(8, 16, 3)
    for module_ in (static, layer):
        with torch.no_grad(), pytest.raises(RuntimeError, match='should be the same'):
            module_(x.bfloat16())


def test_threads_have_memory_of_their_own(at_once):
    layer, x = made('3x3')
    images = [x + shift for shift in range(4)]
    with torch.no_grad():
        right = [layer(image) for image in images]
    faults = []

    def work(image, expected):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(layer(image), expected):
                    faults.append(image)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(images, right)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert len(at_once) == 204 and all(at_once)


def learning(layer, images, frozen=(), dtype=None, autocast=False):
    """Results, gradients, gradients of gradients, and statistics, of a copy of the layer."""
    layer, x = copy.deepcopy(layer), images.clone().to(dtype or images.dtype)
    if dtype is not None:
        layer.to(dtype)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    x.requires_grad_('x' not in frozen)
    inputs = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        y = layer(x)
    # The slope is small where the result is large, as after a norm.
    loss = y.to(torch.float64).tanh().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(map(torch.equal, first, again))
    seconds: tuple = ()
    if not autocast:
        slopes = torch.autograd.grad(loss, inputs, create_graph=True)
        steep = sum(slope.square().sum() for slope in slopes)
        seconds = torch.autograd.grad(steep, inputs, allow_unused=True, materialize_grads=True)
    found = (y.detach(), *first, *layer.buffers()), seconds
    return [[tensor.double() for tensor in tensors] for tensors in found]


def assert_alike(found, right):
    """Norms by few images round what goes through them, gradients of gradients more."""
    for tensors, exact_tensors, rounding in zip(found, right, (2e-3, 2e-2), strict=True):
        for ours, exact in zip(tensors, exact_tensors, strict=True):
            assert ours.shape == exact.shape
            assert (ours - exact).norm() <= rounding * exact.norm() + 1e-6


def batch_of(x, images):
    return torch.cat([x, 1 - 2 * x, x.flip(-1)])[:images]


@pytest.mark.parametrize('images', [1, 3])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('norm', ['BN1d', 'LN'])
@pytest.mark.parametrize('name', LAYERS)
def test_it_learns_as_by_its_steps(name, norm, training, images, learned):
    """In float64 the steps compute, one after the other."""
    layer, x = made(name, norm)
    set_temperature(layer.train(training), 0.3 * training)
    x = batch_of(x, images)
    found = learning(layer, x)
    assert learned == [True]
    right = learning(layer, x, dtype=torch.float64)
    assert learned == [True]
    assert_alike(found, right)


FROZEN = [('x',), ('warehouse_manager',), ('attention',), ('bias',), ('attention.norm1', 'x')]
FROZEN += [
    ('attention.fc2',),
    ('x', 'attention'),
    ('x', 'attention', 'bias'),
    ('warehouse', 'bias'),
]


@pytest.mark.parametrize('frozen', FROZEN)
@pytest.mark.parametrize('name', ['3x3', 'around the edges', 'tokens', '1x1 of every other pixel'])
def test_parts_of_it_learn(name, frozen, learned):
    layer, x = made(name)
    layer.train()
    found = learning(layer, batch_of(x, 3), frozen)
    # A constant attention is computed once, and kept.
    assert learned == [] if {'x', 'attention'} <= set(frozen) else [True]
    right = learning(layer, batch_of(x, 3), frozen, dtype=torch.float64)
    assert_alike(found, right)


@pytest.mark.parametrize('name', LAYERS)
def test_it_learns_from_several_blocks_of_images(name, learned, monkeypatch):
    layer, x = made(name)
    layer.train()
    whole = learning(layer, batch_of(x, 3))
    monkeypatch.setitem(mixing.BLOCK_BYTES, 'cpu', 1)
    assert_alike(learning(layer, batch_of(x, 3)), whole)
    assert learned == [True, True]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', LAYERS)
def test_it_learns_under_autocast(name, dtype, learned, monkeypatch):
    """As near to float64 as the steps come, from images in either precision."""
    layer, x = made(name)
    x = batch_of(x, 3).to(dtype)
    exact = learning(layer.train(), x, dtype=torch.float64)
    found = learning(layer, x, autocast=True)
    assert learned == [True]
    monkeypatch.setattr(module, 'learn', lambda *args: None)
    steps = learning(layer, x, autocast=True)
    for ours, theirs, right in zip(found[0], steps[0], exact[0], strict=True):
        bound = 1.5 * (theirs - right).norm() + 1e-2 * right.norm() + 1e-6
        assert (ours - right).norm() <= bound


@pytest.mark.parametrize('register', ['register_forward_hook', 'register_full_backward_hook'])
@pytest.mark.parametrize('part', ['', 'fc1', 'norm1', 'relu'])
def test_hooks_of_its_attention_are_called(part, register, learned):
    layer, x = made('3x3')
    calls = []
    getattr(layer.attention.get_submodule(part), register)(lambda *_: calls.append(part))
    layer(batch_of(x, 3).requires_grad_()).sum().backward()
    assert calls == [part] and not learned


def test_what_it_needs_may_not_change_before_the_gradient(learned):
    """As of a static layer."""
    layer, x = made('1x1')
    for made_of in (layer, layer.static_twin()):
        images = batch_of(x, 3)
        y = made_of(images.requires_grad_())
        images.detach().mul_(2)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            y.sum().backward()
        # Activations change the result in place.
        y = made_of(images)
        torch.testing.assert_close(nn.ReLU(inplace=True)(y), made_of(images).relu())
        y.sum().backward()
    assert learned == [True] * 3


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize(
    'make',
    [
        lambda: KWConv2d(8, 16, 3, padding=1, padding_mode='circular'),
        lambda: KWConv2d(8, 16, 2, padding='same'),
    ],
)
def test_what_is_averaged_alone_may_change(make, autocast, learned):
    """Padded or cast images are what a static layer keeps, too."""
    layer = make()
    frozen = torch.nn.Conv2d(8, 8, 1)
    for module_of in (layer, layer.static_twin()):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            images = torch.randn(4, 8, 9, 8, requires_grad=True) * 1
            y = module_of(images)
            images.add_(1)
            y.float().sum().backward()
            with torch.inference_mode():
                images = frozen(torch.randn(4, 8, 9, 8)).float()
            module_of(images).float().sum().backward()
    assert learned == [True] * 2


def test_a_constant_attention_may_change_before_gradients_of_gradients(learned):
    layer, x = made('3x3')
    layer.attention.requires_grad_(False)
    y = layer(batch_of(x, 3))
    with torch.no_grad():
        layer.attention.fc2.weight.mul_(1.1)
    assert torch.autograd.grad(y.square().sum(), [layer.cells], create_graph=True)
    assert not learned


class Centred(KWConv2d):
    @property
    def cells(self):
        cells = super().cells
        return cells - cells.mean()


def test_cells_are_those_of_the_class(at_once, learned):
    torch.manual_seed(0)
    layer, x = Centred(8, 16, 3).eval(), torch.randn(1, 8, 9, 8)
    right = copy.deepcopy(layer).double()(x.double())
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), right, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(x).double(), right, atol=1e-4, rtol=1e-4)
    assert not at_once and not learned


class Halved(KWConv2d):
    @property
    def attention(self):
        of_layer = self._modules['attention']
        return lambda pooled: of_layer(pooled) / 2


def test_attentions_are_those_of_the_class(at_once, learned):
    torch.manual_seed(0)
    layer, x = Halved(8, 16, 3, bias=False).eval(), torch.randn(1, 8, 9, 8)
    whole = KWConv2d(8, 16, 3, bias=False).eval()
    whole.load_state_dict(layer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole(x) / 2, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(x), whole(x) / 2, atol=1e-4, rtol=1e-4)
    assert at_once == [True, False] and learned == [True]

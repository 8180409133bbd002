"""Dynamic layers under what PyTorch does to a network, their static twins beside them."""

import contextlib
import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from distributed_worker import Chain
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmkw import KWConv1d, KWConv2d, KWConv3d, KWLinear, SharingPlan, convert
from mmkw.ops import backend, mixing
from mmkw.ops.compiled import MISSING

PATHS = [
    pytest.param(
        True, marks=pytest.mark.skipif(MISSING is not None, reason=f'compiled kernels: {MISSING}')
    ),
    False,
]
LN = dict(attention_norm_cfg=dict(type='LN'))
# By name: a dynamic layer, its static twin, the shape of an image.
LAYERS = {
    '3x3': (lambda: KWConv2d(4, 6, 3, padding=1, **LN), lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    '1x1': (lambda: KWConv2d(4, 6, 1, **LN), lambda: nn.Conv2d(4, 6, 1), (4, 5, 5)),
    'depthwise': (
        lambda: KWConv2d(4, 4, 3, groups=4, **LN),
        lambda: nn.Conv2d(4, 4, 3, groups=4),
        (4, 5, 5),
    ),
    '1d': (lambda: KWConv1d(4, 6, 3, **LN), lambda: nn.Conv1d(4, 6, 3), (4, 6)),
    '3d': (lambda: KWConv3d(4, 4, 2, **LN), lambda: nn.Conv3d(4, 4, 2), (4, 3, 3, 3)),
    'linear': (lambda: KWLinear(4, 6, **LN), lambda: nn.Linear(4, 6), (5, 4)),
}
each_layer = pytest.mark.parametrize('kind', LAYERS)


@pytest.fixture(params=PATHS, ids=['compiled', 'pytorch'], autouse=True)
def compiled(request, monkeypatch):
    monkeypatch.setattr(backend, '_switched_on', request.param)
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=['float', 'double'])
def precision(request):
    return request.param


def twins(kind, precision=torch.float32, batch=3):
    """The dynamic and the static layer, and images for both."""
    dynamic, static, shape = LAYERS[kind]
    torch.manual_seed(0)
    layers = [dynamic().to(precision), static().to(precision)]
    return layers, torch.randn(batch, *shape, dtype=precision)


def chains(precision=torch.float32):
    """A network of a shared warehouse, and its static twin."""
    torch.manual_seed(0)
    static = Chain().to(precision)
    plan = SharingPlan.make([('a', 'one'), ('b', 'one')], cell_num_ratio=2)
    return [convert(copy.deepcopy(static), plan, dict(type='LN')), static]


def close(found, expected, precision):
    tolerance = 1e-4 if precision == torch.float32 else 1e-9
    for value, right in zip(found, expected, strict=True):
        scale = right.abs().max().item() + 1e-6
        torch.testing.assert_close(value, right, atol=tolerance * scale, rtol=tolerance)


# Derivatives


@each_layer
def test_the_first_gradient_is_the_same_with_and_without_a_graph(kind, precision):
    layers, x = twins(kind, precision)
    cases = [(layer, x) for layer in layers]
    if kind == '3x3':
        cases += [
            (network, torch.randn(2, 8, 5, 5, dtype=precision)) for network in chains(precision)
        ]
    for layer, images in cases:
        image = images.clone().requires_grad_()
        inputs = [image, *layer.parameters()]
        loss = layer(image).square().sum()
        plain = torch.autograd.grad(loss, inputs, retain_graph=True)
        graphed = torch.autograd.grad(loss, inputs, create_graph=True)
        close(graphed, plain, precision)
        by_function = torch.func.grad(lambda image, layer=layer: layer(image).square().sum())
        close([by_function(image.detach())], plain[:1], precision)


@each_layer
def test_second_derivatives_of_whole_layers(kind):
    for layer in twins(kind, torch.float64)[0]:
        image = twins(kind, torch.float64, batch=1)[1]

        def loss(image, layer=layer):
            return layer(image).square().sum()

        expected = torch.func.hessian(loss)(image)
        close([torch.autograd.functional.hessian(loss, image)], [expected], torch.float64)
        close(
            [torch.autograd.functional.hessian(loss, image, vectorize=True)],
            [expected],
            torch.float64,
        )


@each_layer
def test_forward_mode_and_batched_gradients(kind, precision):
    layers, x = twins(kind, precision)
    direction = torch.randn_like(x)
    for layer in layers:
        image = x.clone().requires_grad_()
        y = layer(image)
        grads = torch.randn(2, *y.shape, dtype=precision)
        expected = [torch.autograd.grad(y, image, grad, retain_graph=True)[0] for grad in grads]
        _, slope = torch.func.jvp(layer, (x,), (direction,))
        found = (slope * grads[0]).sum(), (expected[0] * direction).sum()
        close(found[:1], found[1:], precision)
        batched = torch.autograd.grad(y, image, grads, is_grads_batched=True, retain_graph=True)
        close(batched, [torch.stack(expected)], precision)
        jacobian = torch.autograd.functional.jacobian(layer, x)
        close([torch.autograd.functional.jacobian(layer, x, vectorize=True)], [jacobian], precision)
        close([torch.func.jacrev(layer)(x), torch.func.jacfwd(layer)(x)], [jacobian] * 2, precision)
        per_image = torch.func.vmap(lambda image, layer=layer: layer(image[None])[0])(x)
        close([per_image], [torch.cat([layer(image[None]) for image in x])], precision)


# Recomputation and memory


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('batch', [1, 4])
def test_activations_may_be_recomputed(monkeypatch, reentrant, batch):
    """Also where some kernels are kept for the backward pass."""
    monkeypatch.setattr(mixing, 'KEPT_CELLS', 1)
    monkeypatch.setitem(mixing.BLOCK_BYTES, 'cpu', 1)
    for network in chains():
        cells = getattr(network, 'warehouse_manager', None)
        if cells is not None:
            monkeypatch.setitem(mixing.KEPT_BYTES, 'cpu', 8 * cells.weights[0].numel())
        image = torch.randn(batch, 8, 5, 5, requires_grad=True)
        network(image).square().sum().backward()
        expected = [p.grad.clone() for p in network.parameters()]
        for _ in range(2):
            network.zero_grad()
            checkpoint(network, image, use_reentrant=reentrant).square().sum().backward()
            close([p.grad for p in network.parameters()], expected, torch.float32)


class Box:
    """Holds a saved tensor; gone when the graph is."""

    def __init__(self, tensor):
        # An output would hold its node, which holds this.
        self.tensor = tensor.detach()


@contextlib.contextmanager
def graphs_are_counted():
    boxes = weakref.WeakSet()

    def pack(tensor):
        box = Box(tensor)
        boxes.add(box)
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        yield boxes


def to_the_image(network, image):
    torch.autograd.grad(network(image).square().sum(), image)


def to_chosen_inputs(network, image):
    network(image).square().sum().backward(inputs=[image, network.b.bias])


def repeatedly(network, image):
    loss = network(image).square().sum()
    for _ in range(3):
        torch.autograd.grad(loss, image, retain_graph=True)


def until_an_error(network, image):
    # Not the leaf itself: where saved tensors have hooks, torch 2.6 does not call the hooks of a
    # leaf that is an input of any autograd.Function.
    image = image * 1
    y = network(image)
    image.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.square().sum().backward()


def nowhere(network, image):
    network(image)


@pytest.mark.parametrize(
    'use', [to_the_image, to_chosen_inputs, repeatedly, until_an_error, nowhere]
)
def test_a_backward_pass_that_stops_early_keeps_nothing(use):
    for network in chains():
        with graphs_are_counted() as boxes:
            use(network, torch.randn(2, 8, 5, 5, requires_grad=True))
        gc.collect()
        assert not len(boxes)
        # And the next one is right.
        image = torch.randn(2, 8, 5, 5, requires_grad=True)
        network.zero_grad()
        network(image).square().sum().backward()
        found = [p.grad.clone() for p in network.parameters()]
        fresh = copy.deepcopy(network)
        fresh.zero_grad()
        fresh(image).square().sum().backward()
        close(found, [p.grad for p in fresh.parameters()], torch.float32)


@pytest.mark.parametrize('threads', [1, 2, 3])
def test_threads_share_a_network(threads):
    """Each with passes of its own, of PyTorch's threads as many as there may be."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for network in chains():
            images = torch.randn(4, 3, 8, 6, 6)

            def gradients(image, network=network):
                inputs = [image.clone().requires_grad_(), *network.parameters()]
                return torch.autograd.grad(network(inputs[0]).square().sum(), inputs)

            expected = list(map(gradients, images))
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(gradients, [*images] * 5))
            for index, result in enumerate(found):
                close(result, expected[index % 4], torch.float32)
    finally:
        torch.set_num_threads(before)


# Modes


@each_layer
def test_no_mode_leaves_anything_behind(kind, precision):
    layers, x = twins(kind, precision)
    for layer in layers:
        expected = layer(x).detach()
        with torch.inference_mode():
            close([layer(x)], [expected], precision)
        layer(x).square().sum().backward()
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert layer(x).shape == expected.shape
        assert type(layer(x).detach()) is torch.Tensor
        with torch.device('meta'):
            close([layer(x)], [expected], precision)
        close([layer(x)], [expected], precision)
        layer(x).square().sum().backward()
        shadow = copy.deepcopy(layer).to('meta')
        assert shadow(x.to('meta')).shape == expected.shape


def test_operations_are_counted():
    """Those of the static layer, of mixing, and of the attention's two products."""
    dynamic, static = KWConv2d(16, 16, 3, bias=False, **LN), nn.Conv2d(16, 16, 3, bias=False)
    x, counts = torch.randn(2, 16, 6, 6), []
    for layer in (dynamic, static):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x)
        counts.append(counter.get_total_flops())
    cells, attention = dynamic.cells, dynamic.attention
    mixtures, n = attention.num_mixtures, len(cells)
    linear = attention.fc1.weight.numel() + attention.fc2.weight.numel()
    assert counts[0] == counts[1] + 2 * 2 * mixtures * n * cells[0].numel() + 2 * 2 * linear


@each_layer
@pytest.mark.parametrize('layout', [torch.channels_last, torch.channels_last_3d])
def test_memory_formats(kind, layout, precision):
    """What ``Module.to`` says of tensors of four or five dimensions is about images, not cells."""
    layers, x = twins(kind, precision)
    for layer in layers:
        expected = layer(x)
        dims = dict(zip((torch.channels_last, torch.channels_last_3d), (4, 5)))[layout]
        static_fits = all(p.dim() in (0, 1, 2, 3, dims) for p in layer.parameters())
        if layer is layers[1] and not static_fits:
            continue
        layer.to(memory_format=layout)
        image = x.to(memory_format=layout) if x.dim() == dims else x
        close([layer(image)], [expected], precision)


def counted(layer, x):
    x = x.clone().requires_grad_()
    with FlopCounterMode(display=False):
        layer(x).square().sum().backward()
    return [x.grad, layer.bias.grad]


def of_gradients(layer, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), [x, layer.bias])


def of_functions(layer, x):
    def loss(bias):
        return torch.func.functional_call(layer, {'bias': bias}, x).square().sum()

    return [torch.func.grad(loss)(layer.bias.detach())]


def by_a_graph(layer, x):
    x = x.clone().requires_grad_()
    torch.compile(layer, backend='aot_eager')(x).square().sum().backward()
    return [x.grad, layer.bias.grad]


@pytest.mark.parametrize('take', [counted, of_gradients, of_functions, by_a_graph])
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('kernel', [1, 3, (3, 1)])
def test_gradients_of_one_output_channel(take, batch, layout, kernel):
    """Such as of predictions of an object: PyTorch's gradients take no strided view of a kernel."""
    torch.compiler.reset()
    static = nn.Conv2d(6, 1, kernel).double()
    layer = KWConv2d(6, 1, kernel, **LN).double()
    layer.load_state_dict(static.state_dict())
    x = torch.randn(batch, 6, 8, 8, dtype=torch.double).to(memory_format=layout)
    close(take(layer, x), take(static, x), torch.double)


def test_an_attention_may_be_replaced_hooked_and_quantized():
    layer, x = KWConv2d(8, 8, 3, **LN).eval(), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        expected = layer(x)
        seen = []
        handle = layer.attention.fc1.register_forward_hook(lambda *args: seen.append(1))
        close([layer(x)], [expected], torch.float32)
        assert seen
        handle.remove()
        layer.attention.fc1 = nn.Sequential(layer.attention.fc1)
        close([layer(x)], [expected], torch.float32)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_linear_layers_quantized_dynamically():
    for network in (nn.Sequential(KWConv2d(8, 8, 3, **LN)), nn.Sequential(nn.Linear(5, 5))):
        network.eval()
        x = torch.randn(2, 8, 5, 5)
        with torch.no_grad():
            expected = network(x)
            quantized = torch.ao.quantization.quantize_dynamic(network, {nn.Linear})
            torch.testing.assert_close(quantized(x), expected, atol=0.1, rtol=0.1)


def test_a_norm_without_bias():
    layer, x = KWConv2d(8, 8, 3, **LN).eval(), torch.randn(2, 8, 5, 5)
    width = layer.attention.fc1.out_features
    layer.attention.norm1 = nn.LayerNorm(width, bias=False)
    expected = layer(x).detach()
    with torch.no_grad():
        close([layer(x)], [expected], torch.float32)


@pytest.mark.parametrize('kind', ['3x3', '1x1', 'depthwise', 'linear'])
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')
def test_a_trace_is_right_for_any_batch(kind):
    layers, x = twins(kind)
    for layer in layers:
        layer.eval()
        for batch in (1, 3):
            traced = torch.jit.trace(layer, x[:batch])
            for other in (1, 2, 3):
                close([traced(x[:other])], [layer(x[:other])], torch.float32)
            larger = torch.cat([x, x], -2)
            close([traced(larger)], [layer(larger)], torch.float32)


def test_parameters_of_any_strides():
    """Slices of stacked models, as ``torch.func.stack_module_state`` gives them."""
    for make in (lambda: KWConv2d(8, 8, 3), lambda: nn.Conv2d(8, 8, 3)):
        layer = make().eval()
        if hasattr(layer, 'attention'):
            layer.attention.norm1.running_var.uniform_(0.5, 2)
        state = layer.state_dict()
        x = torch.randn(2, 8, 5, 5)
        with torch.no_grad():
            expected = layer(x)
            strided = {k: torch.stack([v, v + 1], -1)[..., 0] for k, v in state.items()}
            close([torch.func.functional_call(layer, strided, x)], [expected], torch.float32)
            layer.load_state_dict(strided, assign=True)
            close([layer(x)], [expected], torch.float32)
            if hasattr(layer, 'attention'):
                norm = layer.attention.norm1
                norm.running_mean = torch.zeros(1).expand(norm.num_features)
                norm.running_var = torch.ones(1).expand(norm.num_features)
                found = layer(x)
                norm.running_mean = norm.running_mean.contiguous()
                norm.running_var = norm.running_var.contiguous()
                with torch.enable_grad():
                    close([found], [layer(x).detach()], torch.float32)


# Construction without memory


@each_layer
def test_a_layer_made_without_memory(kind, precision):
    for index in (0, 1):
        source = twins(kind, precision)[0][index]
        x = twins(kind, precision)[1]
        with torch.device('meta'):
            taken, emptied = twins(kind, precision)[0][index], twins(kind, precision)[0][index]
        taken.load_state_dict(source.state_dict(), assign=True)
        close([taken(x)], [source(x)], precision)
        emptied.to_empty(device='cpu')
        for module in emptied.modules():
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        assert all(p.isfinite().all() and p.abs().max() < 100 for p in emptied.parameters())
        emptied.load_state_dict(source.state_dict())
        close([emptied(x)], [source(x)], precision)


class Held(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, x):
        return self.held(x)


@pytest.mark.parametrize('norm', ['BN1d', 'LN'])
def test_a_network_made_without_memory(norm):
    """It takes its own tensors as they are, or memory and then the weights of a static network."""

    def make():
        layers = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        return Held(nn.Sequential(*layers))

    def made_dynamic(network):
        plan = SharingPlan.make([('held.0', 'one'), ('held.2', 'one')])
        return convert(network, plan, dict(type=norm))

    static = make()

    x = torch.randn(2, 8, 7, 7)
    source = made_dynamic(copy.deepcopy(static)).eval()
    with torch.device('meta'):
        made = [made_dynamic(make()) for _ in range(2)]
    made += [made_dynamic(make().to('meta')) for _ in range(2)]
    weights = static.state_dict()
    for taken, emptied in (made[:2], made[2:]):
        taken.load_state_dict(source.state_dict(), assign=True)
        torch.testing.assert_close(taken.eval()(x), source(x))
        with pytest.raises(RuntimeError, match=r'meta device.*to_empty'):
            emptied.load_state_dict(weights, assign=True)
        emptied.to_empty(device='cpu')
        emptied.load_state_dict(weights)
        emptied.train()(x).square().sum().backward()
        assert all(p.isfinite().all() and p.grad.isfinite().all() for p in emptied.parameters())
        assert emptied.held[0].attention.fc2.weight.grad.any(), 'attentions learn'
        with torch.no_grad():
            found, expected = (net.eval().held[2](x) for net in (emptied, static))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# Empty inputs


def test_a_map_without_pixels_is_refused_as_its_twin_does():
    for layer in (KWConv2d(4, 4, 1), nn.Conv2d(4, 4, 1)):
        state = copy.deepcopy(layer.state_dict())
        with pytest.raises((ValueError, RuntimeError)):
            layer(torch.randn(2, 4, 0, 4))
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_no_tokens_give_none():
    for layer in (KWLinear(4, 6), nn.Linear(4, 6)):
        state = copy.deepcopy(layer.state_dict())
        x = torch.randn(2, 0, 4, requires_grad=True)
        y = layer(x)
        assert y.shape == (2, 0, 6)
        y.sum().backward()
        assert not any(p.grad.any() for p in layer.parameters()) and x.grad.shape == x.shape
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())

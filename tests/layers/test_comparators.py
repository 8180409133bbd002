"""DY-Conv, CondConv and ODConv: what their papers say, on the engine of dynamic layers."""

import copy
import inspect

import numpy as np
import plain_reference as plain
import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer
from torch import nn
from torch.nn import functional as F

import mmkw
from mmkw.deploy import export
from mmkw.layers import PlanError
from mmkw.ops import exported, use_compiled

CLASSES = dict(dyconv=mmkw.DYConv2d, condconv=mmkw.CondConv2d, odconv=mmkw.ODConv2d)
# Method, options, arguments of nn.Conv2d.
LAYERS = [
    ('dyconv', {}, dict(kernel_size=3, padding=1)),
    ('dyconv', dict(cell_num_ratio=2, reduction=0.5), dict(kernel_size=1, groups=2)),
    ('condconv', dict(cell_num_ratio=3), dict(kernel_size=3, stride=2, bias=False)),
    ('condconv', {}, dict(kernel_size=(1, 3), padding='same', out_channels=4, groups=4)),
    ('odconv', {}, dict(kernel_size=3, padding=1)),
    ('odconv', dict(cell_num_ratio=4), dict(kernel_size=(2, 3), groups=2, dilation=2)),
    ('odconv', dict(cell_num_ratio=3), dict(kernel_size=1, stride=2)),
    ('odconv', dict(cell_num_ratio=2), dict(kernel_size=3, out_channels=4, groups=4)),
    ('odconv', {}, dict(kernel_size=3, padding=1, padding_mode='circular', bias=False)),
]


def make(method, options, conv, double=False):
    layer = CLASSES[method](**{'in_channels': 4, 'out_channels': 6, **conv, **options})
    with torch.no_grad():
        for parameter in layer.attention.parameters():
            # Norms and biases start where a mistake would not show.
            parameter.add_(torch.randn_like(parameter) / 3)
    return layer.double() if double else layer


def by_loops(layer, x, tau, train):
    state = {name: tensor.detach().numpy() for name, tensor in layer.attention.state_dict().items()}
    x, kernels = x.detach().numpy(), layer.cells.detach().numpy()
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    depthwise = layer.groups == layer.in_channels == layer.out_channels
    pooled = x.mean((2, 3))
    taps = kernels[0, 0, 0].size
    attentions = plain.comparator(layer.method, pooled, state, tau, depthwise, taps, train)
    settings = (bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return np.stack(
        [
            plain.convolve(
                image,
                plain.comparator_kernel(found, kernels, layer.groups),
                *settings,
                layer.padding_mode,
            )
            for image, found in zip(x, attentions)
        ]
    )


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('method, options, conv', LAYERS)
def test_layer_computes_what_its_paper_says(method, options, conv, train):
    layer = make(method, options, conv, double=True).train(train)
    x = torch.randn(3, 4, 6, 5, dtype=torch.double)
    for tau in (0.0, 0.3):
        mmkw.set_temperature(layer, tau)
        expected = by_loops(layer, x, tau, train)
        with torch.no_grad():
            np.testing.assert_allclose(layer(x).numpy(), expected, atol=1e-10)
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-10)


@pytest.mark.parametrize('method, options, conv', LAYERS)
def test_an_image_alone_gives_what_it_gives_in_a_batch(method, options, conv):
    layer = make(method, options, conv).eval()
    x = torch.randn(4, 4, 6, 5)
    torch.testing.assert_close(torch.cat([layer(image[None]) for image in x]), layer(x))
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    assert layer(x[:0]).shape == (0, *layer(x).shape[1:])


@pytest.mark.parametrize('method, options, conv', LAYERS)
def test_gradients_are_those_of_finite_differences(method, options, conv):
    layer = make(method, options, conv, double=True).eval()
    mmkw.set_temperature(layer, 0.1)
    names, values = zip(*layer.named_parameters())

    def computed(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))

    x = torch.randn(2, 4, 4, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(computed, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(computed, (x, *values), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize('method, options, conv', LAYERS)
def test_blocks_and_the_whole_batch_agree(method, options, conv):
    """The engine's own backward passes, compiled and by PyTorch, beside autograd's."""
    layer = make(method, options, conv)
    # A batch whose kernels come in several blocks.
    x = torch.randn(5, 4, 6, 5)
    grads = []
    for way in ('compiled', 'blocks', 'autograd'):
        layer.zero_grad()
        use_compiled(way == 'compiled')
        try:
            if way == 'autograd':
                y = torch.func.vmap(lambda scale: layer.eval()(x * scale))(torch.ones(1))[0]
            else:
                y = layer.eval()(x)
            y.square().sum().backward()
        finally:
            use_compiled(True)
        grads.append({name: parameter.grad for name, parameter in layer.named_parameters()})
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('method, options, conv', LAYERS)
def test_warm_start_is_exact_at_every_temperature(method, options, conv):
    layer = make(method, options, conv)
    static = nn.Conv2d(**{'in_channels': 4, 'out_channels': 6, **conv})
    result = layer.load_state_dict(static.state_dict(), strict=False)
    assert not result.unexpected_keys
    x = torch.randn(3, 4, 6, 5)
    for tau in (0.0, 0.5, 1.0):
        mmkw.set_temperature(layer, tau)
        for train in (True, False):
            torch.testing.assert_close(layer.train(train)(x), static(x), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(layer.static_twin().weight, static.weight)
    torch.testing.assert_close(layer.static_twin()(x), static(x))


@pytest.mark.parametrize('method, options', [('dyconv', {}), ('condconv', {}), ('odconv', {})])
def test_warm_started_kernels_learn_apart(method, options):
    layer = CLASSES[method](4, 6, 3, cell_num_ratio=4, **options)
    layer.load_state_dict(nn.Conv2d(4, 6, 3).state_dict(), strict=False)
    x = torch.randn(6, 4, 5, 5) + torch.randn(6, 4, 1, 1)
    wanted = torch.randn(6, 6, 3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    start = layer.cells.detach().clone()
    # They differ from the start, by parts that cancel.
    assert (start[0] - start[1]).norm() > start.mean(0).norm() / 2
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(layer(x), wanted).backward()
        optimizer.step()
    moved = (layer.cells - start).flatten(1)
    assert (moved - moved.mean(0)).norm() > 1e-2 * moved.norm() > 0
    kernels = layer.attention(x.mean((2, 3)))
    kernels = kernels if isinstance(kernels, torch.Tensor) else kernels.kernels
    assert kernels.std(-1).min() > 0 and kernels.std(0).max() > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in layer.parameters())


def test_whole_kernels_start_as_a_convolution_s():
    for method in CLASSES:
        cells = CLASSES[method](64, 64, 3, cell_num_ratio=4).cells
        assert cells.shape == (4, 64, 64, 3, 3)
        for kernel in cells:
            assert kernel.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize('method, options, conv', LAYERS)
def test_state_dict_and_copies(method, options, conv):
    layer, other = make(method, options, conv).eval(), make(method, options, conv).eval()
    x = torch.randn(2, 4, 6, 5)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer)):
        torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)


def published(layer, prefix=''):
    """The state dict of a layer in the authors' form: ``weight``, and convolutions of size one."""
    state = {}
    for name, tensor in layer.state_dict().items():
        name = name.replace('warehouse_manager.weights.0', 'weight')
        if name.startswith('attention.') and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        state[prefix + name] = tensor.clone()
    return state


@pytest.mark.parametrize('method, options, conv', [case for case in LAYERS if case[0] == 'odconv'])
def test_published_names_of_odconv_load(method, options, conv):
    layer = make(method, options, conv).eval()
    other = nn.ModuleList(
        [CLASSES[method](**{**dict(in_channels=4, out_channels=6), **conv, **options})]
    )
    other.load_state_dict(published(layer, '0.'))
    x = torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(other.eval()[0](x), layer(x), rtol=0, atol=0)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('number, large', [(4, True), (7, False)])
def test_exported_program(number, large, tmp_path, monkeypatch):
    if large:
        monkeypatch.setattr(exported, 'LARGE', 1)
    layer = make(*LAYERS[number])
    parity = export(layer, torch.randn(1, 4, 9, 11), tmp_path / 'layer.pt2')
    assert {found.shape[0] for found in parity} == {1, 2, 3, 5, 8}
    assert max(found.difference for found in parity) < 1e-5


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('number', [2, 5])
def test_exported_onnx(number, tmp_path):
    for package in ('onnx', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(package, reason='writes and runs ONNX')
    layer = make(*LAYERS[number])
    parity = export(layer, torch.randn(1, 4, 9, 11), tmp_path / 'layer.onnx')
    assert {found.shape[0] for found in parity} == {1, 2, 3, 5, 8}
    assert max(found.difference for found in parity) < 1e-5


@pytest.mark.parametrize('method', CLASSES)
def test_conv_cfg_of_mmcv(method):
    kind = CLASSES[method]
    cfg = dict(type=f'mmkw.{kind.__name__}', cell_num_ratio=2)
    conv = build_conv_layer(cfg, 8, 16, 3, padding=1)
    assert type(conv) is kind and len(conv.cells) == 2
    module = ConvModule(8, 16, 3, padding=1, conv_cfg=cfg, norm_cfg=dict(type='BN'))
    module.init_weights()
    y = module(torch.randn(2, 8, 6, 6))
    assert y.shape == (2, 16, 6, 6) and y.isfinite().all()


def test_signatures_name_what_applies():
    def options(kind):
        parameters = inspect.signature(kind).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    assert options(mmkw.DYConv2d) == dict(cell_num_ratio=4, reduction=1 / 4)
    assert options(mmkw.CondConv2d) == dict(cell_num_ratio=8)
    assert set(options(mmkw.ODConv2d)) == {'attention_norm_cfg', 'cell_num_ratio', 'reduction'}


@pytest.mark.parametrize('method', CLASSES)
def test_autocast_and_half_precision(method):
    layer = CLASSES[method](8, 8, 3, padding=1).eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.1, rtol=0.1)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize('method', CLASSES)
@pytest.mark.parametrize('groups', [1, 16])
@pytest.mark.parametrize('autocast', [False, True])
def test_float16_reaches_as_far_as_in_a_static_layer(method, groups, autocast):
    """What a layer that starts from static weights scales cancels out before it overflows."""
    static = nn.Conv2d(16, 16, 3, groups=groups, bias=False)
    nn.init.constant_(static.weight, groups)
    layer = CLASSES[method](16, 16, 3, groups=groups, bias=False)
    layer.load_state_dict(static.state_dict())
    x = torch.full((2, 16, 5, 5), 300.0)
    if not autocast:
        x, layer, static = x.half(), layer.half(), static.half()
    with torch.autocast('cpu', torch.float16, enabled=autocast):
        y, expected = layer.eval()(x), static(x)
    assert y.dtype == expected.dtype == torch.float16
    assert expected.max() > 40_000
    torch.testing.assert_close(y, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    'make, error, message',
    [
        (
            lambda: mmkw.DYConv2d(4, 4, 3, cell_num_ratio=1),
            PlanError,
            "cell_num_ratio is the number of kernels of method='dyconv', a whole number of at "
            'least 2, got 1. By default it is 4',
        ),
        (
            lambda: mmkw.ODConv2d(4, 4, 3, cell_num_ratio=1.5),
            PlanError,
            'a whole number of at least 1, got 1.5',
        ),
        (
            lambda: mmkw.CondConv2d(4, 4, 3, reduction=0.5),
            PlanError,
            "reduction=0.5 does not apply to method='condconv', which takes cell_num_ratio alone",
        ),
        (
            lambda: mmkw.ODConv2d(4, 4, 3, cell_inplane_ratio=0.5),
            PlanError,
            "cell_inplane_ratio=0.5 .*'odconv', which takes cell_num_ratio and reduction alone",
        ),
        (
            lambda: mmkw.DYConv2d(4, 4, 3, spatial_partition=True),
            PlanError,
            'spatial_partition=True does not apply',
        ),
        (
            lambda: mmkw.DYConv2d(4, 4, 3, attention_norm_cfg=dict(type='LN')),
            TypeError,
            'attention_norm_cfg=.*of a DYConv2d has no norm. Leave it out',
        ),
        (
            lambda: mmkw.ODConv2d(4, 4, 3, attention_norm_cfg=dict(type='IN')),
            ValueError,
            'attention_norm_cfg must be such as',
        ),
        (lambda: mmkw.KWConv2d(4, 4, 3, method='odconv'), TypeError, "keyword argument 'method'"),
        (
            lambda: mmkw.SharingPlan.make([('a', 'w')], method='dynamic'),
            PlanError,
            "method must be one of .*'odconv'.*got 'dynamic'",
        ),
        (lambda: mmkw.DYConv2d(4, 4, 3, reduction=1e6), PlanError, 'hidden units.*Lower reduction'),
    ],
)
def test_mistakes_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()

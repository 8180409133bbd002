"""A dynamic layer as its static namesake: arguments, mmcv, copies, state dict."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer
from torch import nn

from mmkw.layers import KWConv1d, KWConv2d, KWConv3d, KWLinear, PlanError, set_temperature
from mmkw.ops.averaging import average

STATIC_CASES = [
    (nn.Conv1d, KWConv1d, (4, 6, 3), dict(stride=2, padding=1), (2, 4, 9)),
    (nn.Conv2d, KWConv2d, (4, 6, 3, 2, 1), dict(bias=False), (2, 4, 9, 8)),
    (nn.Conv2d, KWConv2d, (4, 8, (1, 3)), dict(padding='same', dilation=2), (2, 4, 7, 8)),
    (nn.Conv2d, KWConv2d, (4, 8, 3), dict(padding='valid', groups=2), (2, 4, 7, 8)),
    (nn.Conv2d, KWConv2d, (4, 8, 3), dict(padding=1, padding_mode='circular'), (2, 4, 7, 8)),
    (nn.Conv3d, KWConv3d, (4, 6, 2), dict(groups=2), (2, 4, 3, 4, 5)),
    (nn.Linear, KWLinear, (4, 6), dict(), (2, 3, 4)),
    (nn.Linear, KWLinear, (4, 6), dict(bias=False), (4,)),
]


@pytest.mark.parametrize('static, dynamic, args, kwargs, shape', STATIC_CASES)
def test_takes_the_arguments_of_its_namesake(static, dynamic, args, kwargs, shape):
    static_layer, dynamic_layer = static(*args, **kwargs), dynamic(*args, **kwargs)
    x = torch.randn(shape)
    assert dynamic_layer(x).shape == static_layer(x).shape
    assert dynamic_layer.extra_repr() == static_layer.extra_repr()
    assert (dynamic_layer.bias is None) == (static_layer.bias is None)


# As networks do after they have made their layers, for output of another stride.
CHANGES = [
    dict(stride=(2, 1)),
    dict(stride=2, padding=1),
    dict(padding=(2, 0), dilation=(2, 1)),
    dict(padding='same', dilation=(2, 3)),
    dict(padding='valid'),
    dict(padding_mode='circular'),
    dict(padding_mode='reflect', padding=(2, 2)),
    dict(stride=np.int64(2)),
]


@pytest.mark.parametrize('changes', CHANGES, ids=str)
def test_settings_changed_later_count(changes):
    dynamic = KWConv2d(4, 6, (3, 2), padding=1)
    set_temperature(dynamic, 1)
    static = dynamic.static_twin()
    for layer in (static, dynamic):
        for name, value in changes.items():
            setattr(layer, name, value)
    x = torch.randn(2, 4, 9, 8)
    y = static(x)
    for same in (dynamic, dynamic.static_twin(), copy.deepcopy(dynamic)):
        torch.testing.assert_close(same(x), y)


def test_unbatched_input_is_one_image():
    layer = KWConv2d(4, 6, 3)
    x = torch.randn(4, 8, 8)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_hooks_run_once_for_an_input_without_a_batch():
    for layers, x in (
        ((KWConv2d(4, 6, 3), nn.Conv2d(4, 6, 3)), torch.randn(4, 8, 8)),
        ((KWLinear(4, 6), nn.Linear(4, 6)), torch.randn(4)),
    ):
        for layer in layers:
            calls = []
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append('before'))
            layer.register_full_backward_hook(lambda *_, calls=calls: calls.append('back'))
            layer(x.requires_grad_()).sum().backward()
            assert calls == ['before', 'back']


def test_a_kernel_of_another_orientation_is_refused():
    for sizes in (((1, 3), (3, 1)), ((3, 1), (1, 3))):
        state = nn.Conv2d(4, 4, sizes[0]).state_dict()
        for layer in (KWConv2d(4, 4, sizes[1]), nn.Conv2d(4, 4, sizes[1])):
            with pytest.raises(RuntimeError, match=r'\(4, 4, |torch.Size\(\[4, 4, '):
                layer.load_state_dict(state)
    # A kernel of size one may be a linear layer's.
    KWConv2d(4, 4, 1).load_state_dict(nn.Linear(4, 4).state_dict())


def test_a_layer_is_cast_while_its_last_result_is_held():
    x = torch.randn(2, 4, 5, 5)
    for layer in (KWConv2d(4, 4, 3), nn.Conv2d(4, 4, 3)):
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            held = layer(x.to(next(layer.parameters()).dtype))
            layer.to(dtype)
            layer.zero_grad()
            layer(x.to(dtype)).sum().backward()
            assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {dtype}
            del held


@pytest.mark.parametrize('learning', [True, False])
def test_cells_of_half_precision_learn_where_attentions_are_frozen(learning):
    for norm in ('BN1d', 'LN'):
        layer = KWConv2d(16, 16, 3, attention_norm_cfg=dict(type=norm)).eval()
        precise = copy.deepcopy(layer)
        x = torch.randn(3, 16, 5, 5)
        for part in (layer.bfloat16(), precise):
            part.attention.requires_grad_(False)
            part.warehouse_manager.requires_grad_(learning)
            part(x.to(part.bias.dtype)).square().sum().backward()
        for found, expected in zip(layer.parameters(), precise.parameters()):
            assert (found.grad is None) == (expected.grad is None)
            if found.grad is not None:
                apart = (found.grad - expected.grad).norm() / expected.grad.norm()
                assert found.grad.dtype == torch.bfloat16 and apart < 0.02
        with torch.no_grad():
            assert layer(x[:0].bfloat16()).shape == (0, 16, 3, 3)


def test_an_attention_computes_the_same_with_and_without_gradients():
    """Also where someone has replaced, hooked or patched a part of it."""
    x = torch.randn(2, 16, 5, 5)
    for change in (
        lambda a: setattr(a, 'relu', nn.SiLU()),
        lambda a: a.relu.register_forward_hook(lambda module, inputs, y: 2 * y),
        lambda a: setattr(a.fc1, 'forward', lambda pooled: torch.ones(len(pooled), 16)),
    ):
        layer = KWConv2d(16, 16, 3).eval()
        with torch.no_grad():
            before = layer(x)
        change(layer.attention)
        with torch.no_grad():
            found = layer(x)
        torch.testing.assert_close(found, layer(x))
        assert not torch.allclose(found, before)


@pytest.mark.parametrize('name', ['kw', 'static'])
def test_doubles_stay_doubles_under_autocast(name):
    layers = dict(kw=(KWConv2d, KWLinear), static=(nn.Conv2d, nn.Linear))[name]
    for layer, shape in zip((layers[0](4, 4, 3), layers[1](4, 4)), ((2, 4, 5, 5), (2, 4))):
        with torch.autocast('cpu', torch.bfloat16):
            assert layer.double()(torch.rand(shape).double()).dtype == torch.float64
            assert layer.float()(torch.rand(shape)).dtype == torch.bfloat16


def test_a_map_over_biases_alone():
    for layer, shape in (
        (KWConv2d(4, 4, 1), (2, 4, 5, 5)),
        (nn.Conv2d(4, 4, 1), (2, 4, 5, 5)),
        (KWLinear(4, 4), (2, 4)),
        (nn.Linear(4, 4), (2, 4)),
    ):
        x, biases = torch.rand(shape), torch.rand(3, 4)
        layer.eval()

        def call(bias, layer=layer, x=x):
            return torch.func.functional_call(layer, {'bias': bias}, (x,))

        torch.testing.assert_close(
            torch.vmap(call)(biases), torch.stack([call(bias) for bias in biases])
        )


def test_a_static_kernel_is_loaded_whatever_the_default_device():
    static = nn.Conv2d(4, 4, 3)
    x = torch.randn(2, 4, 5, 5)
    for layer in (KWConv2d(4, 4, 3), nn.Conv2d(4, 4, 3)):
        with torch.device('meta'):
            layer.load_state_dict(static.state_dict())
        torch.testing.assert_close(layer.eval()(x), static(x), atol=1e-5, rtol=1e-5)


def test_budget_counts_the_cells():
    static = nn.Conv2d(32, 64, 3)
    for ratio in (1, 4):
        layer = KWConv2d(32, 64, 3, cell_num_ratio=ratio)
        cells = layer.warehouse_manager.weights[0]
        assert cells.shape == (9 * ratio, 64, 32, 1, 1)
        assert cells.numel() == ratio * static.weight.numel()


def test_device_and_dtype():
    layer = KWConv2d(4, 4, 3, dtype=torch.double, device='cpu')
    assert {p.dtype for p in layer.parameters()} == {torch.double}
    assert {p.device.type for p in KWConv2d(4, 4, 3, device='meta').parameters()} == {'meta'}


@pytest.mark.parametrize('cell_num_ratio', [1, 4])
def test_conv_cfg_of_mmcv(cell_num_ratio):
    cfg = dict(type='mmkw.KWConv2d', cell_num_ratio=cell_num_ratio)
    conv = build_conv_layer(cfg, 8, 16, 3, padding=1)
    assert type(conv) is KWConv2d
    assert len(conv.cells) == 9 * cell_num_ratio
    module = ConvModule(
        8, 16, 3, padding=1, conv_cfg=cfg, norm_cfg=dict(type='BN'), padding_mode='reflect'
    )
    module.init_weights()
    assert module(torch.randn(2, 8, 6, 6)).shape == (2, 16, 6, 6)


def test_state_dict_has_the_published_names():
    layer = KWConv2d(4, 4, 3)
    assert list(layer.state_dict()) == [
        'bias',
        'warehouse_manager.weights.0',
        'attention.fc1.weight',
        'attention.norm1.weight',
        'attention.norm1.bias',
        'attention.norm1.running_mean',
        'attention.norm1.running_var',
        'attention.norm1.num_batches_tracked',
        'attention.fc2.weight',
        'attention.fc2.bias',
    ]
    layer_norm = KWConv2d(4, 4, 3, attention_norm_cfg=dict(type='LN'))
    assert 'attention.fc1.bias' in layer_norm.state_dict()


@pytest.mark.parametrize('copier', ['deepcopy', 'pickle', 'torch.save', 'state_dict'])
def test_copies_compute_the_same_and_share_nothing(copier):
    layer = KWConv2d(4, 4, 3).eval()
    if copier == 'deepcopy':
        twin = copy.deepcopy(layer)
    elif copier == 'pickle':
        twin = pickle.loads(pickle.dumps(layer))
    elif copier == 'torch.save':
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = KWConv2d(4, 4, 3).eval()
        twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    # The copy's forward pass uses the copy's cells.
    with torch.no_grad():
        twin.warehouse_manager.weights[0].mul_(2)
    assert not torch.allclose(twin(x), layer(x))
    assert len(list(twin.parameters())) == len(set(twin.parameters()))


def test_weight_updates_are_seen():
    layer = KWConv2d(4, 4, 3, bias=False).eval()
    x = torch.randn(1, 4, 5, 5)
    before = layer(x)
    with torch.no_grad():
        layer.cells.mul_(3)
    torch.testing.assert_close(layer(x), 3 * before)


@pytest.mark.parametrize(
    'layer, shape, message',
    [
        (KWConv2d(4, 4, 3), (2, 3, 8, 8), r'batch, 4, 2 spatial sizes.*got \(2, 3, 8, 8\)'),
        (KWConv2d(4, 4, 3), (2, 4, 8, 8, 8), r'got \(2, 4, 8, 8, 8\)'),
        (KWLinear(4, 4), (2, 3), r'batch, ..., 4\), got \(2, 3\)'),
    ],
)
def test_inputs_of_a_wrong_shape_are_refused(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(shape))


def test_arguments_of_the_namesake_are_checked_by_it():
    with pytest.raises(ValueError, match='in_channels must be divisible by groups'):
        KWConv2d(3, 4, 3, groups=2)
    with pytest.raises(TypeError, match='unexpected keyword'):
        KWConv2d(4, 4, 3, cell_number_ratio=2)
    with pytest.raises(PlanError, match='cell_num_ratio must be a number above 0, got 0'):
        KWConv2d(4, 4, 3, cell_num_ratio=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('learns', [False, True])
def test_images_in_half_precision_are_averaged_in_float32(learns, channels_last, dtype):
    x = (torch.randn(3, 64, 9, 10) / 8 + 1).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_(learns)
    found, right = average(x, 1), x.double().mean((2, 3))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), right, atol=0, rtol=1e-6)
    if learns:
        upstream = torch.randn(3, 64)
        (grad,) = torch.autograd.grad(found, x, upstream)
        (exact,) = torch.autograd.grad(right, x, upstream.double())
        torch.testing.assert_close(grad, exact, atol=0, rtol=1e-2)

"""Statistics of a batch of one, precision, temperature."""

import copy
import math

import pytest
import torch
from torch import nn

from mmkw.layers import KWConv1d, KWConv2d, KWLinear, set_temperature
from mmkw.ops import backend


def test_batch_of_one_trains_on_the_running_statistics():
    layer = KWConv2d(4, 8, 3)
    layer.attention.norm1.running_mean.normal_()
    layer.attention.norm1.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(layer.attention.norm1.state_dict())
    x = torch.randn(1, 4, 5, 5)

    trained = layer.train()(x)
    trained.square().mean().backward()
    torch.testing.assert_close(trained, layer.eval()(x))
    for name, value in layer.attention.norm1.state_dict().items():
        assert torch.equal(value, before[name]), name
    gradients = [p.grad for p in layer.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_larger_batches_use_and_update_batch_statistics():
    layer = KWConv2d(4, 8, 3).train()
    layer(torch.randn(4, 4, 5, 5) + 3)
    assert layer.attention.norm1.num_batches_tracked == 1
    assert layer.attention.norm1.running_mean.abs().max() > 0


def test_empty_batch_gives_empty_output_and_zero_gradients():
    layer = KWConv2d(4, 8, 3, padding=1).train()
    y = layer(torch.randn(0, 4, 5, 5))
    assert y.shape == (0, 8, 5, 5)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in layer.parameters())
    linear = KWLinear(4, 6).train()
    assert linear(torch.randn(0, 3, 4)).shape == (0, 3, 6)
    with torch.no_grad():
        assert layer.eval()(torch.randn(0, 4, 5, 5)).shape == (0, 8, 5, 5)
        assert linear.eval()(torch.randn(0, 3, 4)).shape == (0, 3, 6)


def test_attention_is_float32_under_autocast():
    layer = KWConv2d(64, 64, 3, cell_num_ratio=2).eval()
    x = torch.randn(2, 64, 8, 8).bfloat16()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        alpha = layer.attention(x.mean((2, 3), dtype=torch.float32))
        y = layer(x)
    assert alpha.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(alpha, layer.attention(x.float().mean((2, 3))))
    torch.testing.assert_close(y.float(), layer(x.float()), atol=0.03, rtol=0.03)


@pytest.mark.skipif(backend.why_not_compiled() is not None, reason='no compiled kernels')
@pytest.mark.parametrize('norm', ['BN1d', 'LN'])
@pytest.mark.parametrize('channels', [3, 40, 384])
def test_compiled_attention_equals_the_modules(norm, channels, monkeypatch):
    layer = KWConv2d(channels, 8, 3, cell_num_ratio=2, attention_norm_cfg=dict(type=norm)).eval()
    for parameter in layer.attention.parameters():
        parameter.data.uniform_(-1, 2)
    if norm == 'BN1d':
        layer.attention.norm1.running_mean.normal_()
        layer.attention.norm1.running_var.uniform_(0.5, 2)
    pooled = torch.randn(5, channels)
    by_modules = layer.attention(pooled)
    assert by_modules.requires_grad
    calls = []
    real = torch.ops.mmkw.attend
    monkeypatch.setattr(torch.ops.mmkw, 'attend', lambda *args: calls.append(1) or real(*args))
    with torch.no_grad():
        torch.testing.assert_close(layer.attention(pooled), by_modules, atol=1e-6, rtol=1e-5)
        assert layer.attention(pooled[:0]).shape == by_modules[:0].shape
        assert len(calls) == 2
        set_temperature(layer, 0.5)
        assert not torch.equal(layer.attention(pooled), by_modules)
        set_temperature(layer, 0)
        layer.train()
        layer.attention(pooled)
        assert len(calls) == 2 + (norm == 'LN')


@pytest.mark.skipif(backend.why_not_compiled() is not None, reason='no compiled kernels')
@pytest.mark.parametrize('tau', [0, 0.3, 1])
@pytest.mark.parametrize('images', [0, 1, 2, 9])
@pytest.mark.parametrize('frozen', ['nothing', 'norm', 'all'])
@pytest.mark.parametrize('norm', ['BN1d', 'BN1d in evaluation', 'LN'])
def test_learning_attention_equals_the_modules(norm, frozen, images, tau, monkeypatch):
    """Attentions, all gradients and running statistics, as near as the modules are to float64."""
    kind, *evaluation = norm.split(' ', 1)
    options = dict(cell_num_ratio=2, attention_norm_cfg=dict(type=kind))
    made = KWConv2d(40, 8, 3, **options).train(not evaluation).attention
    for parameter in made.parameters():
        parameter.data.uniform_(-1, 2)
    made.temperature = tau
    parts = dict(nothing=[], norm=[made.norm1], all=[made])[frozen]
    for part in parts:
        part.requires_grad_(False)
    pooled, weights = torch.randn(images, 40), torch.randn(images, 9, made.num_cells)
    calls = []
    real = torch.ops.mmkw.attend_to_learn
    spy = lambda *args: calls.append(1) or real(*args)  # noqa: E731
    monkeypatch.setattr(torch.ops.mmkw, 'attend_to_learn', spy)

    def computed(by_kernels, dtype=torch.float32):
        monkeypatch.setattr(backend, '_switched_on', by_kernels)
        attention = copy.deepcopy(made).to(dtype)
        x = pooled.to(dtype, copy=True).requires_grad_()
        alpha = attention(x)
        (alpha * weights.to(dtype)).sum().backward()
        learnt = [parameter.grad for parameter in attention.parameters()]
        return [alpha, x.grad, *learnt, *attention.buffers()]

    found, by_modules = computed(True), computed(False)
    assert len(calls) == 1
    for ours, theirs, exact in zip(found, by_modules, computed(False, torch.float64), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and ours.numel():
            error, of_modules = ((y - exact).abs().max() for y in (ours, theirs))
            assert error <= 4 * of_modules + 2e-5 * (1 + exact.abs().max())


def untracked(attention):
    attention.norm1.track_running_stats = False


def gaps(attention):
    attention.norm1.running_var = torch.ones(16, 2)[:, 0]


def half(attention):
    attention.bfloat16()


def integers(attention):
    attention.norm1.num_batches_tracked = attention.norm1.num_batches_tracked.int()


def two_counters(attention):
    attention.norm1.num_batches_tracked = torch.zeros(2, dtype=torch.int64)


def infinite(attention):
    attention.norm1.running_mean[0] = attention.norm1.running_var[1] = math.inf


def nothing_more(attention):
    attention.register_module('more', None)


def cumulative(attention):
    attention.norm1.momentum = None


def without_bias(attention):
    attention.fc2.bias = None


def tensor_in(part):
    """No parameter, but a plain tensor in its place."""

    def change(attention):
        layer = getattr(attention, part)
        weight = layer.weight.detach().clone()
        del layer.weight
        layer.weight = weight

    return change


CALLED = []


def hook(attention):
    attention.fc1.register_forward_hook(lambda *_: CALLED.append('hook'))


def backward_hook(attention):
    attention.relu.register_full_backward_hook(lambda *_: CALLED.append('hook'))


def no_relu(attention):
    attention.relu = nn.LayerNorm(16)


def a_function(attention):
    del attention.relu
    attention.relu = torch.relu


CHANGES = [untracked, gaps, half, integers, two_counters, infinite, nothing_more, cumulative]
CHANGES += [no_relu, a_function]
CHANGES += [without_bias, hook, backward_hook, *map(tensor_in, ('fc1', 'norm1', 'fc2'))]


@pytest.mark.parametrize('change', CHANGES)
def test_learning_attentions_that_are_not_as_made_are_as_the_modules(change, monkeypatch):
    made = KWConv2d(8, 8, 3).attention
    change(made)
    pooled = torch.randn(4, 8, dtype=made.fc1.weight.dtype)
    found = []
    for on in (True, False):
        monkeypatch.setattr(backend, '_switched_on', on)
        attention, called = copy.deepcopy(made), len(CALLED)
        attention(pooled).square().sum().backward()
        tensors = [parameter.grad for parameter in attention.parameters()]
        tensors += attention.buffers()
        found.append([*tensors, torch.tensor(len(CALLED) - called)])
    # The kernels take these two.
    rounding = 1e-4 if change in (infinite, nothing_more) else 0
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=rounding, rtol=rounding)
    assert found[0][-1] == (change in (hook, backward_hook))


def test_learning_attentions_complain_as_the_modules():
    attention = KWConv2d(8, 8, 3).attention
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        attention(torch.randn(4, 7))
    attention.norm1.eps = 0
    with pytest.raises(ValueError, match='eps must be positive'):
        attention(torch.randn(4, 8))


@pytest.mark.parametrize('on', [True, False], ids=['compiled', 'PyTorch'])
@pytest.mark.parametrize('images', [2, 64])
def test_backward_pass_inside_autocast(images, on, monkeypatch):
    monkeypatch.setattr(backend, '_switched_on', on)
    layer, grads = KWConv2d(256, 16, 3, cell_num_ratio=1), []
    x = torch.randn(images, 256, 4, 4)
    for inside in (True, False):
        layer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            loss = layer(x).float().square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append([parameter.grad for parameter in layer.attention.parameters()])
    for ours, right in zip(*grads, strict=True):
        torch.testing.assert_close(ours, right, atol=1e-2 * right.abs().max().item(), rtol=1e-2)


@pytest.mark.parametrize('on', [True, False], ids=['compiled', 'PyTorch'])
def test_parameters_that_the_gradient_does_not_need_may_change_before_it(on, monkeypatch):
    monkeypatch.setattr(backend, '_switched_on', on)
    attention = KWConv2d(8, 8, 3).attention
    pooled = torch.randn(4, 8)

    def changed(names, wanted='fc2.weight', learning=pooled, **options):
        loss = attention(learning).square().sum()
        parameters = dict(attention.named_parameters())
        right = torch.autograd.grad(loss, [parameters[wanted]], retain_graph=True)[0]
        with torch.no_grad():
            for name in names.split():
                parameters[name].add_(1)
        found = torch.autograd.grad(loss, [parameters[wanted]], **options)[0]
        torch.testing.assert_close(found, right)
        return found

    changed('fc2.bias norm1.bias fc1.weight')
    learning = pooled.clone().requires_grad_()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        changed('fc2.weight', learning=learning)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        changed('fc1.weight', learning=learning, create_graph=True).sum().backward()
    attention.requires_grad_(False).fc2.requires_grad_(True)
    for wanted in ('fc2.weight', 'fc2.bias'):
        changed('fc1.weight norm1.weight fc2.weight', wanted)


@pytest.mark.parametrize('on', [True, False], ids=['compiled', 'PyTorch'])
def test_statistics_do_not_change_before_gradients_of_gradients(on, monkeypatch):
    monkeypatch.setattr(backend, '_switched_on', on)
    attention = KWConv2d(8, 8, 3).eval().attention
    pooled = torch.randn(4, 8, requires_grad=True)
    loss = attention(pooled).square().sum()
    torch.autograd.grad(loss, pooled, create_graph=True)
    attention.norm1.running_mean.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        torch.autograd.grad(loss, pooled, create_graph=True)


def test_a_batch_does_not_change_the_statistics_of_gradients_of_gradients():
    attention = KWConv2d(8, 8, 3).attention
    pooled = torch.randn(1, 8, requires_grad=True)
    loss = attention(pooled).square().sum()
    torch.autograd.grad(loss, pooled, create_graph=True)
    attention(torch.randn(4, 8))
    torch.autograd.grad(loss, pooled, retain_graph=True)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        torch.autograd.grad(loss, pooled, create_graph=True)


@pytest.mark.parametrize('layer', [nn.Conv2d, KWConv2d])
def test_export_to_train_batches_of_any_size(layer):
    static = nn.Sequential(nn.BatchNorm2d(8), layer(8, 8, 3)).train()
    images = dict(dynamic_shapes=({0: torch.export.Dim('images', min=2, max=64)},), strict=False)
    exported = torch.export.export(static, (torch.randn(4, 8, 6, 6),), **images).module()
    x = torch.randn(7, 8, 6, 6)
    torch.testing.assert_close(exported(x), static(x))


def test_autocast_training_step():
    layer = KWConv2d(8, 8, 3)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = layer(torch.randn(2, 8, 6, 6)).float().square().mean()
    loss.backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters()
    )


@pytest.mark.parametrize('on', [True, False], ids=['compiled', 'PyTorch'])
@pytest.mark.parametrize('norm', ['BN1d', 'LN'])
@pytest.mark.parametrize(
    'kind, arguments, size',
    [(KWConv2d, [3], (7, 6)), (KWConv2d, [1], (7, 6)), (KWConv1d, [3], (7,)), (KWLinear, [], ())],
)
def test_layer_in_half_precision(kind, arguments, size, norm, on, monkeypatch):
    """It comes as near to double precision as the static twin."""
    monkeypatch.setattr(backend, '_switched_on', on)
    options = dict(cell_num_ratio=2, attention_norm_cfg=dict(type=norm))
    layer = kind(64, 64, *arguments, **options).eval()
    for parameter in layer.attention.fc1.parameters():
        parameter.data.normal_()
    x = torch.randn(3, 64, *size)

    @torch.no_grad()
    def error(network):
        half = copy.deepcopy(network).bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        right = copy.deepcopy(network).double()(x.double())
        return float((half - right).norm() / right.norm())

    twin = layer.static_twin()
    twin.weight.data.normal_()
    assert error(layer) < 4 * error(twin)


def test_attention_may_be_negative_and_sums_to_less_than_one():
    layer = KWConv2d(16, 16, 3, cell_num_ratio=2).eval()
    alpha = layer.attention(torch.randn(8, 16))
    assert (alpha < 0).any()
    # The zero cell and the constant of the denominator take the rest.
    assert (alpha.abs().sum(-1) < 1).all()


def test_all_attentions_keep_gradients_at_temperature_one():
    layer = KWConv2d(4, 4, 1)
    set_temperature(layer, 1)
    layer(torch.randn(2, 4, 3, 3)).sum().backward()
    assert all(p.grad is not None for p in layer.attention.parameters())


@pytest.mark.parametrize('tau', [-0.1, 1.1, '0.5', None, True, float('nan')])
def test_set_temperature_refuses_values_out_of_range(tau):
    with pytest.raises(ValueError, match=rf'tau must be a number in \[0, 1\], got {tau!r}'):
        set_temperature(KWConv2d(4, 4, 1), tau)


def test_set_temperature_refuses_a_static_model():
    with pytest.raises(ValueError, match='Linear has no KernelWarehouse layer'):
        set_temperature(torch.nn.Linear(2, 2), 0.5)


def test_a_temperature_that_falls_is_not_compiled_every_time():
    """A schedule sets another at every iteration; PyTorch gives up after eight compilations."""
    static, dynamic = nn.Conv2d(4, 8, 3), KWConv2d(4, 8, 3).eval()
    for layer in (static, dynamic):
        compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
        for iteration in range(12):
            if layer is dynamic:
                set_temperature(layer, 1 - iteration / 11)
            x = torch.randn(2, 4, 6, 6)
            y = compiled(x)
            torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-5)
            y.square().sum().backward()
            assert all(parameter.grad is not None for parameter in layer.parameters())

"""Every layer on every device and in every precision, beside float64 and beside its static twin."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import mmkw

LAYERS = {
    '1d': (mmkw.KWConv1d, nn.Conv1d, (32, 48, 3), dict(padding=1), (32, 20)),
    '2d': (mmkw.KWConv2d, nn.Conv2d, (32, 48, 3), dict(padding=1), (32, 9, 11)),
    'strided': (mmkw.KWConv2d, nn.Conv2d, (32, 48, 3), dict(padding=1, stride=2), (32, 9, 11)),
    'dilated': (mmkw.KWConv2d, nn.Conv2d, (32, 48, 3), dict(dilation=2), (32, 9, 11)),
    'pointwise': (mmkw.KWConv2d, nn.Conv2d, (32, 48, 1), dict(stride=2), (32, 9, 11)),
    'grouped': (mmkw.KWConv2d, nn.Conv2d, (32, 48, 3), dict(groups=2, padding=1), (32, 9, 11)),
    'depthwise': (mmkw.KWConv2d, nn.Conv2d, (32, 32, 3), dict(groups=32, padding=1), (32, 9, 11)),
    'circular': (
        mmkw.KWConv2d,
        nn.Conv2d,
        (32, 48, 3),
        dict(padding=1, padding_mode='circular'),
        (32, 9, 11),
    ),
    '3d': (mmkw.KWConv3d, nn.Conv3d, (32, 48, 3), dict(padding=1), (32, 4, 5, 6)),
    'linear': (mmkw.KWLinear, nn.Linear, (32, 48), {}, (7, 32)),
}
PRECISIONS = {
    'float32': (torch.float32, None),
    'tf32': (torch.float32, None),
    'bfloat16': (torch.bfloat16, None),
    'autocast to bfloat16': (torch.float32, torch.bfloat16),
    'autocast to float16': (torch.float32, torch.float16),
}


@pytest.fixture(params=['cpu', 'cuda'])
def device(request):
    """Every device of PyTorch's that is here."""
    if request.param == 'cuda' and not torch.cuda.is_available():
        pytest.skip('this machine has no GPU')
    return request.param


def _computed(layer, x, weights, device, dtype, autocast):
    """The output and all gradients, in float64 on the CPU."""
    layer, x = layer.to(device, dtype), x.detach().to(device, dtype).requires_grad_()
    layer.zero_grad()
    with nullcontext() if autocast is None else torch.autocast(device, autocast):
        y = layer(x)
    (y.double() * weights.to(device)).sum().backward()
    results = dict(y=y, x=x.grad, **{name: p.grad for name, p in layer.named_parameters()})
    return {name: tensor.detach().double().cpu() for name, tensor in results.items()}


def _distance(results, exact):
    return {
        name: ((results[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact
    }


@pytest.fixture(params=PRECISIONS)
def precision(request):
    """Every precision; TF32 is allowed in its own only."""
    modules = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = request.param == 'tf32'
    yield request.param
    for module, value in zip(modules, before):
        module.allow_tf32 = value


@pytest.mark.parametrize('batch', [1, 2, 5])
@pytest.mark.parametrize('kind', LAYERS)
def test_precisions(kind, precision, batch, device):
    dynamic_class, static_class, arguments, options, shape = LAYERS[kind]
    dtype, autocast = PRECISIONS[precision]
    x = torch.randn(batch, *shape)
    norm = dict(attention_norm_cfg=dict(type='LN'))
    layers = dict(
        static=static_class(*arguments, **options),
        dynamic=dynamic_class(*arguments, **options, cell_num_ratio=2, **norm),
    )
    errors = {}
    for name, layer in layers.items():
        weights = torch.randn(layer(x).shape, dtype=torch.float64)
        # Both start from what the lower precision can store.
        layer, stored = layer.to(dtype), x.to(dtype)
        exact = _computed(layer, stored, weights, 'cpu', torch.float64, None)
        layer = layer.to(dtype)
        errors[name] = _distance(_computed(layer, stored, weights, device, dtype, autocast), exact)
    bound = max(*errors['static'].values(), 1e-3 * (precision == 'tf32'))
    worst = max(errors['dynamic'].values())
    assert worst < 32 * bound, errors

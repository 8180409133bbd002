"""Attentions that learn, by the kernels for the CPU and for GPUs, against PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from mmkw.ops import attending, backend, compiled_attention


def distance(result, exact):
    """The relative difference of two tensors, which may both be zero."""
    difference, norm = (result.double() - exact.double()).norm(), exact.double().norm()
    return (difference / norm.clamp(min=1e-9)).item()


@pytest.fixture(params=['CPU', 'GPU'])
def place(request):
    """The kernels and their device: those for GPUs on one, or in Triton's interpreter."""
    if request.param == 'CPU':
        if (missing := backend.why_not_compiled()) is not None:
            pytest.skip(missing)
        return compiled_attention, 'cpu'
    pytest.importorskip('triton', reason='Triton is not installed')
    from mmkw.ops.triton import attention

    return attention, 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture
def kernels(place):
    return place[0]


@pytest.fixture
def device(place):
    return place[1]


@pytest.mark.parametrize('tau', [0, 0.3, 1])
@pytest.mark.parametrize(
    ('images', 'width', 'mixtures', 'cells'), [(3, 16, 4, 87), (18, 20, 3, 9), (5, 16, 1, 1)]
)
@pytest.mark.parametrize('kind', ['batch', 'running', 'layer'])
def test_attention(kernels, device, kind, images, width, mixtures, cells, tau):
    """Values, gradients and gradients of these are those of PyTorch's operators."""

    def values(*shape):
        return torch.randn(*shape, device=device).requires_grad_()

    pooled, outputs = values(images, 70), mixtures * (cells + 1)
    bias = values(width) if kind == 'layer' else None
    parameters = attending.Parameters(
        values(width, 70),
        bias,
        values(width),
        values(width),
        values(outputs, width),
        values(outputs),
    )
    norm = attending.Norm('layer', 1e-5)
    if kind != 'layer':
        statistics = torch.randn(width), torch.rand(width) + 0.5, torch.tensor(3)
        norm = attending.Norm(kind, 1e-5, 0.1, *(tensor.to(device) for tensor in statistics))
    start = attending.Start(tau, torch.randint(0, cells + 1, (mixtures,), device=device))
    reference = torch.nn.BatchNorm1d(width, device=device)
    if kind == 'batch':
        reference.running_mean.copy_(norm.mean)
        reference.running_var.copy_(norm.var)
        reference(F.linear(pooled, parameters.fc1_weight))

    learning = attending.Learning(parameters, norm, start, 1e-3)
    exact = attending.attend_plainly(pooled, learning)
    with torch.autocast(device, torch.bfloat16):
        result = attending.attend(kernels, pooled, learning)
    assert distance(result, exact) < 1e-5
    inputs = [pooled, *(p for p in parameters if p is not None)]
    weights = torch.randn_like(exact)
    gradients, exact_gradients = (
        torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True) for y in (result, exact)
    )
    for gradient, exact_gradient in zip(gradients, exact_gradients):
        assert torch.allclose(gradient, exact_gradient, 1e-3, 1e-4 * exact_gradient.abs().max())
    if kind == 'batch':
        assert torch.allclose(norm.mean, reference.running_mean, 1e-4, 1e-5)
        assert torch.allclose(norm.var, reference.running_var, 1e-4, 1e-5)
        assert norm.batches == 4
    elif kind == 'running':
        assert norm.batches == 3
    # A gradient of the gradient is computed by PyTorch, as the gradient of the same function.
    again, exact_again = (
        torch.autograd.grad((y * weights).sum(), pooled, create_graph=True)[0].square().sum()
        for y in (result, exact)
    )
    if tau < 1:
        second, exact_second = (
            torch.autograd.grad(y, parameters.fc2_weight)[0] for y in (again, exact_again)
        )
        assert distance(second, exact_second) < 1e-3

"""An attention that may learn, by kernels of our own, as autograd sees it.

These kernels are in ``mmkw.ops.triton.attention`` for GPUs, and in :mod:`.compiled_attention` for
the CPU.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import modes


class Norm(NamedTuple):
    """What the norm of the hidden units does.

    Args:
        kind: ``batch``, ``running`` (a BatchNorm by its running statistics) or ``layer``.
        eps: Added to the variance.
        momentum: By which a ``batch`` changes the running statistics.
        mean: Tensor[width], the running mean; None for ``layer``.
        var: Tensor[width], the running variance; None for ``layer``.
        batches: The number of batches seen, a tensor that a ``batch`` raises; None if it is not
            counted.
    """

    kind: str
    eps: float
    momentum: float = 0.0
    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None


class Start(NamedTuple):
    """The one-to-one start.

    Args:
        temperature: tau, in [0, 1].
        assigned: Tensor[mixtures] of integers, the cell of every mixture at the start; the number
            of cells stands for none.
    """

    temperature: float
    assigned: Tensor


class Parameters(NamedTuple):
    """The parameters of an attention.

    Args:
        fc1_weight: Tensor[width, channels].
        fc1_bias: Tensor[width], or None.
        norm_weight: Tensor[width].
        norm_bias: Tensor[width].
        fc2_weight: Tensor[mixtures * (cells + 1), width].
        fc2_bias: Tensor[mixtures * (cells + 1)].
    """

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


class Saved(NamedTuple):
    """What the backward pass needs: hidden units, before them what the norm gave, and logits."""

    hidden: Tensor
    normed: Tensor
    inverses: Tensor
    logits: Tensor


def attend(
    kernels: Any,
    pooled: Tensor,
    parameters: Parameters,
    norm: Norm,
    start: Start,
    denominator_eps: float,
) -> Tensor:
    """Computes attentions, also under autocast in float32.

    Autograd can differentiate the result, as often as needed.

    Args:
        kernels: What computes them, as :func:`~mmkw.ops.backend.attention_kernels` gives it.
        pooled: Tensor[batch, channels] in float32.
        parameters: The parameters, contiguous and in float32.
        norm: What the norm does. Its running statistics change in place.
        start: The one-to-one start.
        denominator_eps: Added to the sum of the logits' magnitudes.

    Returns:
        Tensor[batch, mixtures, cells].
    """
    with modes.without_autocast(pooled):
        return _Attend.apply(pooled, *parameters, kernels, norm, start, denominator_eps)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pooled: Tensor, *arguments: Any) -> Tensor:
        *given, kernels, norm, start, eps = arguments
        pooled, parameters = pooled.contiguous(), Parameters(*given)
        alpha, saved = kernels.forward(pooled, parameters, norm, start, eps)
        if norm.kind == 'batch' and norm.batches is not None:
            torch.autograd.graph.increment_version(norm.batches)
        # As with PyTorch's operators, what the gradient does not need may change before it. Each
        # weight is for the gradients of what comes before it: pooled, fc1, the norm.
        needs = ctx.needs_input_grad
        is_read = (needs[0], False, any(needs[:3]), False, any(needs[:5]), False)
        ctx.unread = [None if read else tensor for tensor, read in zip(given, is_read)]
        read = [tensor if read else None for tensor, read in zip(given, is_read)]
        ctx.save_for_backward(pooled, *read, *saved)
        # A batch changes the statistics without a trace, other than that it is counted.
        statistics = (norm.mean, norm.var, norm.batches) if norm.kind == 'running' else ()
        ctx.noted = [
            (tensor, None if tensor.is_inference() else tensor._version)
            for tensor in (*ctx.unread, *statistics)
            if tensor is not None
        ]
        ctx.kernels, ctx.norm, ctx.start, ctx.eps = kernels, norm, start, eps
        return alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(Parameters._fields)
        pooled, *tensors = ctx.saved_tensors
        read, saved = tensors[:count], Saved(*tensors[count:])
        given = (kept if tensor is None else tensor for kept, tensor in zip(ctx.unread, read))
        parameters = Parameters(*given)
        with modes.without_autocast(pooled):
            if torch.is_grad_enabled() or modes.is_seen_through(grad, pooled):
                _check_versions(ctx.noted)
                gradients = _backward_plainly(ctx, grad, pooled, parameters)
            else:
                gradients = ctx.kernels.backward(
                    grad.contiguous(),
                    pooled,
                    parameters,
                    ctx.norm.kind,
                    ctx.start.temperature,
                    ctx.eps,
                    saved,
                )
        needed = zip(gradients, ctx.needs_input_grad)
        return *(value if need else None for value, need in needed), None, None, None, None


def _check_versions(noted: list[tuple[Tensor, int | None]]) -> None:
    """Refuses to go on with other values, as autograd does.

    Args:
        noted: Tensors whose values only gradients of gradients need, and the versions of their
            values; None if none is counted.
    """
    if any(version not in (None, tensor._version) for tensor, version in noted):
        raise RuntimeError(
            'A tensor of an attention, which gradients of gradients need, has been modified by '
            'an inplace operation. Compute them before the optimizer steps.'
        )


def _backward_plainly(
    ctx: Any, grad: Tensor, pooled: Tensor, parameters: Parameters
) -> tuple[Tensor | None, ...]:
    """Computes the gradients by autograd, so that they can be differentiated."""
    with torch.enable_grad():
        # New views, so that differentiation ends here.
        pooled = pooled.view_as(pooled)
        views: list[Any] = [None if t is None else t.view_as(t) for t in parameters]
        result = attend_plainly(pooled, Parameters(*views), ctx.norm, ctx.start, ctx.eps)
    operands = zip([pooled, *views], ctx.needs_input_grad)
    needed = [tensor if need else None for tensor, need in operands]
    inputs = [tensor for tensor in needed if tensor is not None]
    gradients = iter(
        torch.autograd.grad(result, inputs, grad, create_graph=torch.is_grad_enabled())
    )
    return tuple(None if tensor is None else next(gradients) for tensor in needed)


def attend_plainly(
    pooled: Tensor, parameters: Parameters, norm: Norm, start: Start, denominator_eps: float
) -> Tensor:
    """Computes :func:`attend` by PyTorch's operators. Running statistics do not change."""
    hidden = F.linear(pooled, parameters.fc1_weight, parameters.fc1_bias)
    affine = parameters.norm_weight, parameters.norm_bias
    if norm.kind == 'layer':
        hidden = F.layer_norm(hidden, hidden.shape[1:], *affine, norm.eps)
    elif norm.kind == 'batch':
        hidden = F.batch_norm(hidden, None, None, *affine, training=True, eps=norm.eps)
    else:
        hidden = F.batch_norm(hidden, norm.mean, norm.var, *affine, eps=norm.eps)
    logits = F.linear(hidden.relu(), parameters.fc2_weight, parameters.fc2_bias)
    logits = logits.unflatten(1, (len(start.assigned), -1))
    alpha = logits / (logits.abs().sum(-1, keepdim=True) + denominator_eps)
    beta = F.one_hot(start.assigned, alpha.shape[-1]).to(alpha)
    return torch.lerp(alpha, beta.expand_as(alpha), start.temperature)[..., :-1]

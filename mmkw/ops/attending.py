"""An attention that may learn, by kernels of our own, as autograd sees it.

These kernels are in ``mmkw.ops.triton.attention`` for GPUs, and in :mod:`.compiled_attention` for
the CPU.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import modes, recorded


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


class Learning(NamedTuple):
    """All that an attention needs to learn.

    Args:
        parameters: The parameters, contiguous and in float32.
        norm: What the norm does. Its running statistics change in place.
        start: The one-to-one start.
        denominator_eps: Added to the sum of the logits' magnitudes.
    """

    parameters: Any
    norm: Norm
    start: Start
    denominator_eps: float

    def with_parameters(self, parameters: Parameters | None) -> 'Learning':
        """The same with other parameters, or none: autograd keeps them for a backward pass."""
        return Learning(parameters, *self[1:])


def count_batch(norm: Norm) -> None:
    """Tells autograd that a kernel has changed the statistics.

    Args:
        norm: What the norm does.
    """
    if norm.kind == 'batch' and norm.batches is not None:
        torch.autograd.graph.increment_version(norm.batches)


class Unread:
    """What gradients of gradients alone need of an attention: parameters and statistics.

    As with PyTorch's operators, what the gradient does not need may change before it.

    Args:
        parameters: Of the attention; None in the places of those that the gradient reads.
        norm: What the norm does.
    """

    def __init__(self, parameters: Sequence[Tensor | None], norm: Norm) -> None:
        self._parameters = parameters
        # A batch changes the statistics without a trace, other than that it is counted.
        statistics = (norm.mean, norm.var, norm.batches) if norm.kind == 'running' else ()
        self._noted = [
            (tensor, None if tensor.is_inference() else tensor._version)
            for tensor in (*parameters, *statistics)
            if tensor is not None
        ]

    @classmethod
    def apart(
        cls, parameters: Parameters, norm: Norm, needs: Sequence[bool]
    ) -> tuple[list[Tensor | None], 'Unread']:
        """Tells what the gradient reads from what it does not.

        Each weight is for the gradients of what comes before it: the averages, fc1, the norm.

        Args:
            parameters: Of the attention.
            norm: What the norm does.
            needs: Whether the averages and every parameter need a gradient.

        Returns:
            The parameters for autograd to save, with None in the places of others, and the rest.
        """
        is_read = (needs[0], False, any(needs[:3]), False, any(needs[:5]), False)
        read = [tensor if is_one else None for tensor, is_one in zip(parameters, is_read)]
        return read, cls([None if is_one else t for t, is_one in zip(parameters, is_read)], norm)

    def joined(self, read: Sequence[Tensor | None]) -> Parameters:
        """All parameters.

        Args:
            read: What autograd has saved.
        """
        unread = self._parameters
        given: list[Any] = [kept if saved is None else saved for saved, kept in zip(read, unread)]
        return Parameters(*given)

    def check(self) -> None:
        """Refuses to go on with other values, as autograd does."""
        if any(version not in (None, tensor._version) for tensor, version in self._noted):
            raise RuntimeError(
                'A tensor of an attention, which gradients of gradients need, has been modified by '
                'an inplace operation. Compute them before the optimizer steps.'
            )


def attend(kernels: Any, pooled: Tensor, learning: Learning) -> Tensor:
    """Computes attentions, also under autocast in float32.

    Autograd can differentiate the result, as often as needed.

    Args:
        kernels: What computes them, as :func:`~mmkw.ops.backend.attention_kernels` gives it.
        pooled: Tensor[batch, channels] in float32.
        learning: The attention.

    Returns:
        Tensor[batch, mixtures, cells].
    """
    with modes.without_autocast(pooled):
        rest = learning.with_parameters(None)
        return _Attend.apply(pooled, *learning.parameters, kernels, rest)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pooled: Tensor, *arguments: Any) -> Tensor:
        *given, kernels, ctx.learning = arguments
        pooled, parameters = pooled.contiguous(), Parameters(*given)
        alpha, saved = kernels.forward(pooled, ctx.learning.with_parameters(parameters))
        count_batch(ctx.learning.norm)
        read, ctx.unread = Unread.apart(parameters, ctx.learning.norm, ctx.needs_input_grad)
        ctx.save_for_backward(pooled, *read, *saved)
        ctx.kernels = kernels
        return alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(Parameters._fields)
        pooled, *tensors = ctx.saved_tensors
        learning = ctx.learning
        parameters, saved = ctx.unread.joined(tensors[:count]), Saved(*tensors[count:])
        with modes.without_autocast(pooled):
            if torch.is_grad_enabled() or modes.is_seen_through(grad, pooled):
                ctx.unread.check()

                def compute(pooled: Tensor, *given: Any) -> Tensor:
                    return attend_plainly(pooled, learning.with_parameters(Parameters(*given)))

                needs = ctx.needs_input_grad[: 1 + count]
                gradients = recorded.gradients(compute, (pooled, *parameters), needs, grad)
            else:
                whole = learning.with_parameters(parameters)
                gradients = ctx.kernels.backward(grad.contiguous(), pooled, whole, saved)
        needed = zip(gradients, ctx.needs_input_grad)
        return *(value if need else None for value, need in needed), None, None


def attend_plainly(pooled: Tensor, learning: Learning) -> Tensor:
    """Computes :func:`attend` by PyTorch's operators. Running statistics do not change."""
    parameters, norm, start, denominator_eps = learning
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

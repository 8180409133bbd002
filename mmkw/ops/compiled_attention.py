"""The attention function (paper, section 3.4) and its gradient on the CPU, by compiled kernels.

As operators of PyTorch it would be ten small ones, and twenty for the gradient. In small layers
these take longer to call than to compute.
"""

import torch
from torch import Tensor

from .attending import Norm, Parameters, Saved, Start


def forward(
    pooled: Tensor, parameters: Parameters, norm: Norm, start: Start, denominator_eps: float
) -> tuple[Tensor, Saved]:
    """Computes attentions.

    Args:
        pooled: Tensor[batch, channels] in float32.
        parameters: The parameters, in float32.
        norm: What the norm does. Its running statistics change in place.
        start: The one-to-one start.
        denominator_eps: Added to the sum of the logits' magnitudes.

    Returns:
        Tensor[batch, mixtures, cells], and what :func:`backward` needs.
    """
    attention, *saved = torch.ops.mmkw.attend_to_learn(
        pooled,
        *parameters,
        start.assigned,
        norm.kind,
        norm.eps,
        norm.momentum,
        norm.mean,
        norm.var,
        norm.batches,
        start.temperature,
        denominator_eps,
    )
    return attention, Saved(*saved)


def backward(
    grad: Tensor,
    pooled: Tensor,
    parameters: Parameters,
    norm_kind: str,
    temperature: float,
    denominator_eps: float,
    saved: Saved,
) -> list[Tensor]:
    """Computes the gradients of the pooled images and of all parameters, in their order.

    Args:
        grad: Gradient of the attentions.
        pooled: As in :func:`forward`.
        parameters: As in :func:`forward`.
        norm_kind: The kind of :class:`~mmkw.ops.attending.Norm`.
        temperature: tau.
        denominator_eps: As in :func:`forward`.
        saved: Of :func:`forward`.
    """
    return torch.ops.mmkw.attend_backward(
        grad,
        pooled,
        parameters.fc1_weight,
        parameters.norm_weight,
        parameters.fc2_weight,
        norm_kind,
        temperature,
        denominator_eps,
        *saved,
    )

"""The attention function (paper, section 3.4) and its gradient on the CPU, by compiled kernels.

As operators of PyTorch it would be ten small ones, and twenty for the gradient. In small layers
these take longer to call than to compute.
"""

import torch
from torch import Tensor

from .attending import Learning, Saved


def forward(pooled: Tensor, learning: Learning) -> tuple[Tensor, Saved]:
    """Computes attentions.

    Args:
        pooled: Tensor[batch, channels] in float32.
        learning: The attention.

    Returns:
        Tensor[batch, mixtures, cells], and what :func:`backward` needs.
    """
    parameters, norm, start, denominator_eps = learning
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


def backward(grad: Tensor, pooled: Tensor, learning: Learning, saved: Saved) -> list[Tensor]:
    """Computes the gradients of the pooled images and of all parameters, in their order.

    Args:
        grad: Gradient of the attentions.
        pooled: As in :func:`forward`.
        learning: As in :func:`forward`.
        saved: Of :func:`forward`.
    """
    parameters, norm, start, denominator_eps = learning
    return torch.ops.mmkw.attend_backward(
        grad,
        pooled,
        parameters.fc1_weight,
        parameters.norm_weight,
        parameters.fc2_weight,
        norm.kind,
        start.temperature,
        denominator_eps,
        *saved,
    )

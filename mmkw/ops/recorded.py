"""Gradients by autograd, where those of our own kernels cannot be differentiated."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(
    compute: Callable[..., Tensor],
    operands: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Computes the gradients of a function so that they can be differentiated and transformed.

    Args:
        compute: The function, of PyTorch's operators.
        operands: What it takes.
        needs: Whether each of these needs a gradient.
        grad: Gradient of the result.

    Returns:
        The gradients, with None for operands that need none.
    """
    with torch.enable_grad():
        # New views, so that differentiation ends here: one operand may be computed from another.
        views: list[Any] = [None if t is None else t.view_as(t) for t in operands]
        result = compute(*views)
    needed = [view if need else None for view, need in zip(views, needs, strict=True)]
    inputs = [view for view in needed if view is not None]
    again = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(result, inputs, grad, create_graph=again))
    return [None if view is None else next(found) for view in needed]

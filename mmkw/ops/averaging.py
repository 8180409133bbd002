"""The average of images over space, which the attention sees."""

import math
from typing import Any

import torch
from torch import Tensor

from . import backend, modes


def average(x: Tensor, channel_dim: int) -> Tensor:
    """Averages over space in at least float32, as half precision loses values.

    Autograd can differentiate the result.

    ``mean`` is not used: its gradient would be a new tensor of the input's size. The gradient of a
    sum needs no memory, unless the sum has another precision.

    Args:
        x: Images or tokens.
        channel_dim: 1 or -1; space has all other dimensions but the first.
    """
    if x.dim() == 2:
        return x
    first, last = (2, x.dim()) if channel_dim == 1 else (1, x.dim() - 1)
    precise = torch.promote_types(x.dtype, torch.float32)
    if precise != x.dtype and not modes.is_seen_through(x):
        return _Average.apply(x, first, last)
    total = x.sum(tuple(range(first, last)), dtype=precise)
    return total / math.prod(x.shape[first:last])


class _Average(torch.autograd.Function):
    """The average of a tensor in half precision. Its gradient is cast before it is expanded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int, last: int) -> Tensor:
        ctx.first, ctx.last, ctx.like = first, last, (x.shape, x.dtype)
        if x.dtype == torch.bfloat16 and backend.computes_constants(x):
            return torch.ops.mmkw.average(x, first == 1)
        return x.mean(tuple(range(first, last)), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        shape, dtype = ctx.like
        grad = (grad / math.prod(shape[ctx.first : ctx.last])).to(dtype)
        for dim in range(ctx.first, ctx.last):
            grad = grad.unsqueeze(dim)
        return grad.expand(shape), None, None

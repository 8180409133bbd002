"""The convolution as one operator of a graph that ``torch.compile`` makes.

Inside the operator images are convolved in the way that is the fastest for their number. The graph
sees only shapes, so it holds for every batch and every size, as that of a static convolution does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend
from .memory import Scratch
from .sample_conv import SampleConv


def convolve(sample_map: SampleConv, x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """Computes ``sample_map(x, kernels, bias)`` by the operator.

    Args:
        sample_map: The convolution.
        x: Tensor[batch, in_channels, *size].
        kernels: Tensor[batch, out_channels, in_channels / groups, *kernel_size].
        bias: Tensor[out_channels], or None.
    """
    if sample_map.is_pointwise(kernels):
        # A product of matrices holds for every batch, and may be joined with what follows.
        return sample_map(x, kernels, bias)
    y = torch.ops.mmkw.convolve(x, kernels, *_settings(sample_map))
    return y if bias is None else y + bias.view(-1, *[1] * (x.dim() - 2))


def _settings(conv: SampleConv) -> tuple:
    return conv.stride, conv.padding, conv.dilation, conv.groups


def _map(settings: Sequence[Any], x: Tensor, other: Tensor) -> Any:
    """What convolves, or computes a gradient, from images and another operand."""
    stride, padding, dilation, groups = settings
    conv = SampleConv(tuple(stride), tuple(padding), tuple(dilation), groups)
    return backend.applying(conv, x, other)


_SETTINGS = 'int[] stride, int[] padding, int[] dilation, int groups'

# What an operator returns shares no memory with its operands, and is contiguous, as its fake says.


def _convolve(x: Tensor, kernels: Tensor, *settings: Any) -> Tensor:
    return _map(settings, x, kernels)(x, kernels).contiguous()


def _fake_convolve(x: Tensor, kernels: Tensor, *settings: Any) -> Tensor:
    sides = zip(x.shape[2:], kernels.shape[3:], *settings[:3])
    size = [(n + 2 * pad - far * (k - 1) - 1) // step + 1 for n, k, step, pad, far in sides]
    return x.new_empty(x.shape[0], kernels.shape[1], *size)


def _convolve_backward_x(grad: Tensor, x: Tensor, kernels: Tensor, *settings: Any) -> Tensor:
    if not len(x):
        return torch.zeros_like(x)
    return _map(settings, x, grad).backward_x(grad, x, kernels).contiguous()


def _convolve_backward_kernels(grad: Tensor, x: Tensor, kernels: Tensor, *settings: Any) -> Tensor:
    if not len(x):
        return torch.zeros_like(kernels)
    conv = _map(settings, x, grad)
    gradients = conv.backward_kernels(grad, x, kernels.shape[1:], Scratch())
    if isinstance(gradients, Tensor):
        return gradients.contiguous()
    return torch.stack([gradient.reshape(kernels.shape[1:]) for gradient in gradients])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, kernels, *ctx.settings = inputs
    ctx.save_for_backward(x, kernels)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, kernels = ctx.saved_tensors
    need_x, need_kernels = ctx.needs_input_grad[:2]
    ops, operands = torch.ops.mmkw, (grad, x, kernels, *ctx.settings)
    return (
        ops.convolve_backward_x(*operands) if need_x else None,
        ops.convolve_backward_kernels(*operands) if need_kernels else None,
        *[None] * 4,
    )


def _register() -> None:
    library = torch.library
    for name, operands, compute, fake in (
        ('convolve', 'Tensor x, Tensor kernels', _convolve, _fake_convolve),
        (
            'convolve_backward_x',
            'Tensor grad, Tensor x, Tensor kernels',
            _convolve_backward_x,
            lambda grad, x, *_: x.new_empty(x.shape),
        ),
        (
            'convolve_backward_kernels',
            'Tensor grad, Tensor x, Tensor kernels',
            _convolve_backward_kernels,
            lambda grad, x, kernels, *_: kernels.new_empty(kernels.shape),
        ),
    ):
        library.define(f'mmkw::{name}', f'({operands}, {_SETTINGS}) -> Tensor')
        library.impl(f'mmkw::{name}', 'default', compute)
        library.register_fake(f'mmkw::{name}', fake)
    library.register_autograd('mmkw::convolve', _backward, setup_context=_setup_context)


_register()

"""The whole operator: mixes the kernel of every image and applies it, with little memory.

Autograd alone would keep the kernels of all images and layers. Here kernels exist for some images
at a time. The backward pass mixes them again, unless that takes too long; see
:meth:`~mmkw.ops.mixing.Mixing.is_kept`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, exported, modes, one_operator
from .gradient import Token
from .kernels import assembled_shape, mix_cells
from .mixing import Mixing
from .sample_conv import SampleConv, SampleLinear


class _Settings(NamedTuple):
    """Settings: the grid of the kernel, the map that applies it, and the precision of the map."""

    grid: Sequence[int]
    sample_map: SampleConv | SampleLinear
    dtype: torch.dtype


def apply_mixed(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    grid: Sequence[int],
    sample_map: SampleConv | SampleLinear,
    bias: Tensor | None = None,
) -> Tensor:
    """Applies to every image the kernel that its attention mixes from the cells of a warehouse.

    The result equals ``sample_map(x, mix_cells(attention, cells, grid), bias)``. It can be
    differentiated as often as this expression. The expression itself computes if a transformation
    looks inside (``torch.func``, forward-mode differentiation, ``torch.export``,
    ``torch.compile``).

    Args:
        x: Tensor[batch, ...], the images or tokens. Under autocast the images and the kernels are
            cast, but mixing has the precision of the cells.
        attention: Tensor[batch, mixtures, cells].
        cells: ``Tensor[cells, cell_out, cell_in, *cell_kernel]``.
        grid: Cells of the kernel along ``(*spatial, out, in)``.
        sample_map: The map that applies the kernels.
        bias: Bias of the map, shared by the images.

    Returns:
        The result of ``sample_map``.
    """
    dtype = modes.autocast_dtype(x)
    if dtype is None:
        return _apply(x, attention, cells, bias, _Settings(grid, sample_map, cells.dtype))
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _apply(x.to(dtype), attention, cells, bias, _Settings(grid, sample_map, dtype))


def _apply(
    x: Tensor, attention: Tensor, cells: Tensor, bias: Tensor | None, settings: _Settings
) -> Tensor:
    mixing_of = backend.mixing_of(x, attention, cells, *settings)
    if mixing_of is None:
        return _apply_plainly(x, attention, cells, bias, settings)
    learning = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, attention, cells, bias)
    )
    if not learning:
        return _apply_in_parts(x, attention, bias, settings, mixing_of(cells))
    token = Token.of(cells) if cells.requires_grad else None
    tensor = None if token is None else token.tensor
    return _ApplyMixed.apply(x, attention, cells, bias, tensor, token, settings, mixing_of)


def _apply_plainly(
    x: Tensor, attention: Tensor, cells: Tensor, bias: Tensor | None, settings: _Settings
) -> Tensor:
    grid, sample_map, dtype = settings
    if isinstance(sample_map, SampleConv) and exported.is_wanted():
        y = exported.convolve(x, attention, cells, grid, sample_map)
        return y if bias is None else y + bias.view(-1, *[1] * (x.dim() - 2))
    kernels = _mixed_plainly(attention, cells, grid).to(dtype)
    if modes.makes_graph() and isinstance(sample_map, SampleConv):
        return one_operator.convolve(sample_map, x, kernels, bias)
    return sample_map(x, kernels, bias)


def _mixed_plainly(attention: Tensor, cells: Tensor, grid: Sequence[int]) -> Tensor:
    """Mixes by PyTorch's own operators, or by one of our operators in a compiled graph."""
    if backend.is_one_operator(attention, cells, grid):
        return torch.ops.mmkw.mix_cells(attention, cells, grid)
    return mix_cells(attention, cells, grid)


def _apply_in_parts(
    x: Tensor,
    attention: Tensor,
    bias: Tensor | None,
    settings: _Settings,
    mixing: Mixing,
    kept: list[Tensor | None] | None = None,
) -> Tensor:
    """Computes block by block. ``kept`` collects, for every block, its kernels or None."""
    _, sample_map, dtype = settings
    results = []
    for block in mixing.blocks(attention):
        images, weights = x[block], attention[block]
        kernels = None
        if kept is not None:
            is_kept = mixing.is_kept(block, attention.shape[1])
            kernels = mixing.kernels(weights) if is_kept else None
            kept.append(kernels)
        for part, some in mixing.mixed(weights, kernels):
            results.append(sample_map(images[part], some.to(dtype), bias))
    return _joined(results)


class _ApplyMixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attention: Tensor,
        cells: Tensor,
        bias: Tensor | None,
        token_tensor: Tensor | None,
        token: Token | None,
        settings: _Settings,
        mixing_of: Callable[[Tensor], Mixing],
    ) -> Tensor:
        kept: list[Tensor | None] = []
        mixing = mixing_of(cells)
        result = _apply_in_parts(x, attention, bias, settings, mixing, kept)
        ctx.save_for_backward(x, attention, cells, bias, *kept)
        ctx.token, ctx.settings, ctx.mixing_of = token, settings, mixing_of
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, attention, cells, bias, *kept = ctx.saved_tensors
        if torch.is_grad_enabled() or modes.is_seen_through(grad, x, attention, cells):
            gradients = _backward_plainly(ctx, grad, x, attention, cells, bias)
        else:
            gradients = _backward_in_parts(ctx, grad, x, attention, cells, kept)
        return *gradients, None, None, None, None


def _backward_in_parts(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    kept: list[Tensor | None],
) -> tuple[Tensor | None, ...]:
    need_x, need_attention, _, need_bias = ctx.needs_input_grad[:4]
    grid, sample_map, dtype = ctx.settings
    mixing = ctx.mixing_of(cells)
    need_cells = ctx.token is not None and ctx.token.is_awaited()
    total = ctx.token.sum(mixing) if need_cells else None
    shape = assembled_shape(cells.shape[1:], grid)
    grads_x, grads_attention = [], []
    blocks = mixing.blocks(attention) if need_x or need_attention or need_cells else ()
    for block, kernels in zip(blocks, kept):
        grad_block, x_block, weights = grad[block], x[block], attention[block]
        if need_attention or need_cells:
            grad_kernels = (
                sample_map.backward_kernels(grad_block[part], x_block[part], shape, mixing.scratch)
                for part in mixing.parts(weights)
            )
            grad_attention, mixed = mixing.backward(grad_kernels, weights, total, kernels, need_x)
            grads_attention.append(grad_attention)
        else:
            mixed = mixing.mixed(weights, kernels)
        if need_x:
            for part, some in mixed:
                images = grad_block[part], x_block[part]
                grads_x.append(sample_map.backward_x(*images, some.to(dtype)))
    summed = [dim for dim in range(grad.dim()) if dim != sample_map.channel_dim % grad.dim()]
    return (
        _joined(grads_x) if need_x else None,
        _joined(grads_attention) if need_attention else None,
        # The gradient of the cells goes through the token that the layers share.
        None,
        grad.sum(summed) if need_bias else None,
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _backward_plainly(
    ctx: Any, grad: Tensor, x: Tensor, attention: Tensor, cells: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Computes the gradients by autograd, so that they can be differentiated and transformed."""
    with torch.enable_grad():
        # New views, so that differentiation ends here. The attention is computed from the images,
        # and differentiation must not continue through that.
        x, attention, cells = (tensor.view_as(tensor) for tensor in (x, attention, cells))
        bias = None if bias is None else bias.view_as(bias)
        result = _apply_plainly(x, attention, cells, bias, ctx.settings)
    needed = ctx.needs_input_grad[:4]
    operands = (x, attention, cells, bias)
    inputs = [tensor for tensor, need in zip(operands, needed) if need and tensor is not None]
    again = torch.is_grad_enabled()
    gradients = iter(torch.autograd.grad(result, inputs, grad, create_graph=again))
    return tuple(next(gradients) if need else None for need in needed)

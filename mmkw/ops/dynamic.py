"""The whole operator: mixes every image's kernel and applies it, in little memory.

Autograd alone would keep the kernels of every image and layer, and would add up one gradient of the
whole warehouse for each of its layers. Here kernels live for some images at a time and are mixed
again in the backward pass, unless that takes long; the layers of a warehouse add their gradients
to one sum.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import modes
from .mixing import (
    CellSum,
    batch_blocks,
    image_parts,
    kept_bytes,
    kernel_shape,
    mix_backward,
    mix_cells,
    mixed_kernels,
)
from .sample_conv import SampleConv, SampleLinear


class _Settings(NamedTuple):
    """What is no tensor: the grid of the kernel, what applies it, and the precision for that."""

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
    """Maps every image by the kernel mixed for it from the cells of a warehouse.

    Equal to ``sample_map(x, mix_cells(attention, cells, grid), bias)``, differentiable as often as
    it is, and computed so wherever a transformation (``torch.func``, forward-mode differentiation,
    ``torch.export``, ``torch.compile``) has to look inside.

    Args:
        x: Tensor[batch, ...], the images or tokens. Under autocast they and the kernels are cast;
            mixing itself is done in the precision of the cells.
        attention: Tensor[batch, mixtures, cells].
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: Cells of the kernel along ``(*spatial, out, in)``.
        sample_map: What applies the kernels.
        bias: Shared by the images.

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
    if _is_transformed(x):
        return _apply_plainly(x, attention, cells, bias, settings)
    learning = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, attention, cells, bias)
    )
    if not learning:
        return _apply_in_parts(x, attention, cells, bias, settings)[0]
    token = _CellGradients.token(cells) if cells.requires_grad else None
    return _ApplyMixed.apply(x, attention, cells, bias, token, settings)


def _is_transformed(x: Tensor) -> bool:
    return (
        x.shape[0] == 0 or modes.is_compiling() or modes.is_exporting() or modes.is_transforming()
    )


def _apply_plainly(
    x: Tensor, attention: Tensor, cells: Tensor, bias: Tensor | None, settings: _Settings
) -> Tensor:
    grid, sample_map, dtype = settings
    return sample_map(x, mix_cells(attention, cells, grid).to(dtype), bias)


def _apply_in_parts(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    bias: Tensor | None,
    settings: _Settings,
    token: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The result, and of every block of images the kernels that a backward pass shall have."""
    grid, sample_map, dtype = settings
    parts, kept = [], []
    for block in batch_blocks(attention, cells):
        images, weights = x[block], attention[block]
        keeps = token is not None and _CellGradients.keeps(token, weights, cells)
        kept.append(mix_cells(weights, cells, grid) if keeps else None)
        for part, kernels in mixed_kernels(weights, cells, grid, kept[-1]):
            parts.append(sample_map(images[part], kernels.to(dtype), bias))
    return _joined(parts), kept


class _ApplyMixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attention: Tensor,
        cells: Tensor,
        bias: Tensor | None,
        token: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        result, kept = _apply_in_parts(x, attention, cells, bias, settings, token)
        ctx.save_for_backward(x, attention, cells, bias, *kept)
        ctx.token, ctx.settings = token, settings
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, attention, cells, bias, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = _differentiable_backward(ctx, grad, x, attention, cells, bias)
        else:
            gradients = _backward(ctx, grad, x, attention, cells, kept)
        return *gradients, None, None


def _backward(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    kept: list[Tensor | None],
) -> tuple[Tensor | None, ...]:
    need_x, need_attention, need_cells, need_bias = ctx.needs_input_grad[:4]
    grid, sample_map, dtype = ctx.settings
    total = _CellGradients.running_sum(ctx.token, cells) if need_cells else None
    shape = kernel_shape(cells.shape[1:], grid)
    grads_x, grads_attention = [], []
    blocks = batch_blocks(attention, cells) if need_x or need_attention or need_cells else ()
    for block, kernels in zip(blocks, kept):
        grad_block, x_block, weights = grad[block], x[block], attention[block]
        if need_attention or need_cells:
            grad_kernels = (
                kernel
                for part in image_parts(weights, cells, grid)
                for kernel in sample_map.backward_kernels(grad_block[part], x_block[part], shape)
            )
            grad_attention, mixed = mix_backward(grad_kernels, weights, cells, grid, total, kernels)
            grads_attention.append(grad_attention)
        else:
            mixed = mixed_kernels(weights, cells, grid, kernels)
        if need_x:
            for part, some in mixed:
                images = grad_block[part], x_block[part]
                grads_x.append(sample_map.backward_x(*images, some.to(dtype)))
    summed = [dim for dim in range(grad.dim()) if dim != sample_map.channel_dim % grad.dim()]
    return (
        _joined(grads_x) if need_x else None,
        _joined(grads_attention) if need_attention else None,
        # What the layers of a warehouse owe to it is handed in by their token.
        None,
        grad.sum(summed) if need_bias else None,
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _differentiable_backward(
    ctx: Any, grad: Tensor, x: Tensor, attention: Tensor, cells: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again: autograd's own."""
    result = _apply_plainly(x, attention, cells, bias, ctx.settings)
    needed = ctx.needs_input_grad[:4]
    inputs = [tensor for tensor, need in zip((x, attention, cells, bias), needed) if need]
    gradients = iter(torch.autograd.grad(result, inputs, grad, create_graph=True))
    return tuple(next(gradients) if need else None for need in needed)


class _CellGradients(torch.autograd.Function):
    """Sums up what the layers of a warehouse contribute to its gradient.

    The layers of one forward pass hold the same *token*, an empty tensor made from the cells; by it
    autograd knows that the cells depend on all of them. In the backward pass a layer adds its part
    to the running sum in place and gives its token no gradient; when the last layer is done,
    autograd calls the token's backward, which hands over the sum. Sums are kept apart by backward
    pass, so one that stops before the cells (``torch.autograd.grad`` to the image) leaves nothing
    to the next.
    """

    # The token of the cells that are in use, for as long as a layer's graph holds it.
    _tokens: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @classmethod
    def token(cls, cells: Tensor) -> Tensor:
        reference = cls._tokens.get(cells)
        token = reference() if reference is not None else None
        if token is None:
            token = cls.apply(cells)
            cls._tokens[cells] = weakref.ref(token)
        return token

    @staticmethod
    def keeps(token: Tensor, attention: Tensor, cells: Tensor) -> bool:
        """Whether a layer should keep the kernels of some images for its backward pass.

        What the layers that hold the token keep counts, until the backward pass.
        """
        more = kept_bytes(attention, cells, token.grad_fn.kept)
        token.grad_fn.kept += more
        return more > 0

    @staticmethod
    def running_sum(token: Tensor, cells: Tensor) -> CellSum:
        """The sum of the backward pass that is running."""
        sums, task = token.grad_fn.sums, torch._C._current_graph_task_id()
        if task not in sums:
            sums[task] = CellSum(cells)
        return sums[task]

    @staticmethod
    def forward(ctx: Any, cells: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sums = {}
        ctx.kept = 0
        return cells.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        ctx.kept = 0
        running = ctx.sums.pop(torch._C._current_graph_task_id(), None)
        return running if running is None else running.total()

"""Mixing and attention by the Triton kernels of ``mmkw.ops.triton``, for GPUs.

Importing this module fails where Triton is missing. :mod:`.backend` imports it when the first
tensor on a GPU is computed.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import modes
from .kernels import assemble, assembled_shape
from .mixing import Mixing
from .triton import attention as attending
from .triton import mixing as kernels
from .triton.attention import MOST_CELLS, MOST_IMAGES, Norm, Parameters, Saved, Start

if TYPE_CHECKING:
    from .gradient import CellSum

__all__ = ['MOST_CELLS', 'MOST_IMAGES', 'FusedMixing', 'Norm', 'Parameters', 'Start', 'attend']


class FusedMixing(Mixing):
    """Mixing in the precision of the map, with sums in float32.

    For few mixtures reading the cells takes the time. Then one kernel mixes, assembles and casts.
    For many, a product of matrices in the lower precision is faster, and its result is not moved
    where its order in memory suits the map.

    Args:
        cells: As in :class:`Mixing`.
        grid: As in :class:`Mixing`.
        dtype: As in :class:`Mixing`.
        channels_last: Whether the channels of a kernel should lie together in memory.
    """

    # From this number of mixtures on, arithmetic takes longer than reading the cells once more.
    MANY_MIXTURES = 64

    def __init__(
        self, cells: Tensor, grid: Sequence[int], dtype: torch.dtype, channels_last: bool = False
    ) -> None:
        super().__init__(cells, grid, dtype)
        self.channels_last = channels_last

    def is_kept(self, block: slice, mixtures: int) -> bool:
        """See :class:`Mixing`. Kernels are kept if reading them again takes less than mixing."""
        images = block.stop - block.start
        kept = images * mixtures * self.dtype.itemsize
        return kept <= len(self.cells) * self.cells.element_size()

    def _has_many(self, attention: Tensor) -> bool:
        return attention.shape[:2].numel() > self.MANY_MIXTURES

    def kernels(self, attention: Tensor) -> Tensor:
        """See :class:`Mixing`."""
        cells = self.cells
        if self._has_many(attention):
            rows = _padded(attention.flatten(0, 1), 1, self.dtype) @ _padded(
                cells.flatten(1), 0, self.dtype
            )
            return assemble(rows.view(*attention.shape[:2], *cells.shape[1:]), self.grid)
        out, into, *size = assembled_shape(cells.shape[1:], self.grid)
        shape = (out, *size, into) if self.channels_last else (out, into, *size)
        mixed = cells.new_empty(len(attention), *shape, dtype=self.dtype)
        if self.channels_last:
            mixed = mixed.movedim(-1, 2)
        kernels.mix(attention, cells, self.grid, mixed)
        return mixed

    def mixed(
        self, attention: Tensor, kept: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :class:`Mixing`."""
        yield slice(None), self.kernels(attention) if kept is None else kept

    def backward(
        self,
        grad_kernels: Iterable[Tensor | Sequence[Tensor]],
        attention: Tensor,
        total: 'CellSum | None',
        kept: Tensor | None,
        again: bool,
    ) -> tuple[Tensor, Iterator[tuple[slice, Tensor]]]:
        """See :class:`Mixing`."""
        (gradients,) = grad_kernels
        if not isinstance(gradients, Tensor):
            gradients = torch.stack(tuple(gradients))
        place = rows = None if total is None else total.place(self, attention, gradients.dtype)
        if total is not None and rows is None:
            shape = (*attention.shape[:2], *self.cells.shape[1:])
            rows = self.cells.new_empty(shape, dtype=gradients.dtype)
        cells = self.cells.to(self.dtype) if self._has_many(attention) else self.cells
        grad = kernels.unmix(gradients, cells, self.grid, attention.shape[1], rows)
        if total is not None and rows is not None:
            total.add(attention, rows, waits=place is not None)
        return grad.to(attention.dtype), self.mixed(attention, kept)

    @staticmethod
    def add_to_cells(weights: Tensor, rows: Tensor, total: Tensor, begin: bool) -> None:
        """See :class:`Mixing`."""
        if len(rows) <= FusedMixing.MANY_MIXTURES or rows.dtype == torch.float32:
            kernels.add_to_cells(weights, rows, total, begin)
            return
        weights = _padded(weights, 1, rows.dtype)[:, : weights.shape[1]]
        added = (weights.t() @ rows.flatten(1)).view(total.shape)
        if begin:
            total.copy_(added)
        else:
            total += added


def _padded(matrix: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Casts a matrix and adds zeros: libraries are slow for sizes that are no multiples of 8."""
    size = list(matrix.shape)
    size[dim] = -(-size[dim] // 8) * 8
    if size == list(matrix.shape):
        return matrix.to(dtype)
    padded = matrix.new_zeros(size, dtype=dtype)
    padded.narrow(dim, 0, matrix.shape[dim]).copy_(matrix)
    return padded


def attend(
    pooled: Tensor, parameters: Parameters, norm: Norm, start: Start, denominator_eps: float
) -> Tensor:
    """Computes attentions, also under autocast in float32.

    Autograd can differentiate the result, as often as needed.

    Args:
        pooled: Tensor[batch, channels] in float32, with at most ``MOST_IMAGES`` images.
        parameters: The parameters, contiguous and in float32.
        norm: What the norm does. Its running statistics change in place.
        start: The one-to-one start.
        denominator_eps: Added to the sum of the logits' magnitudes.

    Returns:
        Tensor[batch, mixtures, cells].
    """
    with torch.autocast(pooled.device.type, enabled=False):
        return _Attend.apply(pooled, *parameters, norm, start, denominator_eps)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pooled: Tensor, *arguments: Any) -> Tensor:
        *parameters, norm, start, eps = arguments
        pooled = pooled.contiguous()
        alpha, saved = attending.forward(pooled, Parameters(*parameters), norm, start, eps)
        ctx.save_for_backward(pooled, *parameters, *saved)
        ctx.norm, ctx.start, ctx.eps = norm, start, eps
        return alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(Parameters._fields)
        pooled, *tensors = ctx.saved_tensors
        parameters, saved = Parameters(*tensors[:count]), Saved(*tensors[count:])
        if torch.is_grad_enabled() or modes.is_seen_through(grad, pooled):
            gradients = _backward_plainly(ctx, grad, pooled, parameters)
        else:
            grad_pooled, of_parameters = attending.backward(
                grad.contiguous(),
                pooled,
                parameters,
                ctx.norm.kind,
                ctx.start.temperature,
                ctx.eps,
                saved,
            )
            gradients = (grad_pooled, *of_parameters)
        needed = zip(gradients, ctx.needs_input_grad)
        return *(value if need else None for value, need in needed), None, None, None


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

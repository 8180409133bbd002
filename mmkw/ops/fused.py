"""Mixing by the Triton kernels of ``mmkw.ops.triton``, for GPUs, and the module of its attention.

Importing this module fails where Triton is missing. :mod:`.backend` imports it when the first
tensor on a GPU is computed.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kernels import assemble, assembled_shape
from .mixing import Mixing
from .triton import attention
from .triton import mixing as kernels

if TYPE_CHECKING:
    from .gradient import CellSum

__all__ = ['FusedMixing', 'attention']


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
        yield slice(0, len(attention)), self.kernels(attention) if kept is None else kept

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

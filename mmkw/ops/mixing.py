"""Mixing and its backward pass, as constants: a block of images at a time, by PyTorch.

:mod:`.compiled` does the same by kernels of our own.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kernels import assemble, cut_kernels
from .memory import Scratch

if TYPE_CHECKING:
    from .gradient import CellSum

# Bytes of kernels that are mixed by one product: the more, the fewer passes over a warehouse.
BLOCK_BYTES = {'cpu': 40 << 20}
# Bytes of kernels that are put together at a time. On the CPU they should stay in the caches, and
# below the size from which the C library asks the system for fresh pages on every call.
PART_BYTES = {'cpu': 30 << 20}
DEFAULT_BYTES = 512 << 20
# Where mixing kernels again takes far longer than fresh memory for them, from so many cells on,
# those of the first images are kept for the backward pass: of so many as have this size in all if
# every layer's kernels were as large as the warehouse. (With a budget of 4 they take a fourth.)
KEPT_CELLS = 256
KEPT_BYTES = {'cpu': 1152 << 20}
# Of more mixtures than these, which do not wait for memory, half as many.
FEW_MIXTURES = 40


class Mixing:
    """Mixes the kernels of a layer from its warehouse, and goes back.

    Args:
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: Cells of the kernel along ``(*spatial, out, in)``.
    """

    def __init__(self, cells: Tensor, grid: Sequence[int]) -> None:
        self.cells = cells
        self.grid = grid
        self.scratch = Scratch.of_thread()

    def blocks(self, attention: Tensor) -> list[slice]:
        """Images to be mixed together.

        Args:
            attention: Tensor[batch, mixtures, cells], of a whole batch.
        """
        return self._slices(attention, BLOCK_BYTES)

    def parts(self, attention: Tensor) -> list[slice]:
        """Images whose kernels are put together at a time.

        Args:
            attention: Tensor[images, mixtures, cells], of one of the blocks.
        """
        return self._slices(attention, PART_BYTES)

    def is_kept(self, block: slice, mixtures: int) -> bool:
        """Whether the kernels of a block should be kept for the backward pass.

        It follows from shapes alone, so that a forward pass that is run again keeps the same.

        Args:
            block: Images.
            mixtures: Of each of them.
        """
        cells = self.cells
        limit = KEPT_BYTES.get(cells.device.type, 4 * DEFAULT_BYTES)
        if (block.stop - block.start) * mixtures > FEW_MIXTURES:
            limit //= 2
        return len(cells) >= KEPT_CELLS and (
            block.stop * cells.numel() * cells.element_size() <= limit
        )

    def kernels(self, attention: Tensor) -> Tensor:
        """The kernels of some images, in memory of their own.

        Args:
            attention: Tensor[images, mixtures, cells].
        """
        parts = [kernels for _, kernels in self.mixed(attention)]
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()

    def mixed(
        self, attention: Tensor, kept: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Mixes the kernels of some images in parts small enough for the caches.

        A part is gone when the next is asked for: it may lie in memory that all of them use.

        Args:
            attention: Tensor[images, mixtures, cells], of one of the blocks.
            kept: The kernels of all these images, if they need not be mixed.

        Yields:
            Images and their kernels.
        """
        if kept is not None:
            yield slice(None), kept
            return
        rows = self._rows(attention, 'mixing')
        flat = rows.flatten(0, 1).flatten(1)
        torch.mm(attention.flatten(0, 1), self.cells.flatten(1), out=flat)
        for images in self.parts(attention):
            yield images, assemble(rows[images], self.grid)

    def backward(
        self,
        grad_kernels: Iterable[Tensor],
        attention: Tensor,
        total: 'CellSum | None',
        kept: Tensor | None,
        again: bool,
    ) -> tuple[Tensor, Iterator[tuple[slice, Tensor]]]:
        """Goes back from kernels to attentions and cells.

        Args:
            grad_kernels: For every image the gradient of its kernel; those of one of the
                :meth:`parts` may be gone when the next are asked for.
            attention: Tensor[images, mixtures, cells], of one of the blocks.
            total: What the gradient of the cells is added to, if it is wanted.
            kept: The kernels, if they need not be mixed again.
            again: Whether the kernels are wanted.

        Returns:
            The gradient of ``attention``, and the kernels as of :meth:`mixed`.
        """
        place = None if total is None else total.place(attention)
        rows = self._rows(attention, 'mixing') if place is None else place
        cut_kernels(grad_kernels, self.grid, rows)
        grad_attention = rows.flatten(0, 1).flatten(1) @ self.cells.flatten(1).t()
        if total is not None:
            total.add(attention, rows, waits=place is not None)
        # Takes the scratch memory over, but not before it is asked for kernels.
        return grad_attention.view(attention.shape), self.mixed(attention, kept)

    @staticmethod
    def add_to_cells(weights: Tensor, rows: Tensor, total: Tensor, begin: bool) -> None:
        """Adds what some mixtures contribute to the gradient of the cells.

        Args:
            weights: Tensor[mixtures, cells], their attentions.
            rows: Tensor[mixtures, cell_out, cell_in, *cell_kernel], their gradients.
            total: Tensor[cells, cell_out, cell_in, *cell_kernel], added to in place.
            begin: Whether it is to be overwritten instead.
        """
        if begin:
            torch.mm(weights.t(), rows.flatten(1), out=total.flatten(1))
        else:
            total.flatten(1).addmm_(weights.t(), rows.flatten(1))

    def _rows(self, attention: Tensor, use: str) -> Tensor:
        """Memory for mixtures: Tensor[images, mixtures, cell_out, cell_in, *cell_kernel]."""
        shape = (*attention.shape[:2], *self.cells.shape[1:])
        return self.scratch.take(self.cells, shape, use)

    def _slices(self, attention: Tensor, limits: Mapping[str, int]) -> list[slice]:
        batch, cells = len(attention), self.cells
        limit = limits.get(cells.device.type, DEFAULT_BYTES)
        image_bytes = attention.shape[1] * cells[0].numel() * cells.element_size()
        count = max(math.ceil(batch / max(limit // image_bytes, 1)), 1)
        bounds = [batch * index // count for index in range(count + 1)]
        return [slice(*ends) for ends in itertools.pairwise(bounds)]

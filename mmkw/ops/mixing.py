"""Mixing and its backward pass by PyTorch, for one block of images at a time.

Autograd does not record these computations. :mod:`.compiled` does the same by compiled kernels.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels import assemble, cut_kernels
from .memory import Scratch

if TYPE_CHECKING:
    from .gradient import CellSum

# Bytes of kernels that one product mixes. A larger number means fewer passes over a warehouse.
BLOCK_BYTES = {'cpu': 40 << 20}
# Bytes of kernels that are assembled at a time. On the CPU they should stay in the caches. For
# larger sizes the C library also asks the system for fresh memory on every call.
PART_BYTES = {'cpu': 30 << 20}
# The limit of both on other devices.
DEFAULT_BYTES = 512 << 20
# From this number of cells on, mixing again takes far longer than fresh memory for the kernels. So
# the kernels of the first images are kept for the backward pass. The number of these images times
# the size of the warehouse has at most KEPT_BYTES. (With a budget of 4 and one layer the kernels
# take a fourth of that.)
KEPT_CELLS = 256
KEPT_BYTES = {'cpu': 1152 << 20}
# A block with more mixtures is limited by arithmetic, not by memory. It may keep half as much.
FEW_MIXTURES = 40


class Mixing:
    """Mixes the kernels of a layer from its warehouse, and computes the gradients.

    Args:
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: Cells of the kernel along ``(*spatial, out, in)``.
        dtype: Precision of the map that applies the kernels.
    """

    def __init__(self, cells: Tensor, grid: Sequence[int], dtype: torch.dtype) -> None:
        self.cells = cells
        self.grid = grid
        self.dtype = dtype
        self.scratch = Scratch.of_thread()

    def blocks(self, attention: Tensor) -> list[slice]:
        """The blocks of images whose kernels one product mixes.

        Args:
            attention: Tensor[batch, mixtures, cells] of the whole batch.
        """
        return self._slices(attention, BLOCK_BYTES)

    def parts(self, attention: Tensor) -> list[slice]:
        """The parts of a block whose kernels are assembled at a time.

        Args:
            attention: Tensor[images, mixtures, cells] of one block.
        """
        return self._slices(attention, PART_BYTES)

    def applying(self, sample_map: Any) -> Any:
        """What applies the kernels, as constants.

        Args:
            sample_map: The layer's own map, which autograd can differentiate, too.
        """
        return sample_map

    def is_kept(self, block: slice, mixtures: int) -> bool:
        """Whether the kernels of a block are kept for the backward pass.

        The answer depends on shapes only, so that a recomputed forward pass keeps the same kernels.

        Args:
            block: The images of the block.
            mixtures: Mixtures per image.
        """
        cells = self.cells
        limit = KEPT_BYTES.get(cells.device.type, 4 * DEFAULT_BYTES)
        if (block.stop - block.start) * mixtures > FEW_MIXTURES:
            limit //= 2
        return cells.shape[0] >= KEPT_CELLS and (
            block.stop * cells.numel() * cells.element_size() <= limit
        )

    def kernels(self, attention: Tensor) -> Tensor:
        """Mixes the kernels of some images, in new memory.

        Args:
            attention: Tensor[images, mixtures, cells].
        """
        parts = [kernels for _, kernels in self.mixed(attention)]
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()

    def mixed(
        self, attention: Tensor, kept: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Mixes the kernels of some images, in parts that are small enough for the caches.

        A part is valid only until the next part: all parts may use the same memory.

        Args:
            attention: Tensor[images, mixtures, cells] of one block.
            kept: The kernels of all these images, if they are mixed already.

        Yields:
            The images of a part, from one to another, and their kernels.
        """
        if kept is not None:
            yield slice(0, kept.shape[0]), kept
            return
        rows = self._rows(attention, 'mixing')
        flat = rows.flatten(0, 1).flatten(1)
        torch.mm(attention.flatten(0, 1), self.cells.flatten(1), out=flat)
        for images in self.parts(attention):
            yield images, assemble(rows[images], self.grid)

    def backward(
        self,
        grad_kernels: Iterable[Tensor | Sequence[Tensor]],
        attention: Tensor,
        total: 'CellSum | None',
        kept: Tensor | None,
        again: bool,
    ) -> tuple[Tensor, Iterator[tuple[slice, Tensor]]]:
        """Computes the gradients of attentions and cells from the gradients of kernels.

        Args:
            grad_kernels: For each of the :meth:`parts` the gradients of its images' kernels. They
                are valid only until the next part.
            attention: Tensor[images, mixtures, cells] of one block.
            total: The sum to which the gradient of the cells is added; None if it is not needed.
            kept: The kernels, if the forward pass has kept them.
            again: Whether the caller needs the kernels.

        Returns:
            The gradient of ``attention``, and the kernels as from :meth:`mixed`.
        """
        place = None if total is None else total.place(self, attention, self.cells.dtype)
        rows = self._rows(attention, 'mixing') if place is None else place
        cut_kernels(grad_kernels, self.grid, rows)
        grad_attention = rows.flatten(0, 1).flatten(1) @ self.cells.flatten(1).t()
        if total is not None:
            total.add(attention, rows, waits=place is not None)
        # mixed() overwrites the scratch memory of rows, but only when it is iterated.
        return grad_attention.view(attention.shape), self.mixed(attention, kept)

    @staticmethod
    def add_to_cells(weights: Tensor, rows: Tensor, total: Tensor, begin: bool) -> None:
        """Adds the contribution of some mixtures to the gradient of the cells.

        Args:
            weights: Tensor[mixtures, cells], the attentions of the mixtures.
            rows: Tensor[mixtures, cell_out, cell_in, *cell_kernel], the gradients of the mixtures.
            total: Tensor[cells, cell_out, cell_in, *cell_kernel], the gradient; changed in place.
            begin: Whether ``total`` is overwritten instead.
        """
        if begin:
            torch.mm(weights.t(), rows.flatten(1), out=total.flatten(1))
        else:
            total.flatten(1).addmm_(weights.t(), rows.flatten(1))

    def _rows(self, attention: Tensor, use: str, dtype: torch.dtype | None = None) -> Tensor:
        """Takes memory for Tensor[images, mixtures, cell_out, cell_in, *cell_kernel]."""
        shape = (*attention.shape[:2], *self.cells.shape[1:])
        return self.scratch.take(self.cells, shape, use, dtype)

    def _slices(self, attention: Tensor, limits: Mapping[str, int]) -> list[slice]:
        batch, cells = attention.shape[0], self.cells
        limit = limits.get(cells.device.type, DEFAULT_BYTES)
        # Of integers kernels are mixed in float32.
        of_value = cells.element_size() if cells.is_floating_point() else 4
        image_bytes = attention.shape[1] * cells.shape[1:].numel() * of_value
        if batch * image_bytes <= limit:
            return [slice(0, batch)]
        count = max(math.ceil(batch / max(limit // image_bytes, 1)), 1)
        bounds = [batch * index // count for index in range(count + 1)]
        return [slice(*ends) for ends in itertools.pairwise(bounds)]

"""Assembles kernels from kernel cells, and takes them apart (paper, section 3.1)."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from . import native
from .memory import scratch


def mix_cells(attention: Tensor, cells: Tensor, grid: Sequence[int]) -> Tensor:
    """Mixes the cells of a warehouse into one kernel per image.

    Every cell of the kernel is ``w_i = sum_j attention_ij cells_j``. The mixtures are ordered
    ``(spatial..., out block, in block)``.

    Args:
        attention: Tensor[batch, mixtures, cells], any real values.
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: How many cells the kernel has along ``(*spatial, out, in)``; their product is
            ``mixtures``.

    Returns:
        Tensor[batch, out * cell_out, in * cell_in, *(spatial * cell_kernel)].
    """
    learning = torch.is_grad_enabled() and (attention.requires_grad or cells.requires_grad)
    if native.serves(attention, cells, grid) and not learning:
        return torch.ops.mmkw.mix_cells(attention, cells, grid)
    rows = attention.flatten(0, 1) @ cells.flatten(1)
    return _assembled(rows.view(-1, math.prod(grid), *cells.shape[1:]), grid)


def _assembled(rows: Tensor, grid: Sequence[int]) -> Tensor:
    """Tensor[batch, mixtures, cell_out, cell_in, *cell_kernel] to kernels."""
    dims = len(grid) - 2
    cells = rows.unflatten(1, tuple(grid))
    # (batch, spatial, out, in, cell_out, cell_in, cell_kernel)
    # -> (batch, out, cell_out, in, cell_in, spatial_1, cell_kernel_1, spatial_2, ...)
    out = dims + 1
    order = [0, out, out + 2, out + 1, out + 3]
    for dim in range(dims):
        order += [1 + dim, out + 4 + dim]
    return cells.permute(order).reshape(rows.shape[0], *kernel_shape(rows.shape[2:], grid))


def kernel_shape(cell_shape: Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    """The shape of an image's kernel.

    Args:
        cell_shape: ``(cell_out, cell_in, *cell_kernel)``.
        grid: As in :func:`mix_cells`.

    Returns:
        ``(out, in, *kernel_size)``.
    """
    *spatial, out_blocks, in_blocks = grid
    cell_out, cell_in, *cell_kernel = cell_shape
    size = (blocks * side for blocks, side in zip(spatial, cell_kernel))
    return (out_blocks * cell_out, in_blocks * cell_in, *size)


# What torch.compile takes for the compiled kernels; without the newer name its graph breaks there.
if native.built and hasattr(torch.library, 'register_fake'):

    @torch.library.register_fake('mmkw::mix_cells')
    def _(attention: Tensor, cells: Tensor, grid: Sequence[int]) -> Tensor:
        return cells.new_empty(attention.shape[0], *kernel_shape(cells.shape[1:], grid))


def mixed_kernels(
    attention: Tensor, cells: Tensor, grid: Sequence[int], kept: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Mixes the kernels of some images, as constants, in parts small enough for the caches.

    A part is gone when the next is asked for: it may lie in memory that all of them use.

    Args:
        attention: Tensor[batch, mixtures, cells], as much of a batch as :func:`batch_blocks` says.
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: As in :func:`mix_cells`.
        kept: The kernels of all these images, if they need not be mixed.

    Yields:
        Images and their kernels.
    """
    if kept is not None:
        yield slice(None), kept
    elif native.serves(attention, cells, grid):
        kernels = _kernels(attention, cells, grid)
        torch.ops.mmkw.mix_cells_into(attention, cells, grid, kernels)
        yield slice(None), kernels
    else:
        rows = _rows(attention, cells)
        torch.mm(attention.flatten(0, 1), cells.flatten(1), out=rows.flatten(0, 1).flatten(1))
        for images in image_parts(attention, cells, grid):
            yield images, _assembled(rows[images], grid)


def _kernels(attention: Tensor, cells: Tensor, grid: Sequence[int]) -> Tensor:
    """Memory for kernels: Tensor[batch, out, in, *kernel_size]."""
    return scratch(cells, (len(attention), *kernel_shape(cells.shape[1:], grid)), 'mixing')


def _rows(attention: Tensor, cells: Tensor, use: str = 'mixing') -> Tensor:
    """Memory for mixtures: Tensor[batch, mixtures, cell_out, cell_in, *cell_kernel]."""
    return scratch(cells, (*attention.shape[:2], *cells.shape[1:]), use)


def mix_backward(
    grad_kernels: Iterable[Tensor],
    attention: Tensor,
    cells: Tensor,
    grid: Sequence[int],
    total: 'CellSum | None',
    kept: Tensor | None = None,
) -> tuple[Tensor, Iterator[tuple[slice, Tensor]]]:
    """Goes back through :func:`mix_cells`.

    Args:
        grad_kernels: For every image the gradient of its kernel; those of one of the
            :func:`image_parts` may be gone when the next are asked for.
        attention: Tensor[batch, mixtures, cells], as much of a batch as :func:`batch_blocks` says.
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: As in :func:`mix_cells`.
        total: What the gradient of the cells is added to, if it is wanted.
        kept: The kernels, if they need not be mixed again.

    Returns:
        The gradient of ``attention``, and the kernels as of :func:`mixed_kernels`.
    """
    place = None if total is None else total.place(attention)
    if native.serves(attention, cells, grid):
        rows = place
        if total is not None and place is None:
            rows = _rows(attention, cells, 'rows')
        gradients = [kernel.to(cells.dtype) for kernel in grad_kernels]
        again = None
        if kept is None:
            kept = again = _kernels(attention, cells, grid)
        arguments = (gradients, attention, cells, grid, again, rows)
        grad_attention = torch.ops.mmkw.mix_backward(*arguments)
    else:
        rows = _rows(attention, cells) if place is None else place
        cut_kernels(grad_kernels, grid, rows)
        grad_attention = rows.flatten(0, 1).flatten(1) @ cells.flatten(1).t()
    if total is not None:
        total.add(attention, rows, waits=place is not None)
    # Takes the scratch memory over, but not before it is asked for kernels.
    return grad_attention.view(attention.shape), mixed_kernels(attention, cells, grid, kept)


def cut_kernels(kernels: Iterable[Tensor], grid: Sequence[int], rows: Tensor) -> None:
    """Cuts the kernels of some images into rows, one for every mixture: undoes the assembly.

    Args:
        kernels: For every image a Tensor[out, in, *kernel_size].
        grid: As in :func:`mix_cells`.
        rows: Tensor[images, mixtures, cell_out, cell_in, *cell_kernel], to be filled.
    """
    *spatial, out_blocks, in_blocks = grid
    cell_out, cell_in, *cell_kernel = rows.shape[2:]
    dims = len(spatial)
    shape = [out_blocks, cell_out, in_blocks, cell_in]
    for blocks, size in zip(spatial, cell_kernel):
        shape += [blocks, size]
    order = [*range(4, 4 + 2 * dims, 2), 0, 2, 1, 3, *range(5, 5 + 2 * dims, 2)]
    for kernel, mixtures in zip(kernels, rows):
        cut = kernel.reshape(shape).permute(order)
        mixtures.view(cut.shape).copy_(cut)


# Bytes of kernels that are mixed by one product: the more, the fewer passes over a warehouse.
BLOCK_BYTES = {'cpu': 40 << 20}
# Bytes of kernels that the layers of one warehouse may keep for the backward pass, where mixing
# them again takes far longer than fresh memory for them: from so many cells on.
KEPT_BYTES = {'cpu': 160 << 20}
KEPT_CELLS = 256
# Bytes of kernels that are put together at a time. On the CPU they should stay in the caches, and
# below the size from which the C library asks the system for fresh pages on every call.
PART_BYTES = {'cpu': 30 << 20}
DEFAULT_BYTES = 512 << 20


def batch_blocks(attention: Tensor, cells: Tensor) -> list[slice]:
    """Images to be mixed together, for a whole batch."""
    return _slices(attention, cells, BLOCK_BYTES)


def kept_bytes(attention: Tensor, cells: Tensor, already: int) -> int:
    """What the kernels of some images take, if they should be kept for the backward pass; else 0.

    Args:
        attention: Tensor[images, mixtures, cells], that the kernels are mixed by.
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        already: Bytes of kernels that the warehouse's layers keep.
    """
    more = len(attention) * _image_bytes(attention, cells)
    limit = KEPT_BYTES.get(cells.device.type, DEFAULT_BYTES)
    return more if len(cells) >= KEPT_CELLS and already + more <= limit else 0


def image_parts(attention: Tensor, cells: Tensor, grid: Sequence[int]) -> list[slice]:
    """Images whose kernels are put together at a time, for one of the blocks.

    The compiled kernels put them together as they mix them.
    """
    if native.serves(attention, cells, grid):
        return [slice(None)]
    return _slices(attention, cells, PART_BYTES)


def _slices(attention: Tensor, cells: Tensor, limits: Mapping[str, int]) -> list[slice]:
    batch = len(attention)
    limit = limits.get(cells.device.type, DEFAULT_BYTES)
    fitting = max(limit // _image_bytes(attention, cells), 1)
    count = max(math.ceil(batch / fitting), 1)
    bounds = [batch * index // count for index in range(count + 1)]
    return [slice(*ends) for ends in itertools.pairwise(bounds)]


def _image_bytes(attention: Tensor, cells: Tensor) -> int:
    return attention.shape[1] * cells[0].numel() * cells.element_size()


class CellSum:
    """The gradient of a warehouse, summed up over its layers and images.

    A layer's part is the product of its attentions and the cut gradients of its kernels. Alone it
    would be a pass over the whole warehouse for few arithmetic operations, so parts are collected
    and added together, by one product, when there are enough of them.

    Args:
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
    """

    # Of kernel gradients that wait.
    WAITING_BYTES = 48 << 20

    def __init__(self, cells: Tensor) -> None:
        self._cells = cells
        self._sum: Tensor | None = None
        self._rows: Tensor | None = None
        self._weights: list[Tensor] = []
        self._waiting = 0

    def place(self, attention: Tensor) -> Tensor | None:
        """Where the gradients of some kernels, cut into cells, can wait.

        Args:
            attention: Tensor[images, mixtures, cells], that the kernels were mixed by.

        Returns:
            Tensor[images, mixtures, cell_out, cell_in, *cell_kernel], to be filled before it is
            added; ``None`` where there are enough for a product of their own.
        """
        cell = self._cells[0]
        count = attention.shape[:2].numel()
        fitting = self.WAITING_BYTES // (cell.numel() * cell.element_size())
        if count > fitting:
            return None
        if self._rows is None:
            self._rows = cell.new_empty(fitting, *cell.shape)
        if self._waiting + count > fitting:
            self._flush()
        rows = self._rows[self._waiting : self._waiting + count]
        return rows.unflatten(0, attention.shape[:2])

    def add(self, attention: Tensor, rows: Tensor, waits: bool) -> None:
        """Adds the part of some images of a layer.

        Args:
            attention: Tensor[images, mixtures, cells].
            rows: Tensor[images, mixtures, cell_out, cell_in, *cell_kernel].
            waits: Whether ``rows`` are in the place last given.
        """
        weights = attention.flatten(0, 1)
        if waits:
            self._weights.append(weights)
            self._waiting += len(weights)
        else:
            self._add_product(weights, rows.flatten(0, 1))

    def total(self) -> Tensor:
        """The sum of everything added, shaped like the cells."""
        self._flush()
        return self._sum

    def _flush(self) -> None:
        if self._waiting:
            self._add_product(torch.cat(self._weights), self._rows[: self._waiting])
            self._weights, self._waiting = [], 0

    def _add_product(self, weights: Tensor, rows: Tensor) -> None:
        begin = self._sum is None
        if begin:
            self._sum = torch.empty_like(self._cells, memory_format=torch.contiguous_format)
        if native.computes(self._cells):
            torch.ops.mmkw.add_to_cells(weights, rows, self._sum, begin)
        elif begin:
            torch.mm(weights.t(), rows.flatten(1), out=self._sum.flatten(1))
        else:
            self._sum.flatten(1).addmm_(weights.t(), rows.flatten(1))

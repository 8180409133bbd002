"""Assembles kernels from kernel cells, and takes them apart (paper, section 3.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native


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
    cell_out, cell_in, *cell_kernel = cells.shape[1:]
    *spatial, out_blocks, in_blocks = grid
    dims = len(spatial)

    kernels = attention.flatten(0, 1) @ cells.flatten(1)
    kernels = kernels.view(-1, *spatial, out_blocks, in_blocks, cell_out, cell_in, *cell_kernel)
    # (batch, spatial, out, in, cell_out, cell_in, cell_kernel)
    # -> (batch, out, cell_out, in, cell_in, spatial_1, cell_kernel_1, spatial_2, ...)
    out = dims + 1
    order = [0, out, out + 2, out + 1, out + 3]
    for dim in range(dims):
        order += [1 + dim, out + 4 + dim]
    return kernels.permute(order).reshape(attention.shape[0], *kernel_shape(cells, grid))


def kernel_shape(cells: Tensor, grid: Sequence[int]) -> tuple[int, ...]:
    """The shape of an image's kernel.

    Args:
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: As in :func:`mix_cells`.

    Returns:
        ``(out, in, *kernel_size)``.
    """
    *spatial, out_blocks, in_blocks = grid
    cell_out, cell_in, *cell_kernel = cells.shape[1:]
    size = (blocks * side for blocks, side in zip(spatial, cell_kernel))
    return (out_blocks * cell_out, in_blocks * cell_in, *size)


# What torch.compile takes for the compiled kernels; without the newer name its graph breaks there.
if native.built and hasattr(torch.library, 'register_fake'):

    @torch.library.register_fake('mmkw::mix_cells')
    def _(attention: Tensor, cells: Tensor, grid: Sequence[int]) -> Tensor:
        return cells.new_empty(attention.shape[0], *kernel_shape(cells, grid))


def mix_backward(
    grad_kernels: Sequence[Tensor],
    attention: Tensor,
    cells: Tensor,
    grid: Sequence[int],
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Goes back through :func:`mix_cells`, but for the gradient of the cells.

    That is the product of the transposed attentions and ``rows``; see :class:`CellSum`.

    Args:
        grad_kernels: For every image the gradient of its kernel.
        attention: Tensor[batch, mixtures, cells].
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: As in :func:`mix_cells`.
        rows: Tensor[batch * mixtures, cell_out, cell_in, *cell_kernel], to be filled with the
            gradients, cut into cells.

    Returns:
        The kernels, mixed again, and the gradient of ``attention``.
    """
    if native.serves(attention, cells, grid):
        return torch.ops.mmkw.mix_backward(grad_kernels, attention, cells, grid, rows)
    cut_kernels(grad_kernels, grid, rows)
    grad_attention = (rows.flatten(1) @ cells.flatten(1).t()).view(attention.shape)
    return mix_cells(attention, cells, grid), grad_attention


def cut_kernels(kernels: Sequence[Tensor], grid: Sequence[int], rows: Tensor) -> None:
    """Cuts the kernels of some images into rows, one for every mixture: undoes the assembly.

    Args:
        kernels: For every image a Tensor[out, in, *kernel_size].
        grid: As in :func:`mix_cells`.
        rows: Tensor[images * mixtures, cell_out, cell_in, *cell_kernel], to be filled.
    """
    *spatial, out_blocks, in_blocks = grid
    cell_out, cell_in, *cell_kernel = rows.shape[1:]
    dims = len(spatial)
    shape = [out_blocks, cell_out, in_blocks, cell_in]
    for blocks, size in zip(spatial, cell_kernel):
        shape += [blocks, size]
    order = [*range(4, 4 + 2 * dims, 2), 0, 2, 1, 3, *range(5, 5 + 2 * dims, 2)]
    for kernel, mixtures in zip(kernels, rows.unflatten(0, (len(kernels), -1))):
        cut = kernel.reshape(shape).permute(order)
        mixtures.view(cut.shape).copy_(cut)


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

    def add(self, attention: Tensor) -> Tensor:
        """Adds the part of some images of a layer.

        Args:
            attention: Tensor[images, mixtures, cells].

        Returns:
            Where to put the gradients of their kernels, cut into cells, before more is added:
            Tensor[images * mixtures, cell_out, cell_in, *cell_kernel].
        """
        weights = attention.flatten(0, 1)
        if self._rows is None or self._waiting + len(weights) > len(self._rows):
            self._flush()
            if self._rows is None or len(weights) > len(self._rows):
                cell = self._cells[0]
                fitting = self.WAITING_BYTES // (cell.numel() * cell.element_size())
                self._rows = cell.new_empty(max(fitting, len(weights)), *cell.shape)
        self._weights.append(weights)
        first, self._waiting = self._waiting, self._waiting + len(weights)
        return self._rows[first : self._waiting]

    def total(self) -> Tensor:
        """The sum of everything added, shaped like the cells."""
        self._flush()
        return self._sum

    def _flush(self) -> None:
        if not self._waiting:
            return
        weights = torch.cat(self._weights).t()
        rows = self._rows[: self._waiting].flatten(1)
        if self._sum is None:
            self._sum = torch.empty_like(self._cells, memory_format=torch.contiguous_format)
            torch.mm(weights, rows, out=self._sum.flatten(1))
        else:
            self._sum.flatten(1).addmm_(weights, rows)
        self._weights, self._waiting = [], 0

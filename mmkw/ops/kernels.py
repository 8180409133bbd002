"""Defines how kernels are mixed from cells, and how they are cut (paper, section 3.1)."""

import math
from collections.abc import Iterable, Sequence

from torch import Tensor


def mix_cells(attention: Tensor, cells: Tensor, grid: Sequence[int]) -> Tensor:
    """Mixes the cells of a warehouse into one kernel per image.

    Every mixture is ``w_i = sum_j attention_ij cells_j``. The mixtures are ordered
    ``(spatial..., out block, in block)``.

    Args:
        attention: Tensor[batch, mixtures, cells], any real values.
        cells: ``Tensor[cells, cell_out, cell_in, *cell_kernel]``.
        grid: How many cells the kernel has along ``(*spatial, out, in)``; their product is
            ``mixtures``.

    Returns:
        ``Tensor[batch, out * cell_out, in * cell_in, *(spatial * cell_kernel)]``.
    """
    rows = attention.flatten(0, 1) @ cells.flatten(1)
    return assemble(rows.view(-1, math.prod(grid), *cells.shape[1:]), grid)


def assemble(rows: Tensor, grid: Sequence[int]) -> Tensor:
    """Assembles the mixtures of some images into kernels.

    Args:
        rows: Tensor[batch, mixtures, cell_out, cell_in, *cell_kernel].
        grid: As in :func:`mix_cells`.

    Returns:
        Tensor[batch, out, in, *kernel_size], of the same memory where strides can describe it.
    """
    dims = len(grid) - 2
    cells = rows.unflatten(1, tuple(grid))
    # (batch, spatial, out, in, cell_out, cell_in, cell_kernel)
    # -> (batch, out, cell_out, in, cell_in, spatial_1, cell_kernel_1, spatial_2, ...)
    out = dims + 1
    order = [0, out, out + 2, out + 1, out + 3]
    for dim in range(dims):
        order += [1 + dim, out + 4 + dim]
    return cells.permute(order).reshape(rows.shape[0], *assembled_shape(rows.shape[2:], grid))


def cut(kernels: Tensor, grid: Sequence[int], cell_shape: Sequence[int]) -> Tensor:
    """Cuts kernels into pieces of the size of a cell. This undoes :func:`assemble`.

    Args:
        kernels: Tensor[batch, out, in, *kernel_size].
        grid: As in :func:`mix_cells`.
        cell_shape: ``(cell_out, cell_in, *cell_kernel)``.

    Returns:
        Tensor[batch, *spatial, out block, in block, cell_out, cell_in, *cell_kernel], one piece per
        mixture.
    """
    *spatial, out_blocks, in_blocks = grid
    cell_out, cell_in, *cell_kernel = cell_shape
    dims = len(spatial)
    shape = [kernels.shape[0], out_blocks, cell_out, in_blocks, cell_in]
    for blocks, size in zip(spatial, cell_kernel):
        shape += [blocks, size]
    order = [0, *range(5, 5 + 2 * dims, 2), 1, 3, 2, 4, *range(6, 6 + 2 * dims, 2)]
    return kernels.reshape(shape).permute(order)


def cut_kernels(
    kernels: Iterable[Tensor | Sequence[Tensor]], grid: Sequence[int], rows: Tensor
) -> None:
    """Cuts the kernels of some images into rows, one for every mixture.

    Args:
        kernels: Part by part, the images' kernels: Tensor[images, out, in, *kernel_size], or for
            every image a Tensor[out, in, *kernel_size].
        grid: As in :func:`mix_cells`.
        rows: Tensor[images, mixtures, cell_out, cell_in, *cell_kernel] for the result.
    """
    begin = 0
    for part in kernels:
        for some in [part] if isinstance(part, Tensor) else (one.unsqueeze(0) for one in part):
            pieces = cut(some, grid, rows.shape[2:])
            rows[begin : begin + len(some)].view(pieces.shape).copy_(pieces)
            begin += len(some)


def assembled_shape(cell_shape: Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
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


def is_regular(cells: Tensor, grid: Sequence[int]) -> bool:
    """Whether a cell covers one place of the layer's kernel in space, or all places.

    Our kernels mix such cells only. Plans make no others.
    """
    return 1 in (math.prod(grid[:-2]), cells.shape[3:].numel())


def flops_of_mixing(attention_shape: Sequence[int], cells_shape: Sequence[int]) -> int:
    """Floating-point operations of :func:`mix_cells`: a product of two matrices.

    Args:
        attention_shape: ``(batch, mixtures, cells)``.
        cells_shape: ``(cells, cell_out, cell_in, *cell_kernel)``.
    """
    return 2 * math.prod(attention_shape[:2]) * math.prod(cells_shape)

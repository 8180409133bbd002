"""Assembles kernels from kernel cells (paper, section 3.1)."""

from collections.abc import Sequence

from torch import Tensor


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
    return kernels.permute(order).reshape(
        attention.shape[0],
        out_blocks * cell_out,
        in_blocks * cell_in,
        *(blocks * size for blocks, size in zip(spatial, cell_kernel)),
    )

"""Mixing on a GPU: a product of matrices that reads or writes kernels where they lie.

Kernels are mixed, assembled and cast in one pass. Going back, one pass cuts the gradients of
kernels into rows and multiplies them by the cells.

Products of float32 are computed in TF32. Its rounding is that of float16, its range that of
float32, and reading the cells limits the speed.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that keep a GPU busy: two for each of an H100's multiprocessors.
_PROGRAMS = 264
_LEAST = 16
# Numbers whose values must not lead to another compilation.
_VARYING = ['rows', 'num_cells', 'mixtures', 'out_blocks', 'in_blocks']


@triton.jit
def _dot(a, b):
    """Multiplies matrices, one of which may be of a lower precision."""
    if b.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b, input_precision='tf32')
    return tl.dot(a.to(b.dtype), b)


@triton.jit
def _place_of_row(
    row, mixtures, out_blocks, in_blocks, image_stride, out_block, in_block, place_stride
):
    """Where a mixture begins in the kernels. Mixtures are ordered (place, out block, in block)."""
    mixture = row % mixtures
    return (
        (row // mixtures).to(tl.int64) * image_stride
        + mixture // (out_blocks * in_blocks) * place_stride
        + mixture // in_blocks % out_blocks * out_block
        + mixture % in_blocks * in_block
    )


@triton.jit
def _place_of_column(
    column, out_stride, in_stride, place_stride, CELL_IN: tl.constexpr, INSIDE: tl.constexpr
):
    """Where a value of a cell lies, from the cell's begin."""
    return (
        column // (CELL_IN * INSIDE) * out_stride
        + column // INSIDE % CELL_IN * in_stride
        + column % INSIDE * place_stride
    )


@triton.jit(do_not_specialize=_VARYING)
def _mix_kernel(
    attention,
    cells,
    kernels,
    row_stride,
    rows,
    num_cells,
    size,
    mixtures,
    out_blocks,
    in_blocks,
    image_stride,
    out_stride,
    in_stride,
    place_stride,
    out_block,
    in_block,
    CELL_IN: tl.constexpr,
    INSIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Mixes: attention cells, every value at its place in the kernels."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, num_cells, DEPTH):
        cell = begin + tl.arange(0, DEPTH)
        a = tl.load(
            attention + row[:, None] * row_stride + cell[None, :],
            mask=(row < rows)[:, None] & (cell < num_cells)[None, :],
            other=0.0,
        )
        b = tl.load(
            cells + cell[:, None].to(tl.int64) * size + column[None, :],
            mask=(cell < num_cells)[:, None] & (column < size)[None, :],
            other=0.0,
        )
        total += _dot(a, b)
    begins = _place_of_row(
        row, mixtures, out_blocks, in_blocks, image_stride, out_block, in_block, place_stride
    )
    places = _place_of_column(column, out_stride, in_stride, place_stride, CELL_IN, INSIDE)
    tl.store(
        kernels + begins[:, None] + places[None, :],
        total,
        mask=(row < rows)[:, None] & (column < size)[None, :],
    )


@triton.jit(do_not_specialize=_VARYING)
def _unmix_kernel(
    gradients,
    cells,
    cut,
    partial,
    rows,
    num_cells,
    size,
    columns_each,
    mixtures,
    out_blocks,
    in_blocks,
    image_stride,
    out_stride,
    in_stride,
    place_stride,
    out_block,
    in_block,
    CELL_IN: tl.constexpr,
    INSIDE: tl.constexpr,
    CUTS: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Partial = gradients cells^T over some columns; cut = gradients, one row for a mixture."""
    part = tl.program_id(0)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    begins = _place_of_row(
        row, mixtures, out_blocks, in_blocks, image_stride, out_block, in_block, place_stride
    )
    total = tl.zeros((ROWS, CELLS), tl.float32)
    for step in range(0, columns_each, DEPTH):
        column = part * columns_each + step + tl.arange(0, DEPTH)
        places = _place_of_column(column, out_stride, in_stride, place_stride, CELL_IN, INSIDE)
        there = (row < rows)[:, None] & (column < size)[None, :]
        g = tl.load(gradients + begins[:, None] + places[None, :], mask=there, other=0.0)
        b = tl.load(
            cells + cell[None, :].to(tl.int64) * size + column[:, None],
            mask=(cell < num_cells)[None, :] & (column < size)[:, None],
            other=0.0,
        )
        total += _dot(g, b)
        if CUTS:
            if tl.program_id(1) == 0:
                to = cut + row[:, None].to(tl.int64) * size + column[None, :]
                tl.store(to, g, mask=there)
    tl.store(
        partial + (part * rows + row[:, None]) * num_cells + cell[None, :],
        total,
        mask=(row < rows)[:, None] & (cell < num_cells)[None, :],
    )


@triton.jit(do_not_specialize=['row_stride', 'count', 'num_cells'])
def _add_kernel(
    weights,
    rows,
    total,
    row_stride,
    count,
    num_cells,
    size,
    BEGIN: tl.constexpr,
    CELLS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Total += weights^T rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    there = (cell < num_cells)[:, None] & (column < size)[None, :]
    place = total + cell[:, None].to(tl.int64) * size + column[None, :]
    added = tl.zeros((CELLS, COLUMNS), tl.float32)
    for begin in range(0, count, DEPTH):
        row = begin + tl.arange(0, DEPTH)
        w = tl.load(
            weights + row[None, :] * row_stride + cell[:, None],
            mask=(row < count)[None, :] & (cell < num_cells)[:, None],
            other=0.0,
        )
        r = tl.load(
            rows + row[:, None].to(tl.int64) * size + column[None, :],
            mask=(row < count)[:, None] & (column < size)[None, :],
            other=0.0,
        )
        added += _dot(w, r.to(tl.float32))
    if not BEGIN:
        added += tl.load(place, mask=there, other=0.0)
    tl.store(place, added, mask=there)


def mix(attention: Tensor, cells: Tensor, grid: Sequence[int], kernels: Tensor) -> None:
    """Mixes kernels.

    Args:
        attention: Tensor[images, mixtures, cells]; the last dimension is contiguous.
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel], contiguous.
        grid: Cells of the kernel along ``(*spatial, out, in)``.
        kernels: ``Tensor[images, out, in, *kernel_size]`` for the result, of any strides in which
            the places of a kernel are evenly spaced.
    """
    weights = attention.flatten(0, 1)
    rows, num_cells = weights.shape
    size = cells[0].numel()
    tile = _tile(rows)
    _mix_kernel[(triton.cdiv(size, 128), triton.cdiv(rows, tile))](
        weights,
        cells,
        kernels,
        weights.stride(0),
        rows,
        num_cells,
        size,
        *_geometry(attention.shape[1], cells, grid, kernels),
        tile,
        128,
        32,
    )


def unmix(
    gradients: Tensor, cells: Tensor, grid: Sequence[int], mixtures: int, cut: Tensor | None
) -> Tensor:
    """Computes the gradient of the attentions from the gradients of kernels.

    Args:
        gradients: ``Tensor[images, out, in, *kernel_size]``, of strides as in :func:`mix`.
        cells: As in :func:`mix`.
        grid: As in :func:`mix`.
        mixtures: Mixtures of an image.
        cut: Tensor[images, mixtures, cell_out, cell_in, *cell_kernel] for the gradients cut into
            cells, contiguous; None if they are not needed.

    Returns:
        Tensor[images, mixtures, cells] in float32.
    """
    num_cells, size = len(cells), cells[0].numel()
    rows = len(gradients) * mixtures
    tile, width, depth = _tile(rows), 64, 64
    blocks = triton.cdiv(num_cells, width) * triton.cdiv(rows, tile)
    steps = triton.cdiv(size, depth)
    each = triton.cdiv(steps, min(steps, max(_PROGRAMS // blocks, 1)))
    parts = triton.cdiv(steps, each)
    partial = cells.new_empty(parts, rows, num_cells, dtype=torch.float32)
    _unmix_kernel[(parts, triton.cdiv(num_cells, width), triton.cdiv(rows, tile))](
        gradients,
        cells,
        cut,
        partial,
        rows,
        num_cells,
        size,
        each * depth,
        *_geometry(mixtures, cells, grid, gradients),
        cut is not None,
        tile,
        width,
        depth,
    )
    total = partial.sum(0) if parts > 1 else partial[0]
    return total.view(len(gradients), mixtures, num_cells)


def add_to_cells(weights: Tensor, rows: Tensor, total: Tensor, begin: bool) -> None:
    """Adds to the gradient of the cells; see :meth:`mmkw.ops.mixing.Mixing.add_to_cells`."""
    (count, num_cells), size = weights.shape, rows[0].numel()
    width, columns = 64, 128
    _add_kernel[(triton.cdiv(size, columns), triton.cdiv(num_cells, width))](
        weights,
        rows,
        total,
        weights.stride(0),
        count,
        num_cells,
        size,
        begin,
        width,
        columns,
        32,
    )


def _tile(rows: int) -> int:
    return min(max(triton.next_power_of_2(rows), _LEAST), 128)


def _geometry(
    mixtures: int, cells: Tensor, grid: Sequence[int], kernels: Tensor
) -> tuple[int, ...]:
    """Numbers of blocks, sizes and strides, in the order of the kernels' arguments."""
    *_, out_blocks, in_blocks = grid
    cell_out, cell_in, *cell_kernel = cells.shape[1:]
    image, out, into = kernels.stride()[:3]
    # A place's stride: that of the last dimension, by which the places are numbered.
    place = kernels.stride(-1) if kernels.dim() > 3 else 1
    strides = (image, out, into, place, cell_out * out, cell_in * into)
    return (mixtures, out_blocks, in_blocks, *strides, cell_in, torch.Size(cell_kernel).numel())

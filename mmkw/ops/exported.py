"""The operator in an exported program: PyTorch's operators, for any batch and any size of image.

Nothing here depends on how many images the example has. A program that did would apply the kernel
of the first image to all, or fail.

The kernels of a large layer are never assembled. Their pieces, one for each place in space, are
matrices that multiply the image moved by that place; the results are added. This spares a pass over
the kernels, which are larger than the map of such a layer. Kernels of other layers are assembled,
and a scan over the images convolves one after the other. ``form`` can have all layers multiply.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import modes
from .sample_conv import SampleConv

# From so many input channels on, kernels are larger than the map that they are applied to.
LARGE = 256

# Set while mmkw.deploy exports: 'scan', or 'matmul' where a runtime refuses loops or convolutions
# with computed kernels. A plain variable, since torch.export does not trace others.
form: str | None = None


def is_wanted() -> bool:
    """Whether a program is being exported, by mmkw or by PyTorch itself, or a call is traced."""
    return form is not None or modes.is_surely_exporting() or modes.is_tracing()


def convolve(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    grid: Sequence[int],
    sample_map: SampleConv,
    taps: Tensor | None = None,
) -> Tensor:
    """Mixes and applies the kernels, as ``sample_map(x, mix_cells(attention, cells, grid))``.

    The kernels are applied in the precision of ``x``.

    Args:
        x: Tensor[batch, channels, *size].
        attention: Tensor[batch, mixtures, cells].
        cells: ``Tensor[cells, cell_out, cell_in, *cell_kernel]``, where either the cell or the grid
            has a size of one in space.
        grid: Cells of the kernel along ``(*spatial, out, in)``.
        sample_map: The convolution.
        taps: As in :func:`~mmkw.ops.apply_mixed`.

    Returns:
        Tensor[batch, out_channels, *output_size], without a bias.
    """
    kernel_size = tuple(map(math.prod, zip(grid[:-2], cells.shape[3:])))
    large = sample_map.groups == 1 and grid[-1] * cells.shape[2] >= LARGE
    if large and taps is None and 2 * cells.shape[2] >= LARGE and cells.shape[3:].numel() == 1:
        return _multiplied(x, _blocks(attention, cells, grid, x.dtype), kernel_size, sample_map)
    kernels = _kernels(attention, cells, grid, x.dtype)
    if taps is not None:
        kernels = kernels * taps.flatten(1)[:, None, None].to(x.dtype)
    # A trace has no loops.
    if large or math.prod(kernel_size) == 1 or form == 'matmul' or modes.is_tracing():
        return _multiplied(x, kernels.movedim(3, 1), kernel_size, sample_map)
    return _scanned(x, kernels.unflatten(3, kernel_size), sample_map)


def _blocks(attention: Tensor, cells: Tensor, grid: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The mixtures as they are: Tensor[batch, places * in blocks, out, cell_in]."""
    *spatial, out_blocks, in_blocks = grid
    # Attentions are moved, which are small. The order of the mixtures follows.
    order = (math.prod(spatial), out_blocks, in_blocks)
    attention = attention.unflatten(1, order).transpose(2, 3)
    attention = attention.reshape(-1, math.prod(order), attention.shape[4])
    rows = (attention @ cells.flatten(1)).to(dtype)
    cell_out, cell_in = cells.shape[1:3]
    return rows.reshape(-1, order[0] * in_blocks, out_blocks * cell_out, cell_in)


def _kernels(attention: Tensor, cells: Tensor, grid: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The kernels, assembled: Tensor[batch, out, in, places]."""
    *spatial, out_blocks, in_blocks = grid
    cell_out, cell_in, *cell_kernel = cells.shape[1:]
    places, inside = math.prod(spatial), math.prod(cell_kernel)
    rows = (attention @ cells.flatten(1)).to(dtype)
    blocks = rows.reshape(-1, places, out_blocks, in_blocks, cell_out, cell_in * inside)
    # Runtimes are slow at general permutations, so here whole rows move, and then one axis. They
    # copy even where nothing moves.
    blocks = blocks.transpose(3, 4) if in_blocks > 1 else blocks
    kernels = blocks.reshape(-1, places, out_blocks * cell_out, in_blocks * cell_in, inside)
    return kernels.squeeze(1) if inside > 1 else kernels.squeeze(4).movedim(1, 3)


def _multiplied(
    x: Tensor, matrices: Tensor, kernel_size: Sequence[int], sample_map: SampleConv
) -> Tensor:
    """Adds the products of the matrix of each place and the image moved by that place.

    Args:
        x: Tensor[batch, in_channels, *size].
        matrices: Tensor[batch, places, out_channels, in_channels / groups], or the input channels
            in blocks: Tensor[batch, places * blocks, out_channels, in_channels / blocks].
        kernel_size: Sizes whose product is ``places``.
        sample_map: The convolution.
    """
    moved, size = _moved(x, kernel_size, sample_map)
    groups, terms, channels = sample_map.groups, matrices.shape[1], matrices.shape[3]
    # (batch, places * blocks, groups, channels, pixels)
    moved = moved.reshape(-1, terms, groups, channels, math.prod(size))
    out_channels = matrices.shape[2]
    matrices = matrices.reshape(-1, terms, groups, out_channels // groups, channels)
    y = matrices * moved if matrices.shape[3:] == (1, 1) else matrices @ moved
    y = y if terms == 1 else y.sum(1)
    return y.reshape(-1, out_channels, *size)


def _moved(
    x: Tensor, kernel_size: Sequence[int], sample_map: SampleConv
) -> tuple[Tensor, Sequence[int]]:
    """The image as each place of the kernel sees it: Tensor[batch, places, channels, *size]."""
    # Of one pad, although some of its pixels are cut off again: runtimes are slow at small pads.
    sides = [side for side in reversed(sample_map.padding) for _ in range(2)]
    views, size = (F.pad(x, sides) if any(sides) else x).unsqueeze(1), []
    settings = zip(kernel_size, sample_map.stride, sample_map.padding, sample_map.dilation)
    # Columns before rows: what is left of rows then lies in long runs.
    for dim, (side, stride, padding, dilation) in reversed(list(enumerate(settings, 2))):
        reach, length = dilation * (side - 1), x.shape[dim]
        if 2 * padding != reach:
            length = length + 2 * padding - reach
        before = [slice(None)] * (dim + 1)
        if side > 1:
            # The ends are sums, from which PyTorch sees that they hold for any size.
            cuts = [slice(at, at + length, stride) for at in range(0, reach + 1, dilation)]
            views = torch.cat([views[tuple([*before, cut])] for cut in cuts], 1)
        elif stride > 1:
            # Copied: of a view with gaps a later reshape would ask whether the size is even.
            views = views[tuple([*before, slice(None, None, stride)])]
            views = views.clone(memory_format=torch.contiguous_format)
        size.append(views.shape[dim + 1] if stride > 1 else length)
    return views, size[::-1]


def _scanned(x: Tensor, kernels: Tensor, sample_map: SampleConv) -> Tensor:
    """Convolves image by image."""

    # torch 2.6 does not trace generic types in annotations.
    def convolved(state: Tensor, operands: tuple) -> tuple:
        return state.clone(), sample_map.one(*operands)

    # A scan needs a state, which is not used. Every image is a batch of one: within a loop
    # runtimes copy what changes its shape.
    return modes.scan(convolved, x.new_zeros(1), (x.unsqueeze(1), kernels))[1].squeeze(1)

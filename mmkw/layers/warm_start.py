"""Starts a network where a static one stands: its kernels laid into the warehouses.

At tau = 1 the one-to-one start (paper, section 3.4) makes every mixture one cell, so the cells can
be the static kernels, cut. At tau = 0 the attention can be started at the same mixture.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops.kernels import cut_kernels
from .attention import Attention
from .partition import LayerShare, WarehousePartition

# Of the random numbers for spare cells; every process of a training must draw the same.
_SEED = 20240607


def check_start_tau(tau: float) -> float:
    """Returns ``tau``, or raises ValueError unless it is 0 or 1."""
    if isinstance(tau, bool) or tau not in (0, 1):
        raise ValueError(
            f"start_tau must be 0 (no annealing) or 1 (the paper's, with mmkw.TemperatureHook), "
            f'got {tau!r}.'
        )
    return float(tau)


def warm_start(
    partition: WarehousePartition,
    kernels: Mapping[str, Tensor],
    attentions: Mapping[str, Attention],
    cells: Tensor,
    tau: float,
) -> tuple[Tensor, float]:
    """Finds cells, and starts attentions, that give layers the kernels of static ones.

    With a budget ``b`` of at least 1 every piece of a kernel has a cell of its own, and the start
    is exact. At tau = 1 that cell is the piece, and the attentions stay at their random start, to
    take over as tau falls. At tau = 0 the attention starts with this cell at almost one, and what
    it lacks is made up for in the cell. The other cells of a mixture are random, of the layer's
    magnitude: they have no weight yet, but a cell of zeros would neither get nor give a gradient.

    With ``b < 1`` there are fewer cells than pieces. At tau = 0 the cells are the subspace that
    holds most of the pieces (the singular vectors; every layer counts alike, whatever its scale,
    since a norm mostly follows), and the attentions the coordinates. At tau = 1 the one-to-one
    start leaves the pieces out that it gives the zero cell.

    Args:
        partition: The warehouse.
        kernels: Static kernels, Tensor[out, in, *kernel_size], by layer. Cells of layers that are
            not among them stay.
        attentions: The attentions of the same layers; at tau = 0 they are changed.
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel], the warehouse as it is.
        tau: 0 or 1.

    Returns:
        The new cells, and how far the mixed kernels are from the static ones: the root mean square
        over the layers of the relative error. 0 if the start is exact.
    """
    shares = [share for share in partition.layers if share.kernel.layer in kernels]
    pieces = {
        share.kernel.layer: _pieces(kernels[share.kernel.layer], share, cells) for share in shares
    }
    if partition.options.cell_num_ratio < 1 and tau == 0:
        return _nearest(pieces, attentions, cells)
    new, errors = cells.detach().double().cpu(), []
    generator = torch.Generator().manual_seed(_SEED)
    for share in shares:
        name = share.kernel.layer
        piece, attention = pieces[name], attentions[name]
        magnitude = piece.square().mean().sqrt()
        own = new[share.start : share.start + share.own_cells]
        if magnitude > 0:
            own.copy_(magnitude * torch.randn(own.shape, generator=generator, dtype=own.dtype))
        held = [(i, cell) for i, cell in enumerate(share.assigned) if cell is not None]
        mixtures, assigned = (list(numbers) for numbers in zip(*held)) if held else ([], [])
        reach = attention.reach if tau == 0 else 1.0
        new[assigned] = piece[mixtures] / reach
        if tau == 0:
            alpha = torch.zeros(share.num_mixtures, len(new), dtype=new.dtype)
            alpha[mixtures, assigned] = reach
            attention.start_at(alpha)
        lost = piece.square().sum() - piece[mixtures].square().sum()
        errors.append(_ratio(lost, piece))
    return new.to(cells), _root_mean(errors)


def _pieces(kernel: Tensor, share: LayerShare, cells: Tensor) -> Tensor:
    """Tensor[mixtures, cell_out, cell_in, *cell_kernel], in double precision."""
    kernel = kernel.detach().double().cpu().reshape(share.kernel.shape)
    rows = kernel.new_empty(1, share.num_mixtures, *cells.shape[1:])
    cut_kernels([kernel], share.grid, rows)
    return rows[0]


def _nearest(
    pieces: Mapping[str, Tensor], attentions: Mapping[str, Attention], cells: Tensor
) -> tuple[Tensor, float]:
    """The best cells and constant attentions by the truncated singular value decomposition."""
    scales = {name: piece.norm().clamp_min(1e-30) for name, piece in pieces.items()}
    rows = torch.cat([(piece / scales[name]).flatten(1) for name, piece in pieces.items()])
    # Its left singular vectors, from the Gram matrix: rows are few and long.
    _, vectors = torch.linalg.eigh(rows @ rows.t())
    basis = vectors.flip(1)[:, : len(cells)]
    new = basis.t() @ rows
    # Attentions of a mixture add up to at most 1: the cells take the rest of the scale.
    reach = min(attention.reach for attention in attentions.values())
    alphas = dict(zip(pieces, basis.split([len(piece) for piece in pieces.values()])))
    alphas = {name: alpha * scales[name] for name, alpha in alphas.items()}
    scale = max(alpha.abs().sum(1).max() for alpha in alphas.values()) / reach
    errors = []
    for name, alpha in alphas.items():
        lost = (alpha @ new - pieces[name].flatten(1)).square().sum()
        errors.append(_ratio(lost, pieces[name]))
        padded = alpha.new_zeros(len(alpha), len(cells))
        padded[:, : alpha.shape[1]] = alpha / scale
        attentions[name].start_at(padded)
    result = cells.detach().double().cpu().flatten(1)
    result[: len(new)] = new * scale
    return result.view(cells.shape).to(cells), _root_mean(errors)


def _ratio(lost: Tensor, piece: Tensor) -> float:
    return float(lost.clamp_min(0) / piece.square().sum().clamp_min(1e-60))


def _root_mean(squares: list[float]) -> float:
    return (sum(squares) / len(squares)) ** 0.5

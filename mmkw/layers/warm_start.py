"""The warm start: puts the kernels of a static network into the warehouses.

At tau = 1 the one-to-one start (paper, section 3.4) makes every mixture equal to one cell. So the
cells can be the pieces of the static kernels. At tau = 0 the attentions can start at the same
mixtures.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.kernels import cut_kernels
from .attention import Attention
from .partition import LayerShare, WarehousePartition

# The seed of the random spare cells. All processes of a training need the same cells.
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
    attentions: Mapping[str, Any],
    cells: Tensor,
    tau: float,
) -> tuple[Tensor, float]:
    """Finds cells and starts attentions so that dynamic layers have the kernels of static layers.

    With a budget ``b`` of at least 1, every piece of a kernel has its own cell, and the start is
    exact. At tau = 1 this cell is the piece. The attentions keep their random start and take over
    as tau falls. At tau = 0 the attention of this cell starts slightly below 1. The cell is the
    piece divided by this attention. The spare cells have no weight yet. They are random, with the
    layer's magnitude: a cell of zeros would neither get nor give a gradient.

    With ``b < 1`` there are fewer cells than pieces. At tau = 0 the cells are the singular vectors
    that hold most of the pieces, and the attentions are the coordinates. Every layer counts the
    same whatever its scale, because a norm mostly follows. At tau = 1 the pieces are lost whose
    mixture is assigned the zero cell.

    A comparator starts with the same attention for all its kernels, at any temperature. So their
    mean is the static kernel, times the attention's ``gain``, and they differ by random parts that
    add up to zero. Equal kernels would get equal gradients, and give none to the attention: they
    would stay equal for ever.

    Args:
        partition: The warehouse.
        kernels: Static kernels, ``Tensor[out, in, *kernel_size]``, by layer. The cells of other
            layers do not change. With ``b < 1`` at tau = 0 they may change, too.
        attentions: The :class:`~mmkw.layers.Attention` or other attention of the same layers. They
            change at tau = 0 only, those of comparators when they ``begin``.
        cells: ``Tensor[cells, cell_out, cell_in, *cell_kernel]``, the current cells.
        tau: 0 or 1.

    Returns:
        The new cells, and the root mean square, over the layers, of the relative error of the mixed
        kernels. It is 0 if the start is exact.

    Raises:
        RuntimeError: If the cells are on the meta device.
    """
    if cells.is_meta:
        raise RuntimeError(
            f'Warehouse {partition.name!r} is on the meta device, where static kernels cannot '
            "start it. Give the network memory first: network.to_empty(device='cpu')."
        )
    shares = [share for share in partition.layers if share.kernel.layer in kernels]
    pieces = {
        share.kernel.layer: _pieces(kernels[share.kernel.layer], share, cells) for share in shares
    }
    if partition.options.cell_num_ratio < 1 and tau == 0:
        return _nearest(pieces, attentions, cells)
    new, errors = cells.detach().double().cpu(), []
    for share in shares:
        name = share.kernel.layer
        piece, attention = pieces[name], attentions[name]
        magnitude = piece.square().mean().sqrt()
        # The same in all processes, another for every kernel: many layers have one shape.
        some = bytes(piece.flatten()[:256].view(torch.uint8).tolist())
        generator = torch.Generator().manual_seed(_SEED + zlib.crc32(some))
        own = new[share.start : share.start + share.own_cells]
        gain = attention.gain
        if magnitude > 0:
            noise = torch.randn(own.shape, generator=generator, dtype=own.dtype, device=own.device)
            own.copy_(magnitude * (gain or 1) * noise)
        if gain is not None:
            own += gain * piece - own.mean(0)
            errors.append(0.0)
            continue
        held = [(i, cell) for i, cell in enumerate(share.assigned) if cell is not None]
        mixtures, assigned = (list(numbers) for numbers in zip(*held)) if held else ([], [])
        reach = attention.reach if tau == 0 else 1.0
        new[assigned] = piece[mixtures] / reach
        if tau == 0:
            alpha = new.new_zeros(share.num_mixtures, len(new))
            alpha[mixtures, assigned] = reach
            attention.start_at(alpha)
        lost = piece.square().sum() - piece[mixtures].square().sum()
        errors.append(_ratio(lost, piece))
    return new.to(cells), _root_mean(errors)


def _pieces(kernel: Tensor, share: LayerShare, cells: Tensor) -> Tensor:
    """Tensor[mixtures, cell_out, cell_in, *cell_kernel], in double precision."""
    kernel = kernel.detach().double().cpu().reshape(share.kernel.shape)
    rows = kernel.new_empty(1, share.num_mixtures, *cells.shape[1:])
    cut_kernels([kernel.unsqueeze(0)], share.grid, rows)
    return rows[0]


def _nearest(
    pieces: Mapping[str, Tensor], attentions: Mapping[str, Attention], cells: Tensor
) -> tuple[Tensor, float]:
    """Finds the best cells and constant attentions by a truncated singular value decomposition."""
    scales = {name: piece.norm().clamp_min(1e-30) for name, piece in pieces.items()}
    rows = torch.cat([(piece / scales[name]).flatten(1) for name, piece in pieces.items()])
    # The left singular vectors come from the Gram matrix, because rows are few and long.
    _, vectors = torch.linalg.eigh(rows @ rows.t())
    basis = vectors.flip(1)[:, : len(cells)]
    new = basis.t() @ rows
    # The attentions of a mixture add up to at most 1, so the cells take the rest of the scale.
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

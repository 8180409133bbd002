"""Cells stored as integers of eight bits, for inference."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops import modes
from .warehouse import CellList, WarehouseManager

# The largest integer; the smallest one, -128, is not used.
LARGEST = 127


class IntegerCells(nn.Module):
    """Computes cells from integers and from the largest magnitude of every cell.

    A parametrisation. Magnitudes are stored, since scales would be too small for float16.
    """

    def forward(self, integers: Tensor, magnitudes: Tensor) -> Tensor:
        """The cells: ``Tensor[cells, cell_out, cell_in, *cell_kernel]``.

        Args:
            integers: Of eight bits, in the shape of the cells.
            magnitudes: ``Tensor[cells, 1, 1, ...]``.
        """
        return (integers * scales_of(magnitudes)).to(magnitudes.dtype)

    def right_inverse(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """The integers and the magnitudes, which become ``LARGEST``."""
        magnitudes = cells.abs().flatten(1).amax(1).view(-1, *[1] * (cells.dim() - 1))
        # Cells of zeros have any scale.
        scales = scales_of(torch.where(magnitudes == 0, 1, magnitudes))
        return (cells / scales).round().clamp(-LARGEST, LARGEST).to(torch.int8), magnitudes


def scales_of(magnitudes: Tensor) -> Tensor:
    """What integers are multiplied by, in at least float32."""
    return magnitudes.to(torch.promote_types(magnitudes.dtype, torch.float32)) / LARGEST


def integers_of(weights: CellList, index: int) -> tuple[Tensor, Tensor] | None:
    """The integers and the magnitudes that a warehouse is stored as.

    Args:
        weights: The cells of all warehouses.
        index: Of the warehouse.

    Returns:
        As :meth:`IntegerCells.right_inverse` gives them; None if cells are stored as they are.
    """
    # Every layer asks in every pass, so plain cells come first: a look into a dict.
    if weights.plain(index) is not None or not parametrize.is_parametrized(weights, str(index)):
        return None
    stored = weights.parametrizations[str(index)]
    if not isinstance(stored[-1], IntegerCells):
        return None
    return stored.original0, stored.original1


def quantize_cells(network: nn.Module) -> nn.Module:
    """Stores the cells of a network as integers of eight bits, with a scale for every cell.

    A fourth of the memory, and of what mixing reads. Convolutions and what is static keep their
    precision. The compiled CPU kernels mix integers as they are; elsewhere, and where gradients are
    wanted, cells are computed from them whenever they are used.

    Cells then no longer learn; attentions may. The state dict has the integers and the magnitudes
    that give the scales in place of the cells, as buffers. Load weights before, or weights of a
    network that was quantized alike. As of any parametrised module, the state dict is saved, not
    the network.

    Args:
        network: Any module with dynamic layers; changed in place.

    Returns:
        The network.

    Raises:
        ValueError: If the network has no cells, or if they are pruned, parametrised, sharded,
            without values or not finite. The network is then as it was.

    Example:
        >>> layer, x = mmkw.KWConv2d(16, 32, 3, padding=1).eval(), torch.rand(2, 16, 8, 8)
        >>> with torch.no_grad():
        ...     expected, found = layer(x), mmkw.quantize_cells(layer)(x)
        >>> bool((found - expected).norm() < 0.02 * expected.norm())
        True
    """
    modules = network.modules() if isinstance(network, nn.Module) else ()
    lists = [module.weights for module in modules if isinstance(module, WarehouseManager)]
    if not lists:
        raise ValueError(
            'network must be a module with dynamic layers, got a '
            f'{type(network).__name__} without. See mmkw.convert.'
        )
    for weights in lists:
        if not weights.is_plain:
            raise ValueError(
                'network has cells that are pruned, parametrised or quantized already: first make '
                'that permanent, for example by torch.nn.utils.prune.remove.'
            )
        for index, cells in enumerate(weights):
            if modes.is_sharded(cells):
                raise ValueError('network is sharded: quantize it on one process.')
            if cells.is_meta:
                raise ValueError('network is on the meta device: give it values first.')
            if not cells.isfinite().all():
                raise ValueError(f'network has cells that are not finite, in warehouse {index}.')
    for weights in lists:
        for index in range(len(weights)):
            cells = weights[index].detach()
            # As a buffer, which no optimizer finds.
            delattr(weights, str(index))
            weights.register_buffer(str(index), cells)
            parametrize.register_parametrization(weights, str(index), IntegerCells())
    return network

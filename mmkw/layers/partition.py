"""Cuts kernels into kernel cells and counts them (paper, sections 3.1, 3.2); no tensors here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

# Of one tensor, and of one warehouse: thousands of times what the networks of the paper have. More
# is refused before memory is asked for.
MOST_VALUES = 2**30
MOST_CELLS = 2**18


class PlanError(ValueError):
    """A plan that cannot be carried out; names the warehouse, its layers and the numbers."""


def check_size(what: str, values: int, remedy: str) -> None:
    """Refuses what is too large to be made.

    Args:
        what: Its name, for the message.
        values: How many it has.
        remedy: What to do about it.

    Raises:
        PlanError: If there are more than :data:`MOST_VALUES`.
    """
    if values > MOST_VALUES:
        raise PlanError(f'{what} has {values} values, more than {MOST_VALUES}. {remedy}.')


@dataclass(frozen=True)
class WarehouseOptions:
    """How the kernels of one warehouse are cut, budgeted and attended to.

    Args:
        cell_num_ratio: The convolutional parameter budget ``b``: cells in the warehouse per
            mixture of its layers. Above 0; above 1 only the integer part is used by the start.
        cell_inplane_ratio: Input channels of a cell, relative to the greatest common divisor of the
            layers' input channels (per group). In (0, 1].
        cell_outplane_ratio: The same for output channels.
        reduction: Hidden width of the attention relative to the layer's input channels; at least
            16 units are used. Above 0.
        nonlocal_basis_ratio: Below 1, the cells that are not the layer's own are attended to
            through a basis of this relative size (of at least 16). In (0, 1].
        spatial_partition: Cells are 1x1 in space; otherwise they keep the kernel's size.

    Raises:
        PlanError: If a value is out of its range.
    """

    cell_num_ratio: float = 1.0
    cell_inplane_ratio: float = 1.0
    cell_outplane_ratio: float = 1.0
    reduction: float = 1 / 16
    nonlocal_basis_ratio: float = 1.0
    spatial_partition: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == 'spatial_partition':
                valid, expected = isinstance(value, bool), 'True or False'
            else:
                unbounded = field.name in ('cell_num_ratio', 'reduction')
                expected = 'a number above 0' if unbounded else 'a number in (0, 1]'
                valid = isinstance(value, (int, float)) and not isinstance(value, bool)
                valid = valid and value > 0 and (unbounded or value <= 1)
                if valid and not 1 / MOST_VALUES <= value <= MOST_VALUES:
                    valid, expected = False, f'from 1 / {MOST_VALUES} to {MOST_VALUES}'
            if not valid:
                raise PlanError(f'{field.name} must be {expected}, got {value!r}.')


def split_options(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates warehouse options from the other arguments of a layer or network.

    Args:
        arguments: Keyword arguments of both kinds.

    Returns:
        The fields of :class:`WarehouseOptions` among them, and the rest.
    """
    names = {field.name for field in fields(WarehouseOptions)}
    options = {name: value for name, value in arguments.items() if name in names}
    return options, {k: v for k, v in arguments.items() if k not in names}


@dataclass(frozen=True)
class KernelShape:
    """The kernel of one layer: ``(out_channels, in_channels / groups, *kernel_size)``."""

    layer: str
    out_channels: int
    in_channels: int
    kernel_size: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the static layer's weight."""
        return (self.out_channels, self.in_channels, *self.kernel_size)

    def fits(self, weight: Sequence[int]) -> bool:
        """Whether a weight of this shape can be the kernel.

        Args:
            weight: Shape of a static weight; one of size one may be linear or a convolution.
        """
        return len(weight) > 1 and _without_ones(weight) == _without_ones(self.shape)

    def __str__(self) -> str:
        size = 'x'.join(map(str, self.kernel_size))
        return f'{self.layer} ({self.out_channels}, {self.in_channels}, {size})'


def _without_ones(shape: Sequence[int]) -> list[int]:
    """Output and input channels, and the kernel size unless it is one."""
    return [*shape[:2], *(side for side in shape[2:] if side != 1)]


@dataclass(frozen=True)
class LayerShare:
    """What one layer takes from its warehouse.

    Attributes:
        kernel: The layer's kernel.
        grid: Cells of the kernel along ``(*spatial, out, in)``.
        start: The cell at which the layer's own cells begin.
        own_cells: How many cells are the layer's own by the one-to-one start.
        assigned: For every mixture the cell it is at tau = 1; ``None`` is the zero cell.
    """

    kernel: KernelShape
    grid: tuple[int, ...]
    start: int
    own_cells: int
    assigned: tuple[int | None, ...]

    @property
    def num_mixtures(self) -> int:
        """Cells of the assembled kernel."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class WarehousePartition:
    """One warehouse: its cells and what its layers take from it, in order.

    Attributes:
        name: Name in the plan.
        options: The options it was cut by.
        num_cells: Cells in the warehouse, ``n``.
        cell_shape: ``(cell_out, cell_in, *cell_kernel)``.
        layers: The layers' shares in module order.
    """

    name: str
    options: WarehouseOptions
    num_cells: int
    cell_shape: tuple[int, ...]
    layers: tuple[LayerShare, ...]


def partition_warehouse(
    name: str, kernels: Sequence[KernelShape], options: WarehouseOptions
) -> WarehousePartition:
    """Cuts the kernels that share a warehouse into cells and assigns every mixture its first cell.

    Args:
        name: Name of the warehouse, for messages.
        kernels: The layers' kernels in module order; at least one.
        options: The options of the warehouse.

    Returns:
        The warehouse's cells and every layer's share in them.

    Raises:
        PlanError: If the kernels differ in dimension, or in size without spatial partition, if the
            one-to-one start does not use exactly the cells of the budget, or if there would be more
            mixtures or values than can be made.
    """
    layers = ', '.join(map(str, kernels))
    if len({len(kernel.kernel_size) for kernel in kernels}) != 1:
        raise PlanError(
            f'Warehouse {name!r}: kernels of different dimension cannot share cells: {layers}. '
            'Give them warehouses of their own.'
        )
    sizes = {kernel.kernel_size for kernel in kernels}
    if not options.spatial_partition and len(sizes) != 1:
        raise PlanError(
            f'Warehouse {name!r}: without spatial_partition all kernels need one size, got '
            f'{sorted(sizes)}: {layers}. Set spatial_partition=True or split the warehouse.'
        )

    cell_out = _cell_channels([k.out_channels for k in kernels], options.cell_outplane_ratio)
    cell_in = _cell_channels([k.in_channels for k in kernels], options.cell_inplane_ratio)
    for kernel in kernels:
        if kernel.out_channels % cell_out or kernel.in_channels % cell_in:
            raise PlanError(
                f'Warehouse {name!r}: cells of ({cell_out}, {cell_in}) channels do not divide '
                f'{kernel}. Change cell_outplane_ratio={options.cell_outplane_ratio} or '
                f'cell_inplane_ratio={options.cell_inplane_ratio}.'
            )

    grids = []
    for kernel in kernels:
        spatial = (
            kernel.kernel_size if options.spatial_partition else (1,) * len(kernel.kernel_size)
        )
        grids.append((*spatial, kernel.out_channels // cell_out, kernel.in_channels // cell_in))
    mixtures = sum(math.prod(grid) for grid in grids)
    num_cells = max(int(mixtures * options.cell_num_ratio), 1)
    if max(mixtures, num_cells) > MOST_CELLS:
        raise PlanError(
            f'Warehouse {name!r}: {mixtures} mixtures of {num_cells} cells, more than '
            f'{MOST_CELLS}, for {layers}. Lower cell_num_ratio={options.cell_num_ratio}; larger '
            'cells, by the other ratios or spatial_partition=False, are fewer.'
        )
    cell_kernel = (1,) * len(kernels[0].kernel_size)
    if not options.spatial_partition:
        cell_kernel = kernels[0].kernel_size
    cell_shape = (cell_out, cell_in, *cell_kernel)
    check_size(
        f'Warehouse {name!r}, {num_cells} cells of {cell_shape},',
        num_cells * math.prod(cell_shape),
        f'Lower cell_num_ratio={options.cell_num_ratio}',
    )

    shares, start = [], 0
    for kernel, grid in zip(kernels, grids):
        assigned, own = _assign(start, math.prod(grid), options.cell_num_ratio)
        shares.append(LayerShare(kernel, grid, start, own, assigned))
        start += own
    if start != num_cells:
        counts = ', '.join(f'{s.kernel}: {s.num_mixtures}' for s in shares)
        raise PlanError(
            f'Warehouse {name!r}: cell_num_ratio={options.cell_num_ratio} gives {num_cells} cells '
            f'for {mixtures} mixtures, but the one-to-one start walks over {start} ({counts}). '
            'Take an integer or 1/integer budget; below 1, smaller cell_inplane_ratio or '
            'cell_outplane_ratio give more mixtures to divide.'
        )
    return WarehousePartition(name, options, num_cells, cell_shape, tuple(shares))


def _cell_channels(channels: Sequence[int], ratio: float) -> int:
    return max(int(math.gcd(*channels) * ratio), 1)


def _assign(start: int, mixtures: int, ratio: float) -> tuple[tuple[int | None, ...], int]:
    """Cell of every mixture at tau = 1, and how many cells that walks over."""
    if ratio >= 1:
        step = int(ratio)
        return tuple(start + i * step for i in range(mixtures)), mixtures * step
    period = int(1 / ratio)
    assigned, own = [], 0
    for i in range(mixtures):
        if i % period == (i // period) % period:
            assigned.append(start + own)
            own += 1
        else:
            assigned.append(None)
    return tuple(assigned), own

"""Cuts kernels into kernel cells and counts the cells (paper, sections 3.1, 3.2).

This module works with shapes and numbers, not with tensors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

# The most values of one tensor, and the most cells of one warehouse. Both are thousands of times
# larger than in the paper's networks. More is refused before memory is allocated.
MOST_VALUES = 2**30
MOST_CELLS = 2**18


class PlanError(ValueError):
    """A plan that does not fit. The message names the warehouse, its layers and the numbers."""


def check_size(what: str, values: int, remedy: str) -> None:
    """Refuses a tensor that would be too large.

    Args:
        what: The tensor's name, for the message.
        values: How many values the tensor would have.
        remedy: What the user can do, for the message.

    Raises:
        PlanError: If there are more than :data:`MOST_VALUES` values.
    """
    if values > MOST_VALUES:
        raise PlanError(f'{what} has {values} values, more than {MOST_VALUES}. {remedy}.')


def is_number(value: Any) -> bool:
    """Whether a value is a real number, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


KERNELWAREHOUSE = 'kernelwarehouse'


@dataclass(frozen=True)
class Method:
    """A kind of dynamic convolution.

    Attributes:
        title: Its name in texts.
        defaults: The options of :class:`WarehouseOptions` that the method chooses otherwise.
        least: The smallest budget. A comparator's budget is its number of kernels.
        options: The options that a user may choose.
        has_norm: Whether the attention has a norm over its hidden units.
        is_comparator: Whether every layer has a warehouse of its own, of whole kernels.
    """

    title: str
    defaults: Mapping[str, Any]
    least: int = 1
    options: tuple[str, ...] = ('cell_num_ratio', 'reduction')
    has_norm: bool = True
    is_comparator: bool = True


METHODS = {
    KERNELWAREHOUSE: Method(
        'KernelWarehouse',
        {},
        options=(
            'cell_num_ratio',
            'cell_inplane_ratio',
            'cell_outplane_ratio',
            'reduction',
            'nonlocal_basis_ratio',
            'spatial_partition',
        ),
        is_comparator=False,
    ),
    'dyconv': Method(
        'DY-Conv',
        dict(spatial_partition=False, cell_num_ratio=4, reduction=1 / 4),
        least=2,
        has_norm=False,
    ),
    'condconv': Method(
        'CondConv',
        dict(spatial_partition=False, cell_num_ratio=8),
        least=2,
        options=('cell_num_ratio',),
        has_norm=False,
    ),
    'odconv': Method('ODConv', dict(spatial_partition=False, cell_num_ratio=1)),
}


@dataclass(frozen=True)
class WarehouseOptions:
    """The options of one warehouse: the size and the number of its cells, and its attentions.

    :meth:`of` knows what each method takes by default.

    Args:
        cell_num_ratio: The budget ``b`` (the paper's convolutional parameter budget): cells in the
            warehouse per mixture of its layers. Above 0. Take an integer or 1/integer: the
            one-to-one start must use exactly the cells of the budget.
        cell_inplane_ratio: Input channels of a cell, relative to the greatest common divisor of the
            layers' input channels (per group). In (0, 1].
        cell_outplane_ratio: Output channels of a cell, relative to the greatest common divisor of
            the layers' output channels. In (0, 1].
        reduction: Hidden width of the attention, relative to the layer's input channels. Above 0.
            At least 16 units are used.
        nonlocal_basis_ratio: Size of the basis through which a layer attends to the cells of other
            layers, relative to the number of those cells. In (0, 1]; 1 means no basis. A basis has
            at least 16 values.
        spatial_partition: Whether cells have size 1 in space. Otherwise they have the kernel's
            size.
        method: ``kernelwarehouse``, or a comparator: ``dyconv``, ``condconv`` or ``odconv``, the
            layers :class:`~mmkw.DYConv2d`, :class:`~mmkw.CondConv2d` and :class:`~mmkw.ODConv2d`.
            The warehouse of a comparator has the whole kernels of one layer, ``cell_num_ratio`` of
            them, and of the other options takes ``reduction`` alone; ``condconv`` not even that.

    Raises:
        PlanError: If a value is out of its range, or does not apply to the method.
    """

    cell_num_ratio: float = 1.0
    cell_inplane_ratio: float = 1.0
    cell_outplane_ratio: float = 1.0
    reduction: float = 1 / 16
    nonlocal_basis_ratio: float = 1.0
    spatial_partition: bool = True
    method: str = KERNELWAREHOUSE

    @classmethod
    def of(cls, **given: Any) -> 'WarehouseOptions':
        """Makes the options of a method from those that are given.

        Args:
            **given: Fields of this class. Those that are missing or None are the method's own: 4
                kernels and a ``reduction`` of 1/4 of ``dyconv``, 8 kernels of ``condconv``, one of
                ``odconv``.
        """
        given = {name: value for name, value in given.items() if value is not None}
        method = given.get('method')
        own = METHODS[method].defaults if isinstance(method, str) and method in METHODS else {}
        return cls(**{**own, **given})

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise PlanError(f'method must be one of {list(METHODS)}, got {self.method!r}.')
        for field in fields(self):
            if field.name == 'method':
                continue
            value = getattr(self, field.name)
            if field.name == 'spatial_partition':
                valid, expected = isinstance(value, bool), 'True or False'
            else:
                unbounded = field.name in ('cell_num_ratio', 'reduction')
                expected = 'a number above 0' if unbounded else 'a number in (0, 1]'
                valid = is_number(value) and value > 0 and (unbounded or value <= 1)
                if valid and not 1 / MOST_VALUES <= value <= MOST_VALUES:
                    valid, expected = False, f'from 1 / {MOST_VALUES} to {MOST_VALUES}'
            if not valid:
                raise PlanError(f'{field.name} must be {expected}, got {value!r}.')
            if not isinstance(value, bool):
                # NumPy's numbers become Python's, which configs and messages show as they are.
                number = int(value) if isinstance(value, Integral) else float(value)
                object.__setattr__(self, field.name, number)
        if METHODS[self.method].is_comparator:
            self._check_comparator()

    def _check_comparator(self) -> None:
        method = METHODS[self.method]
        kernels = self.cell_num_ratio
        if kernels < method.least or kernels % 1:
            raise PlanError(
                f'cell_num_ratio is the number of kernels of method={self.method!r}, a whole '
                f'number of at least {method.least}, got {kernels!r}. By default it is '
                f'{method.defaults["cell_num_ratio"]}.'
            )
        for field in fields(self):
            value, own = getattr(self, field.name), method.defaults.get(field.name, field.default)
            if field.name not in ('method', *method.options) and value != own:
                raise PlanError(
                    f'{field.name}={value!r} does not apply to method={self.method!r}, which '
                    f'takes {" and ".join(method.options)} alone. Leave it out.'
                )


def is_comparator(method: Any) -> bool:
    """Whether a method is another one than KernelWarehouse. None and unknown ones are not."""
    return isinstance(method, str) and method in METHODS and METHODS[method].is_comparator


def split_options(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates warehouse options from the other arguments of a layer or network.

    Args:
        arguments: Keyword arguments of both kinds.

    Returns:
        The arguments that are fields of :class:`WarehouseOptions`, and the other arguments.
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
            weight: Shape of a static weight. A kernel of size one may come from a linear layer or
                from a convolution of any number of dimensions.
        """
        ours, theirs = self.shape, tuple(weight)
        is_one = math.prod(ours[2:]) == math.prod(theirs[2:]) == 1
        return theirs == ours or (is_one and theirs[:2] == ours[:2])

    def __str__(self) -> str:
        size = 'x'.join(map(str, self.kernel_size))
        return f'{self.layer} ({self.out_channels}, {self.in_channels}, {size})'


@dataclass(frozen=True)
class LayerShare:
    """What one layer takes from its warehouse.

    Attributes:
        kernel: The layer's kernel.
        grid: Cells of the kernel along ``(*spatial, out, in)``.
        start: Index of the layer's first own cell.
        own_cells: How many cells the one-to-one start gives to the layer.
        assigned: For every mixture, the cell that it equals at tau = 1; ``None`` is the zero cell.
    """

    kernel: KernelShape
    grid: tuple[int, ...]
    start: int
    own_cells: int
    assigned: tuple[int | None, ...]

    @property
    def num_mixtures(self) -> int:
        """Mixtures in the layer's kernel."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class WarehousePartition:
    """One warehouse: its cells, and the shares of its layers in order.

    Attributes:
        name: Name in the plan.
        options: The options of the warehouse.
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
    """Cuts the kernels of a warehouse into cells, and finds the one-to-one start.

    Args:
        name: Name of the warehouse, for messages.
        kernels: The layers' kernels in module order; at least one.
        options: The options of the warehouse.

    Returns:
        The cells of the warehouse and the share of every layer.

    Raises:
        PlanError: If the kernels differ in dimension. If they differ in size and
            ``spatial_partition`` is false. If the one-to-one start does not use exactly the cells
            of the budget. If there would be too many mixtures, cells or values.
    """
    layers = ', '.join(map(str, kernels))
    if len({len(kernel.kernel_size) for kernel in kernels}) != 1:
        raise PlanError(
            f'Warehouse {name!r}: kernels of different dimension cannot share cells: {layers}. '
            'Give them warehouses of their own.'
        )
    if METHODS[options.method].is_comparator and len(kernels) > 1:
        raise PlanError(
            f'Warehouse {name!r}: with method={options.method!r} every layer has a warehouse of '
            f'its own, got {layers}. SharingPlan.make gives them their own.'
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
        remedy = f'Lower cell_num_ratio={options.cell_num_ratio}'
        if not METHODS[options.method].is_comparator:
            remedy += '; larger cells, by the other ratios or spatial_partition=False, are fewer'
        raise PlanError(
            f'Warehouse {name!r}: {mixtures} mixtures of {num_cells} cells, more than '
            f'{MOST_CELLS}, for {layers}. {remedy}.'
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
    """The cell of every mixture at tau = 1, and the number of cells that the layer takes up."""
    if ratio >= 1:
        step = int(ratio)
        return tuple(start + i * step for i in range(mixtures)), mixtures * step
    # A budget such as a float32 of 1/3 is a little above it.
    period = int(1 / ratio + 1e-6)
    assigned: list[int | None] = []
    own = 0
    for i in range(mixtures):
        if i % period == (i // period) % period:
            assigned.append(start + own)
            own += 1
        else:
            assigned.append(None)
    return tuple(assigned), own

"""The plan: which layer belongs to which warehouse (paper, section 3.3)."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..layers.partition import (
    METHODS,
    KernelShape,
    PlanError,
    WarehouseOptions,
    WarehousePartition,
    is_comparator,
    partition_warehouse,
)


@dataclass(frozen=True)
class SharingPlan:
    """The layers of a network that become dynamic, and the warehouse of each.

    Args:
        layers: Pairs of layer name and warehouse name, in module order. The index of a warehouse
            follows the order in which the warehouses first appear here.
        options: The options of every warehouse.

    Raises:
        PlanError: If a layer is named twice or the plan is empty.

    Example:
        >>> pairs = [('first', 'stage1'), ('second', 'stage1'), ('third', 'stage2')]
        >>> mmkw.SharingPlan.make(pairs, cell_num_ratio=[1, 4]).warehouses
        {'stage1': ['first', 'second'], 'stage2': ['third']}
    """

    layers: tuple[tuple[str, str], ...]
    options: Mapping[str, WarehouseOptions]

    def __post_init__(self) -> None:
        if not self.layers:
            raise PlanError('The plan names no layer. Check the rule against the network.')
        twice = [name for name, count in Counter(n for n, _ in self.layers).items() if count > 1]
        if twice:
            places = ', '.join(f'{n} in {w!r}' for n, w in self.layers if n in twice)
            raise PlanError(f'The plan names layers more than once: {places}.')

    @classmethod
    def make(cls, layers: Iterable[tuple[str, str]], **options: Any) -> 'SharingPlan':
        """Makes a plan from pairs of names and options.

        Args:
            layers: Pairs of layer name and warehouse name, in module order.
            **options: The fields of :class:`~mmkw.layers.WarehouseOptions`, each one value or,
                but for ``method``, a sequence with one value per warehouse. With a ``method`` other
                than ``kernelwarehouse`` every layer gets a warehouse of its own.

        Raises:
            PlanError: If ``layers`` are no pairs, if a sequence has another length than there are
                warehouses, or a value is out of range.
        """
        layers = tuple(layers)
        for pair in layers:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
                raise PlanError(
                    'layers must be pairs of the names of a layer and a warehouse, such as '
                    f"('layer1.conv', 'stage1'), got {pair!r}."
                )
        method = options.get('method')
        if _is_sequence(method):
            raise PlanError(
                f'method must be one for all layers, one of {list(METHODS)}, got {method!r}. '
                'Patterns give some layers another.'
            )
        if is_comparator(method):
            layers = tuple((layer, layer) for layer, _ in layers)
        names = list(dict.fromkeys(warehouse for _, warehouse in layers))
        known = [field.name for field in fields(WarehouseOptions)]
        for option, value in options.items():
            if option not in known:
                raise PlanError(f'Unknown warehouse option {option!r}. Options: {known}.')
            if _is_sequence(value) and len(value) != len(names):
                raise PlanError(
                    f'{option} has {len(value)} values {list(value)} for {len(names)} warehouses '
                    f'{names}. Give one value, or one per warehouse.'
                )
        return cls(
            layers,
            {
                name: WarehouseOptions.of(
                    **{k: v[i] if _is_sequence(v) else v for k, v in options.items()}
                )
                for i, name in enumerate(names)
            },
        )

    @property
    def warehouses(self) -> dict[str, list[str]]:
        """The layers of every warehouse. Layers and warehouses are in the order of the plan."""
        members: dict[str, list[str]] = {}
        for layer, warehouse in self.layers:
            members.setdefault(warehouse, []).append(layer)
        return members

    def partition(self, kernels: Mapping[str, KernelShape]) -> list[WarehousePartition]:
        """Cuts the kernels of the planned layers.

        Args:
            kernels: The kernel of every planned layer.

        Raises:
            PlanError: If the options of a warehouse do not fit its kernels.
        """
        return [
            partition_warehouse(name, [kernels[layer] for layer in layers], self.options[name])
            for name, layers in self.warehouses.items()
        ]


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)

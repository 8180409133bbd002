"""Builds the networks of this package from a static network, a plan and options."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..layers import KernelShape, split_options
from ..layers.partition import is_comparator
from ..sharing import SharingPlan, convert
from ..sharing.rules import absent_kernels

# An option of warehouses: one value, one per warehouse, or None for that of the method.
Option = float | Sequence[float] | None


@contextmanager
def static_arguments(arguments: dict[str, Any]) -> Iterator[None]:
    """Names the options of mmkw where a static network refuses an argument, such as a misspelt one.

    Args:
        arguments: Arguments of the constructor by name, and those of the static network as a dict.
    """
    try:
        yield
    except TypeError as error:
        if 'unexpected keyword argument' not in str(error):
            raise
        own = ', '.join(name for name, value in arguments.items() if not isinstance(value, dict))
        raise TypeError(f"{error}. mmkw's own options here are {own}.") from error


def make_dynamic(
    network: nn.Module, plan: SharingPlan | Iterable[tuple[str, str]], arguments: dict[str, Any]
) -> nn.Module:
    """Converts a static network by the arguments of a constructor.

    Args:
        network: A static network.
        plan: A plan, or pairs of layer and warehouse. Pairs use the warehouse options in
            ``arguments``.
        arguments: Arguments of a constructor, by name: the warehouse options,
            ``attention_norm_cfg``, ``start_tau``, ``freeze_warehouses`` and
            ``keep_weights``. Others are ignored.

    Returns:
        The same network.

    Raises:
        PlanError: If the plan or the options do not fit the network.
        ValueError: If ``start_tau`` is neither 0 nor 1.
    """
    absent: list[KernelShape] = []
    if not isinstance(plan, SharingPlan):
        absent = absent_kernels(network)
        if is_comparator(arguments['method']):
            # Nothing is shared, so no cells are kept for layers that are not there.
            lacking = {kernel.layer for kernel in absent}
            plan, absent = [pair for pair in plan if pair[0] not in lacking], []
        plan = SharingPlan.make(plan, **split_options(arguments)[0])
    return convert(
        network,
        plan,
        arguments['attention_norm_cfg'],
        absent,
        arguments['start_tau'],
        arguments['freeze_warehouses'],
        arguments['keep_weights'],
    )

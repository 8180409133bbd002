"""Makes a plan from a list of patterns of layer names."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..layers import PlanError, WarehouseOptions
from ..layers.partition import is_comparator
from ..layers.static_layers import used_by_others
from .families import plannable_layers
from .plan import SharingPlan
from .rules import layers_with_kernels


def pattern_plan(
    network: nn.Module, patterns: Sequence[Mapping[str, Any]], **options: Any
) -> SharingPlan:
    r"""Makes a plan from patterns.

    The first pattern that matches a layer's name decides. A layer that no pattern matches is
    static.

    Args:
        network: A static network.
        patterns: A list of dicts. ``match`` is a regular expression for the whole name of a layer.
            ``warehouse`` is the name of the warehouse, and may refer to groups of the expression
            (``r'stage\1'``); by default it is the expression itself. The other keys are options of
            :class:`~mmkw.layers.WarehouseOptions`. With a ``method`` other than ``kernelwarehouse``
            every layer has a warehouse of its own, whatever is named.
        **options: Options for all warehouses. The options of a pattern take precedence.

    Raises:
        PlanError: If a pattern is malformed. If it matches no layer, or only layers that earlier
            patterns match. If it matches a layer that cannot be dynamic. If two patterns give one
            warehouse different options.
    """
    layers = plannable_layers(network)
    kernels = layers_with_kernels(network)
    used = used_by_others(network)
    names = [name for name, _ in network.named_modules()] + list(layers)
    compiled = [_compiled(number, pattern) for number, pattern in enumerate(patterns)]
    home: dict[str, str] = {}
    settings: dict[str, WarehouseOptions] = {}
    for expression, pattern in compiled:
        own = {k: v for k, v in pattern.items() if k not in ('match', 'warehouse')}
        chosen = WarehouseOptions.of(**{**options, **own})
        matched = {name: match for name in names if (match := expression.fullmatch(name))}
        found = [name for name in matched if name in layers and name not in home]
        wrong = [name for name in matched if name in kernels and name not in layers]
        if wrong:
            kind = type(kernels[wrong[0]]).__name__
            reason = 'Only plain convolutions and linear layers have one'
            if wrong[0] in used:
                reason = used[wrong[0]]
            raise PlanError(
                f'patterns: match={expression.pattern!r} catches {wrong[0]}, a {kind}, which has '
                f'no dynamic twin. {reason}: narrow the pattern.'
            )
        if not found:
            earlier = [name for name in matched if name in home]
            reason = f'earlier patterns have taken {earlier[0]}' if earlier else 'no layer matches'
            examples = ', '.join(list(layers)[:4])
            raise PlanError(
                f'patterns: match={expression.pattern!r} decides nothing: {reason}. It has to '
                f'match the whole name; {type(network).__name__} has layers such as {examples}.'
            )
        for name in found:
            warehouse = _warehouse_of(matched[name], pattern)
            if is_comparator(chosen.method):
                warehouse = name
            if settings.setdefault(warehouse, chosen) != chosen:
                raise PlanError(
                    f'patterns: match={expression.pattern!r} gives warehouse {warehouse!r} other '
                    'options than an earlier pattern. Give both the same, or name two warehouses.'
                )
            home[name] = warehouse
    return SharingPlan(tuple((name, home[name]) for name in layers if name in home), settings)


def _warehouse_of(match: re.Match, pattern: Mapping[str, Any]) -> str:
    expression = match.re.pattern
    warehouse = pattern.get('warehouse', '')
    try:
        return match.expand(warehouse) or expression
    except (re.error, IndexError) as error:
        raise PlanError(
            f'patterns: warehouse={warehouse!r} does not fit match={expression!r}: {error}. Groups '
            f'are (...) in the expression, which has {match.re.groups}.'
        ) from error


def _compiled(number: int, pattern: Any) -> tuple[re.Pattern, Mapping[str, Any]]:
    if not isinstance(pattern, Mapping) or 'match' not in pattern:
        raise PlanError(
            f'patterns[{number}] must be a dict(match=..., warehouse=..., ...), got {pattern!r}.'
        )
    known = {'match', 'warehouse', *WarehouseOptions.__dataclass_fields__}
    unknown = set(pattern) - known
    if unknown:
        raise PlanError(
            f'patterns[{number}] has the unknown {sorted(unknown)}; known are {sorted(known)}.'
        )
    for key in ('match', 'warehouse'):
        if not isinstance(pattern.get(key, ''), str):
            raise PlanError(f'patterns[{number}]: {key} must be text, got {pattern[key]!r}.')
    try:
        return re.compile(pattern['match']), pattern
    except re.error as error:
        raise PlanError(f'patterns[{number}]: match={pattern["match"]!r}: {error}.') from error

"""``mmkw plan CONFIG``: the warehouses of a config, before anything is trained.

Cells, mixtures and parameters of every warehouse, the channels that make its cells small, and
totals against the static network. ``--budget-params 30M`` looks for budgets that meet a total.
"""

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..engine.building import build_static, dynamic_networks
from ..engine.command_line import add_config_options, config_of
from ..layers import Attention, LayerAttention, PlanError, WarehousePartition, partition_warehouse
from ..layers.dynamic_layers import DynamicLayer
from ..layers.partition import is_comparator
from .config import model_of, pixels

# Budgets that are tried, those of the paper and between.
BUDGETS = (1 / 16, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, *range(1, 17))

COLUMNS = (
    'warehouse',
    'layers',
    'budget',
    'cell',
    'cells',
    'mixtures',
    'parameters of the cells',
    'of the attentions',
    'channels that force small cells',
)


def parameters(module: nn.Module) -> int:
    """Counts the parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def small_channels(sizes: list[int]) -> str:
    """The channels without which the common divisor of all would be larger."""
    divisor = math.gcd(*sizes)
    found = []
    for size in sorted(set(sizes)):
        others = [other for other in sizes if other != size]
        if others and math.gcd(*others) > divisor:
            found.append(str(size))
    return ', '.join(found)


def plan_lines(networks: dict[str, nn.Module]) -> Iterator[str]:
    """Tables of the warehouses of networks, and one of the layers with a warehouse of their own.

    Args:
        networks: Of :func:`~mmkw.engine.building.dynamic_networks`.
    """
    single = []
    for name, network in networks.items():
        if isinstance(network, DynamicLayer):
            (partition,) = network.warehouse_manager.partitions
            single.append((replace(partition, name=name), attentions_of(partition, network)))
            continue
        yield f'{name} ({type(network).__name__})'
        partitions = network.warehouse_manager.partitions
        yield from table((p, attentions_of(p, network)) for p in partitions)
        for partition in partitions:
            yield f'{partition.name}: {", ".join(str(share.kernel) for share in partition.layers)}'
        yield ''
    if single:
        yield 'Layers with a warehouse of their own, by conv_cfg'
        yield from table(single)


def attentions_of(partition: WarehousePartition, network: nn.Module) -> dict[str, Any]:
    """The attentions of a warehouse by layer, without layers that the network lacks."""
    layers = dict(network.named_modules())
    names = [share.kernel.layer for share in partition.layers]
    if isinstance(network, DynamicLayer):
        layers = {names[0]: network}
    return {name: layers[name].attention for name in names if name in layers}


def table(warehouses: Iterable[tuple[WarehousePartition, dict[str, Any]]]) -> Iterator[str]:
    """A table of warehouses.

    Args:
        warehouses: Each with the attentions of its layers.
    """
    yield ''
    yield '| ' + ' | '.join(COLUMNS) + ' |'
    yield '|---' * len(COLUMNS) + '|'
    for partition, attentions in warehouses:
        shares = partition.layers
        small = [
            f'{side} {channels}'
            for side, channels in (
                ('out', small_channels([s.kernel.out_channels for s in shares])),
                ('in', small_channels([s.kernel.in_channels for s in shares])),
            )
            if channels
        ]
        yield (
            f'| {partition.name} | {len(shares)} | {partition.options.cell_num_ratio:g} '
            f'| {"x".join(map(str, partition.cell_shape))} | {partition.num_cells} '
            f'| {sum(s.num_mixtures for s in shares)} '
            f'| {partition.num_cells * math.prod(partition.cell_shape):,} '
            f'| {sum(map(parameters, attentions.values())):,} | {"; ".join(small)} |'
        )
    yield ''


def cost(partition: WarehousePartition, network: nn.Module, budget: float) -> int | None:
    """Parameters of a warehouse's cells and attentions under a budget; None if it does not fit.

    Args:
        partition: The warehouse as it is.
        network: The network it belongs to.
        budget: ``cell_num_ratio`` to try.
    """
    kernels = [share.kernel for share in partition.layers]
    try:
        options = replace(partition.options, cell_num_ratio=budget)
        cut = partition_warehouse(partition.name, kernels, options)
    except PlanError:
        return None
    total = cut.num_cells * math.prod(cut.cell_shape)
    attentions = attentions_of(cut, network)
    for share in cut.layers:
        if share.kernel.layer in attentions:
            old = attentions[share.kernel.layer]
            # Only the attention of KernelWarehouse has another number of parameters by its norm.
            has_bias = isinstance(old, Attention) and old.fc1.bias is not None
            norm = dict(type='LN' if has_bias else 'BN1d')
            with torch.device('meta'):
                total += parameters(type(old)(old.in_channels, share, cut.num_cells, options, norm))
    return total


def solve(costs: list[dict[float, int]], target: int) -> list[float] | None:
    """Chooses a budget for every warehouse, as even as the total allows.

    The largest budget that all can have comes first; then warehouses are raised one by one, those
    with the smallest budget first, of these the one that costs most and still fits.

    Args:
        costs: For every warehouse the parameters of every budget it can have.
        target: Parameters of all together, at most.

    Returns:
        Budgets, or None if the smallest are too large.
    """
    chosen = [min(cost) for cost in costs]
    common = set.intersection(*(set(cost) for cost in costs))
    for budget in sorted(common):
        if sum(cost[budget] for cost in costs) <= target:
            chosen = [budget] * len(costs)
    spent = sum(cost[budget] for cost, budget in zip(costs, chosen))
    if spent > target:
        return None
    while True:
        raises = []
        for index, (cost, budget) in enumerate(zip(costs, chosen)):
            more = min((b for b in cost if b > budget), default=None)
            if more is not None and spent + cost[more] - cost[budget] <= target:
                raises.append((-budget, cost[more] - cost[budget], index, more))
        if not raises:
            return chosen
        _, added, index, more = max(raises)
        chosen[index] = more
        spent += added


def flops(model: nn.Module, shape: tuple[int, int]) -> int:
    """Multiply-adds of a model's backbone for one image."""
    image = torch.empty(1, 3, *shape, device='meta')
    model.eval()  # Of some models it returns nothing.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.backbone(image)
    # The counter counts a multiply-add as two.
    return counter.get_total_flops() // 2


def amount(text: str) -> int:
    """Reads ``30M``, ``28.9m`` or ``30000000``."""
    units = {'K': 1e3, 'M': 1e6, 'G': 1e9}
    unit = units.get(text[-1:].upper(), 1)
    try:
        value = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        value = 0
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f'{text!r} is no number of parameters such as 30M')
    return int(value)


def main(argv: Sequence[str]) -> None:
    """Reads the command line and prints.

    Args:
        argv: The arguments after ``plan``.
    """
    parser = argparse.ArgumentParser(
        prog='mmkw plan', description='Show the warehouses of a config, before it is trained'
    )
    parser.add_argument(
        'config', help='config file, or PACKAGE::CONFIG such as mmkw::mask_rcnn/...'
    )
    add_config_options(parser)
    parser.add_argument(
        '--shape', nargs=2, type=pixels, default=(800, 1280), help='height and width for the FLOPs'
    )
    parser.add_argument(
        '--budget-params',
        type=amount,
        help='parameters of the networks with warehouses, such as 30M: look for budgets',
    )
    args = parser.parse_args(argv)
    config = config_of(parser, args.config, args.cfg_options)
    model = model_of(parser, args, config, on_meta=True)
    static = build_static(config, on_meta=True)
    networks = dynamic_networks(model)
    if not networks:
        parser.error(
            f'{args.config} builds no network with warehouses; use a backbone such as '
            "'mmkw.KWResNet' or 'mmkw.KWModule', or conv_cfg=dict(type='mmkw.KWConv2d')"
        )
    print('\n'.join(plan_lines(networks)))
    cells = sum(parameters(network.warehouse_manager) for network in networks.values())
    attentions = sum(parameters(m) for m in model.modules() if isinstance(m, LayerAttention))
    dynamic = sum(map(parameters, networks.values()))
    plain = sum(parameters(static.get_submodule(name)) for name in networks)
    height, width = args.shape
    print('| | static | dynamic | ratio |\n|---|---|---|---|')
    rows = [
        ('parameters of the model', parameters(static), parameters(model)),
        ('parameters of the parts above', plain, dynamic),
    ]
    if hasattr(model, 'backbone'):
        try:
            counts = flops(static, args.shape), flops(model, args.shape)
        except (RuntimeError, ValueError) as error:
            parser.error(f'--shape {height} {width}: {error}')
        rows.append((f'backbone FLOPs at {height} x {width}', *counts))
    for label, before, after in rows:
        print(f'| {label} | {before:,} | {after:,} | {after / before:.3f} |')
    print(f'\nOf these {cells:,} are cells and {attentions:,} attentions.')
    if args.budget_params:
        print_budgets(parser, networks, dynamic, args.budget_params)


def print_budgets(
    parser: argparse.ArgumentParser, networks: dict[str, nn.Module], dynamic: int, target: int
) -> None:
    """Prints the budgets that meet a total, network by network."""
    places = [(net, p) for net in networks.values() for p in net.warehouse_manager.partitions]
    costs = []
    for network, partition in places:
        found = {budget: cost(partition, network, budget) for budget in BUDGETS}
        costs.append({budget: price for budget, price in found.items() if price is not None})
    now = (cost(p, network, p.options.cell_num_ratio) for network, p in places)
    fixed = dynamic - sum(price for price in now if price is not None)
    budgets = solve(costs, target - fixed)
    if budgets is None:
        least = fixed + sum(min(prices.values()) for prices in costs)
        remedy = (
            '; fewer dynamic layers, or another method, allow smaller budgets'
            if all(is_comparator(partition.options.method) for _, partition in places)
            else '; smaller cells (cell_inplane_ratio, cell_outplane_ratio) allow smaller budgets'
        )
        parser.error(
            f'--budget-params {target:,}: the least is {least:,}, of which {fixed:,} are static'
            f'{remedy}'
        )
    total = fixed + sum(prices[budget] for prices, budget in zip(costs, budgets))
    print(f'\nFor {target:,} parameters, {total:,} with')
    chosen = iter(budgets)
    for name, network in networks.items():
        partitions = network.warehouse_manager.partitions
        own = [next(chosen) for _ in partitions]
        value = own[0] if len(set(own)) == 1 else own
        print(f'{name}: cell_num_ratio={value}')
        if value is own:
            each = ', '.join(f'{part.name} {budget}' for part, budget in zip(partitions, own))
            print(f'With patterns, each in its own: {each}')

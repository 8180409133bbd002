"""Refuses a checkpoint that does not belong to a KernelWarehouse network, before it half loads."""

import math
import re
from typing import Any

from torch import Tensor, nn


class CheckpointMismatchError(RuntimeError):
    """A checkpoint for another network or budget; names the warehouse and the options that fit."""


def check_warehouses(
    network: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Compares a state dict's warehouses with the network's, as a hook of ``load_state_dict``.

    Warehouses beyond the network's, such as a classifier's, are left to be listed as unused.

    Args:
        network: A converted network.
        state_dict: What is being loaded.
        prefix: The network's place in it. A state dict with nothing there is let through.
        *_: What ``load_state_dict`` passes to a hook beyond that.

    Raises:
        CheckpointMismatchError: If a warehouse is missing or has another shape, or if the state
            dict is that of the static network.
    """
    manager = network.warehouse_manager
    pattern = re.compile(re.escape(prefix) + r'warehouse_manager\.weights\.(\d+)')
    stored = {int(m[1]): state_dict[m[0]] for m in map(pattern.fullmatch, state_dict) if m}
    kind = type(network).__name__
    if not stored:
        layers = [share.kernel.layer for p in manager.partitions for share in p.layers]
        static = [layer for layer in layers if f'{prefix}{layer}.weight' in state_dict]
        if static:
            raise CheckpointMismatchError(
                f'The checkpoint holds static kernels for {len(static)} of the {len(layers)} '
                f'dynamic layers of this {kind}, such as {static[0]}.weight, and no warehouse. '
                'Load it into the static network, or load a KernelWarehouse checkpoint.'
            )
        return
    for index, (partition, weight) in enumerate(zip(manager.partitions, manager.weights)):
        found = stored.get(index)
        if found is None:
            raise CheckpointMismatchError(
                f'The checkpoint has {len(stored)} warehouses and lacks number {index} '
                f'({partition.name!r}) of the {len(manager.weights)} of this {kind}. It was made '
                'for another architecture or sharing plan.'
            )
        if found.shape != weight.shape:
            raise CheckpointMismatchError(
                f'Warehouse {index} ({partition.name!r}) of this {kind} has {len(weight)} cells of '
                f'{tuple(weight.shape[1:])}, the checkpoint has {len(found)} of '
                f'{tuple(found.shape[1:])}. {_advice(partition, found)}'
            )


def _advice(partition: Any, found: Tensor) -> str:
    """The options that give a warehouse the found shape, or that none do."""
    kernels = [share.kernel for share in partition.layers]
    values = sum(math.prod((k.out_channels, k.in_channels, *k.kernel_size)) for k in kernels)
    fitting = dict(
        cell_num_ratio=found.numel() / values,
        cell_inplane_ratio=found.shape[2] / math.gcd(*(k.in_channels for k in kernels)),
        cell_outplane_ratio=found.shape[1] / math.gcd(*(k.out_channels for k in kernels)),
    )
    budget = fitting['cell_num_ratio']
    possible = max(fitting['cell_inplane_ratio'], fitting['cell_outplane_ratio']) <= 1
    whole = budget if budget >= 1 else 1 / budget
    if not possible or abs(whole - round(whole)) > 1e-6:
        return 'It was made for another architecture: check depth, width and arch.'
    options = ', '.join(
        f'{name}={value:g}'
        for name, value in fitting.items()
        if value != getattr(partition.options, name)
    )
    return f'With {options} it would fit.'

"""Finds the options with which a network would accept a checkpoint that it refuses."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..layers import PlanError, WarehousePartition, partition_warehouse
from ..layers.partition import KERNELWAREHOUSE, is_comparator


def advice(
    partitions: Sequence[WarehousePartition], stored: dict[int, Tensor], basis_ratio: float
) -> str:
    """Names the options that give every warehouse the stored shape.

    Args:
        partitions: The network's warehouses.
        stored: The stored cells of every warehouse, by index.
        basis_ratio: The result of :func:`nonlocal_basis_ratio_of`.

    Returns:
        A sentence for an error message. If no options fit, the sentence says so.
    """
    other = 'It was made for another architecture or sharing plan: check depth, width and arch.'
    if len(stored) != len(partitions):
        return other
    fitting = [_fitting(partition, stored[i]) for i, partition in enumerate(partitions)]
    if not all(options['spatial_partition'] for options in fitting):
        # The option makes no difference for 1x1 kernels, so these follow the other warehouses.
        for partition, options in zip(partitions, fitting):
            if all(math.prod(share.kernel.kernel_size) == 1 for share in partition.layers):
                options['spatial_partition'] = False
    for partition, options, weight in zip(
        partitions, fitting, [stored[i] for i in range(len(partitions))]
    ):
        kernels = [share.kernel for share in partition.layers]
        try:
            cut = partition_warehouse(
                partition.name, kernels, replace(partition.options, **options)
            )
        except PlanError:
            return other
        if (cut.num_cells, *cut.cell_shape) != tuple(weight.shape):
            return other
    needed = {}
    for name in fitting[0]:
        values = [options[name] for options in fitting]
        if values != [getattr(partition.options, name) for partition in partitions]:
            needed[name] = values[0] if len(set(values)) == 1 else values
    if basis_ratio != partitions[0].options.nonlocal_basis_ratio:
        needed['nonlocal_basis_ratio'] = basis_ratio
    return f'With {", ".join(f"{name}={value}" for name, value in needed.items())} it would fit.'


def _fitting(partition: WarehousePartition, found: Tensor) -> dict[str, Any]:
    """The options of a stored warehouse, without those of its attentions."""
    kernels = [share.kernel for share in partition.layers]
    values = sum(math.prod(k.shape) for k in kernels)
    budget = found.numel() / values
    # The network had rounded the number of cells down, so the budget is rounded here.
    whole = round(budget) if budget >= 1 else 1 / max(round(1 / budget), 1)
    return dict(
        cell_num_ratio=whole,
        cell_inplane_ratio=found.shape[2] / math.gcd(*(k.in_channels for k in kernels)),
        cell_outplane_ratio=found.shape[1] / math.gcd(*(k.out_channels for k in kernels)),
        spatial_partition=not is_comparator(partition.options.method)
        and all(side == 1 for side in found.shape[3:]),
    )


def reduction_of(state_dict: dict[str, Tensor], prefix: str) -> float:
    """The ``reduction`` of a state dict's attentions.

    It is computed from the attention with the most channels, because narrow attentions have a
    minimum width.

    Args:
        state_dict: The state dict of a KernelWarehouse network.
        prefix: The network's place in the state dict.
    """
    shapes = [
        *_attention_shapes(state_dict, prefix, 'fc1'),
        *_attention_shapes(state_dict, prefix, 'fc'),
    ]
    width, channels = max(shapes, key=lambda shape: shape[1], default=(1, 16))
    return 1 / max(round(channels / width), 1)


def nonlocal_basis_ratio_of(state_dict: dict[str, Tensor], prefix: str) -> float:
    """The ``nonlocal_basis_ratio`` of a state dict, from its largest basis; 1 without a basis.

    Args:
        state_dict: The state dict of a KernelWarehouse network.
        prefix: The network's place in the state dict.
    """
    shapes = _attention_shapes(state_dict, prefix, 'fc3')
    cells, basis = max(shapes, default=(1, 1))
    return 1 / max(round(cells / basis), 1)


def attentions_of(state_dict: dict[str, Tensor], prefix: str) -> dict[str, set[str]]:
    """The names of the tensors of every layer's attention, by the layer.

    Args:
        state_dict: The state dict of a network of any method.
        prefix: The network's place in the state dict.
    """
    found: dict[str, set[str]] = {}
    for key in state_dict:
        if key.startswith(prefix):
            layer, attention, name = key[len(prefix) :].rpartition('.attention.')
            if attention:
                found.setdefault(layer, set()).add(name)
    return found


def method_of(found: dict[str, set[str]], layer: str, warehouses: int) -> str | None:
    """The method of a layer's attention in a state dict; None if its tensors do not say it.

    Args:
        found: The result of :func:`attentions_of`.
        layer: One of its layers.
        warehouses: How many warehouses the state dict has.
    """
    parts = {name.partition('.')[0] for name in found[layer]}
    for method, own in ((KERNELWAREHOUSE, 'norm1'), ('odconv', 'channel_fc')):
        if own in parts:
            return method
    if parts == {'fc'}:
        return 'condconv'
    # KernelWarehouse's has no more where its norm has no parameters, but layers share warehouses.
    return 'dyconv' if parts == {'fc1', 'fc2'} and warehouses == len(found) else None


def _attention_shapes(
    state_dict: dict[str, Tensor], prefix: str, name: str
) -> list[tuple[int, ...]]:
    ending = f'.attention.{name}.weight'
    keys = [key for key in state_dict if key.startswith(prefix) and key.endswith(ending)]
    tensors = [state_dict[key] for key in keys if isinstance(state_dict[key], Tensor)]
    return [tuple(tensor.shape) for tensor in tensors if tensor.dim() == 2 and tensor.numel()]

"""Refuses a checkpoint that does not belong to a KernelWarehouse network, before it half loads."""

import math
import re
from collections.abc import Collection
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

# What the published files hold beyond some backbone: the ImageNet classifier, and the last
# convolution of MobileNetV2, which MMSegmentation leaves out.
_BEYOND = ('fc', 'head', 'norm', 'classifier', 'conv2')


class CheckpointMismatchError(RuntimeError):
    """A checkpoint for another network or budget; names what differs and what would fit."""


def check_checkpoint(
    network: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Compares a state dict with the network, as a hook of ``load_state_dict``.

    Every warehouse and every tensor of a dynamic layer must be there in its shape. The rest is left
    to ``load_state_dict`` and to MMEngine, which lists what is missing and what is not expected;
    only the ImageNet classifier and the like are taken out, and a line in the log lists them.

    Args:
        network: A converted network.
        state_dict: What is being loaded. What lies beyond the backbone is removed in place.
        prefix: The network's place in it.
        *_: What ``load_state_dict`` passes to a hook beyond that.

    Raises:
        CheckpointMismatchError: If there is no warehouse for the network, or if a warehouse or a
            tensor of a dynamic layer is missing or has another shape.
    """
    own = {name for name in _BEYOND if hasattr(network, name)}
    warehouses = len(network.warehouse_manager.weights)
    unused = beyond_backbone(state_dict, prefix, warehouses, own)
    for key in unused:
        del state_dict[key]
    pattern = re.compile(re.escape(prefix) + r'warehouse_manager\.weights\.(\d+)')
    stored = {int(m[1]): state_dict[m[0]] for m in map(pattern.fullmatch, state_dict) if m}
    if not stored:
        raise CheckpointMismatchError(_no_warehouse(network, state_dict, prefix))
    _check_warehouses(network, stored)
    _check_layers(network, state_dict, prefix)
    if unused:
        print_log(
            f'{type(network).__name__}: deliberately not loaded, beyond the backbone: '
            f'{", ".join(unused)}',
            logger='current',
        )


def _no_warehouse(network: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> str:
    kind, place = type(network).__name__, f' under {prefix!r}' if prefix else ''
    partitions = network.warehouse_manager.partitions
    layers = [share.kernel.layer for partition in partitions for share in partition.layers]
    static = [layer for layer in layers if f'{prefix}{layer}.weight' in state_dict]
    if static:
        return (
            f'The checkpoint holds static kernels for {len(static)} of the {len(layers)} '
            f'dynamic layers of this {kind}, such as {static[0]}.weight, and no warehouse. '
            'Load it into the static network, or load a KernelWarehouse checkpoint.'
        )
    elsewhere = [key for key in state_dict if key.endswith('warehouse_manager.weights.0')]
    if elsewhere:
        found = elsewhere[0].removesuffix('warehouse_manager.weights.0')
        return (
            f'The checkpoint has the warehouses of a network under {found!r}. To load them into '
            f"this {kind} alone, use init_cfg=dict(type='Pretrained', prefix={found!r}, ...)."
        )
    names = ', '.join(list(state_dict)[:3]) or 'nothing'
    return (
        f'The checkpoint has no warehouse for this {kind}{place}, where it holds {names}. An '
        "ImageNet file goes into the backbone's init_cfg=dict(type='Pretrained', checkpoint=FILE), "
        'the file of a whole detector or segmentor into load_from.'
    )


def beyond_backbone(
    state_dict: dict[str, Tensor], prefix: str, warehouses: int, own: Collection[str] = ()
) -> list[str]:
    """The names of an ImageNet classifier, or what else a published file has beyond a backbone.

    Args:
        state_dict: Of a backbone with more.
        prefix: The backbone's place in it.
        warehouses: How many the backbone has; a dynamic classifier's own is the next.
        own: Names that do belong to the backbone.
    """
    parts = set(_BEYOND) - set(own)
    names = [
        key
        for key in state_dict
        if key.startswith(prefix) and key[len(prefix) :].partition('.')[0] in parts
    ]
    if any(key.startswith(f'{prefix}classifier.') and '.attention.' in key for key in names):
        names.append(f'{prefix}warehouse_manager.weights.{warehouses}')
    return [name for name in names if name in state_dict]


def _check_warehouses(network: nn.Module, stored: dict[int, Tensor]) -> None:
    manager, kind = network.warehouse_manager, type(network).__name__
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
    if len(stored) > len(manager.weights):
        raise CheckpointMismatchError(
            f'The checkpoint has {len(stored)} warehouses, this {kind} {len(manager.weights)}. It '
            'was made for another architecture or sharing plan.'
        )


def _check_layers(network: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    layers = dict(network.named_modules())
    for partition in network.warehouse_manager.partitions:
        for name in [share.kernel.layer for share in partition.layers]:
            if name not in layers:
                continue  # An absent layer of the plan.
            for part, tensor in layers[name].state_dict().items():
                found = state_dict.get(f'{prefix}{name}.{part}')
                # torch counts from 0 where an old file lacks the counter.
                if part.endswith('num_batches_tracked') and found is None:
                    continue
                if found is None or found.shape != tensor.shape:
                    shape = 'lacks it' if found is None else f'has {tuple(found.shape)}'
                    raise CheckpointMismatchError(
                        f'{name}.{part} of this {type(network).__name__} has the shape '
                        f'{tuple(tensor.shape)}, the checkpoint {shape}. Its warehouses fit, its '
                        'attentions do not: check reduction, nonlocal_basis_ratio and the norm.'
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

"""Tells on load what a checkpoint is: of this network, of its static twin, or of neither.

A static one is translated, one of another network refused before it half loads.
"""

import logging
import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from ..layers import (
    KernelShape,
    PlanError,
    WarehousePartition,
    fault_of,
    partition_warehouse,
    warm_start,
)
from ..layers.static_layers import predictions
from .errors import DamagedCheckpointError, shown

# What the published files hold beyond some backbone: the ImageNet classifier, and the last
# convolution of MobileNetV2, which MMSegmentation leaves out.
_BEYOND = ('fc', 'head', 'norm', 'classifier', 'conv2')


_only_checking: ContextVar[bool] = ContextVar('only checking', default=False)


@contextmanager
def only_checking() -> Iterator[None]:
    """Has :func:`check_checkpoint` refuse what it would refuse, and do nothing else."""
    token = _only_checking.set(True)
    try:
        yield
    finally:
        _only_checking.reset(token)


class CheckpointMismatchError(RuntimeError):
    """A checkpoint for another network or budget; names what differs and what would fit."""


def check_checkpoint(
    network: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Compares a state dict with the network, as a hook of ``load_state_dict``.

    Every warehouse and every tensor of a dynamic layer must be there in its shape; or else the
    kernel of every dynamic layer, from the static network, which then gives the warehouses and the
    attentions (:func:`~mmkw.layers.warm_start`). The rest is left to ``load_state_dict`` and to
    MMEngine, which lists what is missing and what is not expected; only the ImageNet classifier and
    the like are taken out, and a line in the log lists them. Another says what was recognised. Of a
    network whose cells are pruned or parametrised everything is left to them, as it has cells under
    names of PyTorch's.

    Args:
        network: A converted network.
        state_dict: What is being loaded; changed in place.
        prefix: The network's place in it.
        *_: What ``load_state_dict`` passes to a hook beyond that.

    Raises:
        CheckpointMismatchError: If there is neither a warehouse nor a kernel for the network, or if
            a warehouse, a kernel or a tensor of a dynamic layer is missing or has another shape.
        DamagedCheckpointError: If one of these is no dense tensor of real, finite numbers.
    """
    if not network.warehouse_manager.weights.is_plain:
        return
    check_cells(state_dict, prefix, network.warehouse_manager.weights)
    own = {name for name in _BEYOND if hasattr(network, name)}
    warehouses = len(network.warehouse_manager.weights)
    unused = beyond_backbone(state_dict, prefix, warehouses, own)
    for key in unused:
        del state_dict[key]
    stored = stored_warehouses(state_dict, prefix)
    kernels = {} if stored else _static_kernels(network, state_dict, prefix)
    if stored:
        _check_warehouses(network, stored, state_dict, prefix)
        _check_layers(network, state_dict, prefix)
    elif not kernels:
        raise CheckpointMismatchError(_no_warehouse(network, state_dict, prefix))
    if _only_checking.get():
        return
    if kernels:
        found = _load_static(network, kernels, state_dict, prefix)
    else:
        # Only the authors' ImageNet files have more than the network.
        source = 'published KernelWarehouse' if unused else 'KernelWarehouse'
        cells = sum(len(weight) for weight in stored.values())
        found = f'{source} checkpoint, {cells} cells into {len(stored)} warehouses'
    print_log(f'{type(network).__name__}: {found}', logger='current')
    if unused:
        print_log(
            f'{type(network).__name__}: deliberately not loaded, beyond the backbone: '
            f'{", ".join(unused)}',
            logger='current',
        )


def _static_kernels(
    network: nn.Module, state_dict: dict[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """The kernels of a static network's state dict, by dynamic layer, checked."""
    own = _modules(network)
    layers = {
        share.kernel.layer: share.kernel
        for partition in network.warehouse_manager.partitions
        for share in partition.layers
        if share.kernel.layer in own
    }
    found = {
        name: state_dict[f'{prefix}{name}.weight']
        for name in layers
        if f'{prefix}{name}.weight' in state_dict
    }
    if not found:
        return {}
    kind, cells = type(network).__name__, network.warehouse_manager.weights[0]
    _leave_out_other_classes(network, layers, found, state_dict, prefix)
    for name, kernel in layers.items():
        weight = found.get(name)
        shape = getattr(weight, 'shape', None)
        fits = shape is not None and kernel.fits(shape)
        # Values count only where the shape is right: an expanded tensor has any number of them.
        if name in found and (fault := fault_of(weight, cells, shape if fits else ())):
            raise DamagedCheckpointError(f'The static kernel {prefix}{name}.weight {fault}.')
        if not fits:
            has = 'has none' if shape is None else f'has {tuple(shape)}'
            raise CheckpointMismatchError(
                f'The checkpoint holds static kernels for {len(found)} of the {len(layers)} '
                f'dynamic layers of this {kind}; for {name}, of {kernel.shape}, it {has}. It was '
                'made for another architecture: check depth, width and arch.'
            )
    beyond = _deeper(layers, own, state_dict, prefix)
    if beyond:
        raise CheckpointMismatchError(
            f'The checkpoint holds static kernels of layers that this {kind} lacks, such as '
            f'{beyond[0]}. It was made for another architecture: check depth and arch.'
        )
    return found


def _modules(network: nn.Module) -> dict[str, nn.Module]:
    """All modules of a network by all their names."""
    return dict(network.named_modules(remove_duplicate=False))


def _leave_out_other_classes(
    network: nn.Module,
    layers: dict[str, KernelShape],
    found: dict[str, Any],
    state_dict: dict[str, Tensor],
    prefix: str,
) -> None:
    """Takes out predictions of other classes, as MMEngine does for a static network."""
    for name in predictions(network) & set(found):
        shape = tuple(getattr(found[name], 'shape', ()))
        own = layers[name].shape
        as_many = replace(layers[name], out_channels=shape[0]) if shape else layers[name]
        if shape and shape[0] != own[0] and as_many.fits(shape):
            for part in ('weight', 'bias'):
                state_dict.pop(f'{prefix}{name}.{part}', None)
            del found[name], layers[name]
            if _only_checking.get():
                continue
            print_log(
                f'{type(network).__name__}: {name} predicts {own[0]} channels, the checkpoint '
                f'{shape[0]}: other classes. It keeps its random start.',
                logger='current',
                level=logging.WARNING,
            )


def _deeper(
    layers: Collection[str], own: Collection[str], state_dict: dict[str, Tensor], prefix: str
) -> list[str]:
    """Names of kernels like a dynamic layer's, but for their numbers, that the network lacks.

    Not those of whole stages: a network may leave its last ones out.
    """

    def pattern(name: str) -> str:
        return re.sub(r'\d+', '#', name)

    kinds = {pattern(f'{name}.weight') for name in layers}
    names = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
    return [
        name
        for name in names
        if pattern(name) in kinds
        and name.removesuffix('.weight') not in own
        and _stage(name) in own
    ]


def _stage(name: str) -> str:
    """The parts of a name up to the first with a number."""
    return re.match(r'(.*?\d[^.]*)?', name)[0]


def _load_static(
    network: nn.Module, kernels: dict[str, Tensor], state_dict: dict[str, Tensor], prefix: str
) -> str:
    """Puts warehouses and attentions in the place of static kernels; tells what was done."""
    manager = network.warehouse_manager
    layers = {name: network.get_submodule(name) for name in kernels}
    attentions = {name: layer.attention for name, layer in layers.items()}
    errors = {}
    for index, (partition, cells) in enumerate(zip(manager.partitions, manager.weights)):
        if not any(share.kernel.layer in kernels for share in partition.layers):
            continue
        started, errors[partition.name] = warm_start(
            partition, kernels, attentions, cells, manager.start_tau
        )
        state_dict[f'{prefix}warehouse_manager.weights.{index}'] = started
    # A layer that is used at several places has as many names.
    for name, layer in _modules(network).items():
        if layer in layers.values():
            state_dict.pop(f'{prefix}{name}.weight', None)
            layer.attention.take_start(manager.start_tau, state_dict, f'{prefix}{name}.attention.')
    worst = max(errors, key=errors.get)
    exact = 'exactly'
    if errors[worst] > 0:
        exact = (
            f'approximately: below a budget of 1 there are fewer cells than pieces of kernels. '
            f'Relative error of the kernels {errors[worst]:.2f} in warehouse {worst!r}, '
            f'{sum(errors.values()) / len(errors):.2f} on average'
        )
    return (
        f'static checkpoint, {len(kernels)} kernels into {len(errors)} warehouses for temperature '
        f'{manager.start_tau:g}, {exact}'
    )


def _no_warehouse(network: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> str:
    kind, place = type(network).__name__, f' under {prefix!r}' if prefix else ''
    elsewhere = [key for key in state_dict if key.endswith('warehouse_manager.weights.0')]
    if elsewhere:
        found = elsewhere[0].removesuffix('warehouse_manager.weights.0')
        return (
            f'The checkpoint has the warehouses of a network under {found!r}. To load them into '
            f"this {kind} alone, use init_cfg=dict(type='Pretrained', prefix={found!r}, ...)."
        )
    names = ', '.join(map(shown, list(state_dict)[:3])) or 'nothing'
    return (
        f'The checkpoint has no warehouse for this {kind}{place}, where it holds {names}. An '
        "ImageNet file goes into the backbone's init_cfg=dict(type='Pretrained', checkpoint=FILE), "
        'the file of a whole detector or segmentor into load_from.'
    )


def stored_warehouses(state_dict: dict[str, Tensor], prefix: str) -> dict[int, Tensor]:
    """The warehouses of a state dict by their index.

    Args:
        state_dict: Of a KernelWarehouse network, or of another.
        prefix: The network's place in it.
    """
    pattern = re.compile(re.escape(prefix) + r'warehouse_manager\.weights\.(0|[1-9][0-9]{0,5})')
    return {int(m[1]): state_dict[m[0]] for m in map(pattern.fullmatch, state_dict) if m}


def check_cells(state_dict: dict[str, Any], prefix: str = '', own: Sequence[Tensor] = ()) -> None:
    """Checks the names and the values of the warehouses in a state dict.

    Args:
        state_dict: Of a KernelWarehouse network, or of another.
        prefix: The network's place in it.
        own: The cells of the network; without a network, any floating-point cells will do.

    Raises:
        DamagedCheckpointError: If a warehouse has a name that no warehouse has, or is no dense
            tensor of real, finite numbers.
    """
    place = f'{prefix}warehouse_manager.'
    stored = stored_warehouses(state_dict, prefix)
    names = {f'{place}weights.{index}' for index in stored}
    for key in state_dict:
        if key.startswith(place) and key not in names:
            raise DamagedCheckpointError(
                f'{shown(key)} is no name of a warehouse; {place}weights.0, 1, 2 ... are. Of '
                'pruned or parametrised cells save the values: call torch.nn.utils.prune.remove or '
                'remove_parametrizations first.'
            )
    for index, values in stored.items():
        cells = own[index] if index < len(own) else values
        shape = None if index < len(own) else getattr(values, 'shape', None)
        if fault := fault_of(values, cells, shape):
            raise DamagedCheckpointError(
                f'{place}weights.{index}, the cells of a warehouse, {fault}.'
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


def _check_warehouses(
    network: nn.Module, stored: dict[int, Tensor], state_dict: dict[str, Tensor], prefix: str
) -> None:
    manager, kind = network.warehouse_manager, type(network).__name__
    for index, (partition, weight) in enumerate(zip(manager.partitions, manager.weights)):
        found = stored.get(index)
        if found is None:
            raise CheckpointMismatchError(
                f'The checkpoint has {len(stored)} warehouses and lacks number {index} '
                f'({partition.name!r}) of the {len(manager.weights)} of this {kind}. It was made '
                'for another architecture or sharing plan.'
            )
        if found.dim() != weight.dim() or 0 in found.shape:
            raise CheckpointMismatchError(
                f'Warehouse {index} ({partition.name!r}) of this {kind} has the shape '
                f'{tuple(weight.shape)}, the checkpoint {tuple(found.shape)}. It was made for '
                'another architecture or sharing plan.'
            )
        if found.shape != weight.shape:
            raise CheckpointMismatchError(
                f'Warehouse {index} ({partition.name!r}) of this {kind} has {len(weight)} cells of '
                f'{tuple(weight.shape[1:])}, the checkpoint has {len(found)} of '
                f'{tuple(found.shape[1:])}. '
                + _advice(manager.partitions, stored, _nonlocal_basis_ratio(state_dict, prefix))
            )
    own = _modules(network)
    names = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
    # Those of stages that the network leaves out come last.
    stages_left_out = any(
        '.attention.' in name and _stage(name) not in own for name in names if _stage(name)
    )
    if len(stored) > len(manager.weights) and not stages_left_out:
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
                key = f'{prefix}{name}.{part}'
                found = state_dict.get(key)
                # torch counts from 0 where an old file lacks the counter.
                if part.endswith('num_batches_tracked') and found is None:
                    continue
                if key in state_dict and (fault := _fault_beside(found, tensor)):
                    raise DamagedCheckpointError(f'{key} {fault}.')
                if found is None or found.shape != tensor.shape:
                    shape = 'lacks it' if found is None else f'has {tuple(found.shape)}'
                    ratio = _nonlocal_basis_ratio(state_dict, prefix)
                    raise CheckpointMismatchError(
                        f'{name}.{part} of this {type(network).__name__} has the shape '
                        f'{tuple(tensor.shape)}, the checkpoint {shape}. Its warehouses fit, its '
                        'attentions do not: they were made with '
                        f'reduction={_reduction(state_dict, prefix):g}, '
                        f'nonlocal_basis_ratio={ratio:g}, or another norm.'
                    )


def _fault_beside(found: Any, own: Tensor) -> str | None:
    """What is wrong with a tensor of an attention; its counters are of whole numbers."""
    if own.is_floating_point():
        return fault_of(found, own)
    if not isinstance(found, Tensor) or found.is_complex() or found.is_meta != own.is_meta:
        return 'is no tensor of whole numbers'
    whole = own.is_meta or not found.is_floating_point() or bool((found % 1 == 0).all())
    return None if whole else 'is no tensor of whole numbers'


def _advice(
    partitions: Sequence[WarehousePartition], stored: dict[int, Tensor], basis_ratio: float
) -> str:
    """The options that give every warehouse the stored shape, or that none do."""
    other = 'It was made for another architecture or sharing plan: check depth, width and arch.'
    if len(stored) != len(partitions):
        return other
    fitting = [_fitting(partition, stored[i]) for i, partition in enumerate(partitions)]
    if not all(options['spatial_partition'] for options in fitting):
        # Kernels of 1x1 are cut alike either way.
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
    """The options, but for the attentions', that a stored warehouse was cut with."""
    kernels = [share.kernel for share in partition.layers]
    values = sum(math.prod(k.shape) for k in kernels)
    budget = found.numel() / values
    # The number of cells was rounded down.
    whole = round(budget) if budget >= 1 else 1 / max(round(1 / budget), 1)
    return dict(
        cell_num_ratio=whole,
        cell_inplane_ratio=found.shape[2] / math.gcd(*(k.in_channels for k in kernels)),
        cell_outplane_ratio=found.shape[1] / math.gcd(*(k.out_channels for k in kernels)),
        spatial_partition=all(side == 1 for side in found.shape[3:]),
    )


def _reduction(state_dict: dict[str, Tensor], prefix: str) -> float:
    """The reduction of a state dict's attentions, from the widest: narrow ones have a minimum."""
    shapes = _attention_shapes(state_dict, prefix, 'fc1')
    width, channels = max(shapes, key=lambda shape: shape[1], default=(1, 16))
    return 1 / max(round(channels / width), 1)


def _nonlocal_basis_ratio(state_dict: dict[str, Tensor], prefix: str) -> float:
    """The ratio of a state dict's non-local bases, from the largest; 1 without a basis."""
    shapes = _attention_shapes(state_dict, prefix, 'fc3')
    cells, basis = max(shapes, default=(1, 1))
    return 1 / max(round(cells / basis), 1)


def _attention_shapes(
    state_dict: dict[str, Tensor], prefix: str, name: str
) -> list[tuple[int, ...]]:
    ending = f'.attention.{name}.weight'
    keys = [key for key in state_dict if key.startswith(prefix) and key.endswith(ending)]
    tensors = [state_dict[key] for key in keys if isinstance(state_dict[key], Tensor)]
    return [tuple(tensor.shape) for tensor in tensors if tensor.dim() == 2 and tensor.numel()]

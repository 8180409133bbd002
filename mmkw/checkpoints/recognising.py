"""Recognises a state dict on load: it is of this network, of its static network, or of neither.

A static state dict is translated. A state dict of another network is refused before any tensor of
this network is loaded.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import fault_of
from ..layers.dynamic_layers import DynamicLayer
from ..layers.integers import integers_of
from ..layers.partition import METHODS
from .advice import advice, attentions_of, method_of, nonlocal_basis_ratio_of, reduction_of
from .beyond import PARTS, beyond_backbone
from .errors import CheckpointMismatchError, DamagedCheckpointError, shown
from .only_checking import is_only_checking
from .static_kernels import load_static, modules_of, stage_of, static_kernels

LOGGER = logging.getLogger('mmkw')


def check_checkpoint(
    network: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Checks a state dict against the network, as a hook of ``load_state_dict``.

    The state dict must have every warehouse and every tensor of the dynamic layers, in the right
    shape. Or it must have the static kernel of every dynamic layer. Then a warm start makes the
    warehouses and the attentions (:func:`~mmkw.layers.warm_start`).

    Trained attentions end an earlier warm start: they have the temperature at which they were
    saved, or 0 where the file does not say.

    All other tensors are left to ``load_state_dict`` and to MMEngine, which list missing and
    unexpected names. Only tensors beyond the backbone, such as an ImageNet classifier, are removed
    here. The log says what was recognised and what was removed.

    If cells are pruned or parametrised, PyTorch stores them under other names. Then this hook does
    nothing.

    Args:
        network: A converted network.
        state_dict: The state dict that is being loaded; changed in place.
        prefix: The network's place in the state dict.
        *_: Other arguments that ``load_state_dict`` passes to a hook; not used.

    Raises:
        CheckpointMismatchError: If the attentions are of another method, or if a warehouse, or a
            tensor of a dynamic layer, is missing or has another shape. If there are no warehouses,
            and a static kernel is missing or has another shape.
        DamagedCheckpointError: If one of these is not a dense tensor of real, finite numbers.
    """
    manager = getattr(network, 'warehouse_manager', None)
    # The network has no manager after to_static.
    if manager is None:
        return
    _check_integers(network, state_dict, prefix)
    if not manager.weights.is_plain:
        return
    for name, layer in modules_of(network).items():
        if isinstance(layer, DynamicLayer) and layer.place[0] is manager:
            own_cells = f'{prefix}warehouse_manager.weights.{layer.place[1]}'
            layer.take_names(state_dict, f'{prefix}{name}.', own_cells)
    check_cells(state_dict, prefix, network.warehouse_manager.weights)
    _check_attentions(network, state_dict, prefix)
    own = {name for name in PARTS if hasattr(network, name)}
    warehouses = len(network.warehouse_manager.weights)
    unused = beyond_backbone(state_dict, prefix, warehouses, own)
    for key in unused:
        del state_dict[key]
    _check_stem(network, state_dict, prefix)
    stored = stored_warehouses(state_dict, prefix)
    kernels = {} if stored else static_kernels(network, state_dict, prefix)
    if stored:
        _check_warehouses(network, stored, state_dict, prefix)
        _check_layers(network, state_dict, prefix)
    elif not kernels:
        raise CheckpointMismatchError(_no_warehouse(network, state_dict, prefix))
    if is_only_checking():
        return
    if kernels:
        found = load_static(network, kernels, state_dict, prefix)
    else:
        # Only the authors' ImageNet files have tensors beyond the backbone.
        source = METHODS[manager.partitions[0].options.method].title
        source = f'published {source}' if unused else source
        cells = sum(len(weight) for weight in stored.values())
        found = f'{source} checkpoint, {cells} cells into {len(stored)} warehouses'
        for layer in modules_of(network).values():
            if isinstance(layer, DynamicLayer):
                layer.attention.end_start()
    LOGGER.info(f'{type(network).__name__}: {found}')
    if unused:
        LOGGER.info(
            f'{type(network).__name__}: deliberately not loaded, beyond the backbone: '
            f'{", ".join(unused)}'
        )


def _check_integers(network: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Refuses cells for a network that stores them as integers, the other way round, and damage."""
    kind, weights = type(network).__name__, network.warehouse_manager.weights
    place = f'{prefix}warehouse_manager.weights.'
    if integers_of(weights, 0) is None:
        first = state_dict.get(f'{place}parametrizations.0.original0')
        if getattr(first, 'dtype', None) == torch.int8:
            raise CheckpointMismatchError(
                f'The checkpoint has cells stored as integers, this {kind} plain ones. Call '
                'mmkw.quantize_cells on the network before loading.'
            )
        return
    plain = [f'{place}0']
    for name, layer in modules_of(network).items():
        if isinstance(layer, DynamicLayer):
            plain.append(f'{prefix}{name}.weight')
    if any(name in state_dict for name in plain):
        raise CheckpointMismatchError(
            f'The checkpoint has plain weights, this {kind} stores cells as integers. Load it '
            'before mmkw.quantize_cells.'
        )
    for index in range(len(weights)):
        stored, own = f'{place}parametrizations.{index}.original', integers_of(weights, index)
        integers, magnitudes = state_dict.get(f'{stored}0'), state_dict.get(f'{stored}1')
        if integers is not None and getattr(integers, 'dtype', None) != torch.int8:
            raise DamagedCheckpointError(f'{stored}0 is not of integers.')
        if magnitudes is not None and own and (fault := fault_of(magnitudes, own[1])):
            raise DamagedCheckpointError(f'{stored}1 {fault}.')


def _check_stem(network: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Refuses the file of a ResNet with another stem: only the stem would stay random."""
    stems = {
        'conv1': "type='mmkw.KWResNet', without deep_stem",
        'stem.0': "type='mmkw.KWResNetV1c' (or V1d), or deep_stem=True",
    }
    own = modules_of(network)
    for stage in [name for name in own if name.split('.')[-1] == 'layer1']:
        place = stage.removesuffix('layer1')
        stored = [stem for stem in stems if f'{prefix}{place}{stem}.weight' in state_dict]
        built = [stem for stem in stems if f'{place}{stem}' in own]
        if stored and built and stored != built:
            raise CheckpointMismatchError(
                f'The checkpoint has another stem than this {type(network).__name__}: '
                f'{prefix}{place}{stored[0]}.weight, not {prefix}{place}{built[0]}.weight. '
                f'Write {stems[stored[0]]}, or take the file of a network with this stem.'
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
    """The cells of the warehouses in a state dict, by index.

    Args:
        state_dict: The state dict of any network.
        prefix: The network's place in the state dict.
    """
    pattern = re.compile(re.escape(prefix) + r'warehouse_manager\.weights\.(0|[1-9][0-9]{0,5})')
    return {int(m[1]): state_dict[m[0]] for m in map(pattern.fullmatch, state_dict) if m}


def check_cells(state_dict: dict[str, Any], prefix: str = '', own: Sequence[Tensor] = ()) -> None:
    """Checks the names and the values of the warehouses in a state dict.

    Args:
        state_dict: The state dict of any network.
        prefix: The network's place in the state dict.
        own: The cells of the network. Without them, cells of any floating-point type are accepted.

    Raises:
        DamagedCheckpointError: If a name under ``warehouse_manager`` is not that of a warehouse, or
            if a warehouse is not a dense tensor of real, finite numbers.
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
                + advice(manager.partitions, stored, nonlocal_basis_ratio_of(state_dict, prefix))
            )
    more = len(stored) > len(manager.weights)
    if more and not _has_stages_beyond(network, state_dict, prefix):
        raise CheckpointMismatchError(
            f'The checkpoint has {len(stored)} warehouses, this {kind} {len(manager.weights)}. It '
            'was made for another architecture or sharing plan.'
        )


def _has_stages_beyond(network: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> bool:
    """Whether a state dict has dynamic layers of whole stages that the network lacks."""
    own = modules_of(network)
    names = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
    stages = {stage_of(name) for name in names if '.attention.' in name}
    return any(stage and stage not in own for stage in stages)


def _check_attentions(network: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Refuses attentions of another method, or with statistics that the network's lack."""
    layers, kind = modules_of(network), type(network).__name__
    found = attentions_of(state_dict, prefix)
    warehouses = len(stored_warehouses(state_dict, prefix))
    for partition in network.warehouse_manager.partitions:
        own = partition.options.method
        for name in [share.kernel.layer for share in partition.layers]:
            # Layers of the plan may be absent, or static.
            if name not in found or not isinstance(layers.get(name), DynamicLayer):
                continue
            method = method_of(found, name, warehouses)
            tensors = set(layers[name].get_submodule('attention').state_dict())
            # Its parts may have been replaced, in the network and in the file.
            if method not in (None, own) and found[name] != tensors:
                raise CheckpointMismatchError(
                    f'The attention of {name} in the checkpoint is that of method={method!r}, in '
                    f'this {kind} that of method={own!r}. With method={method!r} it would fit, or '
                    'with other options beside it.'
                )
            # An attention without a bias before its norm has all that LayerNorm needs in
            # BatchNorm's file.
            if any(key.endswith('.running_mean') for key in found[name] - tensors):
                raise CheckpointMismatchError(
                    f'The attention of {name} in the checkpoint was made with BatchNorm, in this '
                    f"{kind} with another norm. With attention_norm_cfg=dict(type='BN1d') it would "
                    'fit.'
                )


def _check_layers(network: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    layers = modules_of(network)
    for partition in network.warehouse_manager.partitions:
        for name in [share.kernel.layer for share in partition.layers]:
            if name not in layers:
                continue  # An absent layer of the plan.
            for part, tensor in layers[name].state_dict().items():
                key = f'{prefix}{name}.{part}'
                found = state_dict.get(key)
                # Old files lack this counter. torch then counts from 0.
                if part.endswith('num_batches_tracked') and found is None:
                    continue
                if key in state_dict and (fault := _fault_beside(found, tensor)):
                    raise DamagedCheckpointError(f'{key} {fault}.')
                if found is None or found.shape != tensor.shape:
                    shape = 'lacks it' if found is None else f'has {tuple(found.shape)}'
                    ratio = nonlocal_basis_ratio_of(state_dict, prefix)
                    raise CheckpointMismatchError(
                        f'{name}.{part} of this {type(network).__name__} has the shape '
                        f'{tuple(tensor.shape)}, the checkpoint {shape}. Its warehouses fit, its '
                        'attentions do not: they were made with '
                        f'reduction={reduction_of(state_dict, prefix):g}, '
                        f'nonlocal_basis_ratio={ratio:g}, or another norm.'
                    )


def _fault_beside(found: Any, own: Tensor) -> str | None:
    """What is wrong with a tensor of a dynamic layer. Counters must hold whole numbers."""
    if own.is_floating_point():
        return fault_of(found, own)
    if not isinstance(found, Tensor) or found.is_complex() or (found.is_meta and not own.is_meta):
        return 'is no tensor of whole numbers'
    whole = found.is_meta or not found.is_floating_point() or bool((found % 1 == 0).all())
    return None if whole else 'is no tensor of whole numbers'

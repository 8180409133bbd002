"""Finds and checks the kernels of a static network in a state dict, and makes cells from them."""

import logging
import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..layers import KernelShape, fault_of, warm_start
from ..layers.dynamic_layers import DynamicLayer
from ..layers.static_layers import predictions
from ..ops import modes
from .errors import CheckpointMismatchError, DamagedCheckpointError
from .only_checking import is_only_checking

LOGGER = logging.getLogger('mmkw')


def static_kernels(
    network: nn.Module, state_dict: dict[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """Finds and checks the kernels of a static network's state dict.

    Args:
        network: A converted network.
        state_dict: The state dict of a static network. Predictions with another number of classes
            are removed.
        prefix: The network's place in the state dict.

    Returns:
        The kernel of every dynamic layer, by name. Empty if the state dict has no such kernel.

    Raises:
        CheckpointMismatchError: If a kernel is missing, has another shape, or belongs to a layer
            that the network lacks.
        DamagedCheckpointError: If a kernel is not a dense tensor of real, finite numbers.
    """
    own = modules_of(network)
    layers = {
        share.kernel.layer: share.kernel
        for partition in network.warehouse_manager.partitions
        for share in partition.layers
        # Layers of the plan may be absent, or static.
        if isinstance(own.get(share.kernel.layer), DynamicLayer)
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
        # Values are checked only if the shape fits: an expanded tensor can have any number of them.
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


def modules_of(network: nn.Module) -> dict[str, nn.Module]:
    """All modules of a network by all their names in state dicts.

    Args:
        network: Any network. A module that it uses at several places has several names.
    """
    modules = network.named_modules(remove_duplicate=False)
    return {name.replace(modes.CHECKPOINTED, ''): module for name, module in modules}


def _leave_out_other_classes(
    network: nn.Module,
    layers: dict[str, KernelShape],
    found: dict[str, Any],
    state_dict: dict[str, Tensor],
    prefix: str,
) -> None:
    """Removes predictions with another number of classes, and warns, as MMEngine does."""
    for name in predictions(network) & set(found):
        shape = tuple(getattr(found[name], 'shape', ()))
        own = layers[name].shape
        as_many = replace(layers[name], out_channels=shape[0]) if shape else layers[name]
        if shape and shape[0] != own[0] and as_many.fits(shape):
            for part in ('weight', 'bias'):
                state_dict.pop(f'{prefix}{name}.{part}', None)
            del found[name], layers[name]
            if is_only_checking():
                continue
            LOGGER.warning(
                f'{type(network).__name__}: {name} predicts {own[0]} channels, the checkpoint '
                f'{shape[0]}: other classes. It keeps its random start.'
            )


def _deeper(
    layers: Collection[str], own: Collection[str], state_dict: dict[str, Tensor], prefix: str
) -> list[str]:
    """The names of kernels that a deeper network would have.

    They differ from the name of a dynamic layer only in their numbers, and this network lacks them.
    Kernels of whole stages that the network lacks do not count: it may leave its last stages out.
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
        and stage_of(name) in own
    ]


def stage_of(name: str) -> str:
    """The parts of a name, up to the first part with a number.

    Args:
        name: Name of a module, such as ``stages.2.blocks.1``.
    """
    return name[: match.end()] if (match := re.match(r'.*?\d[^.]*', name)) else ''


def load_static(
    network: nn.Module, kernels: dict[str, Tensor], state_dict: dict[str, Tensor], prefix: str
) -> str:
    """Replaces static kernels in a state dict by warehouses and attentions.

    Args:
        network: A converted network.
        kernels: The result of :func:`static_kernels`.
        state_dict: Changed in place.
        prefix: The network's place in the state dict.

    Returns:
        Words for the log.
    """
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
    # A layer that is used at several places has several names.
    for name, layer in modules_of(network).items():
        if layer in layers.values():
            state_dict.pop(f'{prefix}{name}.weight', None)
            layer.attention.take_start(manager.start_tau, state_dict, f'{prefix}{name}.attention.')
    return f'static checkpoint, {told(len(kernels), errors, manager.start_tau)}'


def told(kernels: int, errors: dict[str, float], start_tau: float) -> str:
    """Describes a warm start for the log.

    Args:
        kernels: Number of static kernels.
        errors: The errors of :func:`~mmkw.layers.warm_start` by the warehouses' names.
        start_tau: The temperature of the start.
    """
    worst = max(errors, key=errors.__getitem__)
    exact = 'exactly'
    if errors[worst] > 0:
        exact = (
            f'approximately: below a budget of 1 there are fewer cells than pieces of kernels. '
            f'Relative error of the kernels {errors[worst]:.2f} in warehouse {worst!r}, '
            f'{sum(errors.values()) / len(errors):.2f} on average'
        )
    return f'{kernels} kernels into {len(errors)} warehouses for temperature {start_tau:g}, {exact}'

"""MobileNetV2 with KernelWarehouse."""

import math
import re
from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor, nn

from ..checkpoints import CheckpointMismatchError, stored_warehouses
from ..registry import MODELS
from ..sharing import mobilenet_v2_rule
from ..sharing.rules import POINTWISE
from .building import Option, make_dynamic, static_arguments
from .classifiers import name_in_classifiers
from .residual import checkpoint_blocks
from .static import refuse_small_images, static_network


@MODELS.register_module()
def MobileNetV2(widen_factor: float = 1.0, *, with_cp: bool = False, **arguments: Any) -> nn.Module:
    """Builds the static MobileNetV2 of mmdet, mmseg or mmpretrain: the paper's baseline.

    The network also reads checkpoints with torchvision's names, such as the published checkpoints.

    Args:
        widen_factor: Width of the network: a factor for the channels.
        with_cp: Whether the blocks' activations are recomputed in the backward pass, to save
            memory.
        **arguments: The other arguments of the ``MobileNetV2`` of the library.

    Returns:
        The network, of the library's class.

    Raises:
        ValueError: If an argument is out of its range.
    """
    number = isinstance(widen_factor, Real) and not isinstance(widen_factor, bool)
    if not number or not 0 < widen_factor < math.inf:
        raise ValueError(f'widen_factor must be a number above 0, got {widen_factor!r}.')
    network = static_network('MobileNetV2')(widen_factor=widen_factor, **arguments)
    groups = [getattr(network, f'layer{group}') for group in range(1, 8)]
    if with_cp:
        checkpoint_blocks([block for group in groups for block in group])
    nested = hasattr(groups[0][0], 'conv')
    names = partial(mobilenet_v2_names, [len(group) for group in groups], nested)
    network._register_load_state_dict_pre_hook(names)
    network._checkpoint_filter = name_in_classifiers
    return refuse_small_images(network)


@MODELS.register_module()
def KWMobileNetV2(
    widen_factor: float = 1.0,
    *,
    pointwise: str = 'joint',
    method: str = 'kernelwarehouse',
    cell_num_ratio: Option = None,
    cell_inplane_ratio: Option = 1.0,
    cell_outplane_ratio: Option = 1.0,
    reduction: Option = None,
    nonlocal_basis_ratio: Option = 1.0,
    spatial_partition: bool | Sequence[bool] | None = None,
    attention_norm_cfg: dict | None = None,
    start_tau: float = 0.0,
    freeze_warehouses: bool = True,
    keep_weights: bool = False,
    **static: Any,
) -> nn.Module:
    """Builds the MobileNetV2 of a library with the paper's sharing.

    The result is an object of the ``MobileNetV2`` class of mmdet, mmseg or mmpretrain, depending on
    the config. It takes all arguments of that class, and reads the published checkpoints. The
    paper's 1/2x network has ``pointwise='last_stage'`` and ``reduction=1 / 32``. Its
    ``cell_num_ratio``, ``cell_inplane_ratio`` and ``cell_outplane_ratio`` are each
    ``[1] * 6 + [.5, 1, .5]``, for the nine warehouses of the backbone.

    Args:
        widen_factor: Width of the network: a factor for the channels.
        pointwise: How pointwise convolutions share: ``joint`` (the paper's 1x), ``separate`` (4x)
            or ``last_stage`` (1/2x). See :func:`~mmkw.sharing.mobilenet_v2_rule`.
        method: ``kernelwarehouse``, or for comparison ``dyconv``, ``condconv`` or ``odconv``: then
            the layers are :class:`~mmkw.DYConv2d`, :class:`~mmkw.CondConv2d` or
            :class:`~mmkw.ODConv2d`, each with its own kernels. Of the warehouse options they take
            ``cell_num_ratio`` and ``reduction`` alone, but ``condconv`` no ``reduction``.
        cell_num_ratio: The budget ``b``: cells per mixture. Above 0, by default 1. Of the other
            methods the number of kernels, by default 4, 8 and 1. This and the next five options
            are one value, or one per warehouse.
        cell_inplane_ratio: Input channels of a cell, relative to the greatest common divisor of the
            layers' input channels (per group). In (0, 1].
        cell_outplane_ratio: Output channels of a cell, relative to the greatest common divisor of
            the layers' output channels. In (0, 1].
        reduction: Hidden width of the attention, relative to the layer's input channels. Above 0,
            by default 1/16, of ``dyconv`` 1/4. At least 16 units are used, of ``dyconv`` as many as
            kernels.
        nonlocal_basis_ratio: Size of the basis through which a layer attends to the cells of other
            layers, relative to the number of those cells. In (0, 1]; 1 means no basis.
        spatial_partition: Whether cells have size 1 in space, as by default. Otherwise they have
            the kernel's size.
        attention_norm_cfg: Norm of the attentions: ``BN1d``, ``SyncBN``, ``LN`` or ``GN``. By
            default SyncBN or BatchNorm if the network has it, else LayerNorm.
        start_tau: The temperature at which a static checkpoint starts the network: 0, or 1 with a
            :class:`~mmkw.engine.hooks.TemperatureHook`.
        freeze_warehouses: Whether a warehouse is frozen while all its layers are frozen. If not,
            every warehouse learns. The paper's detectors freeze the stem and the first two
            stages but no warehouse: ``frozen_stages=2, freeze_warehouses=False`` in mmdet.
        keep_weights: Whether training from scratch begins with the static network's random kernels,
            as with those of a static checkpoint. By default cells and attentions have the random
            start of the paper, which needs a :class:`~mmkw.engine.hooks.TemperatureHook`.
        **static: The other arguments of :func:`MobileNetV2`.

    Returns:
        The network, of the library's class.

    Raises:
        PlanError: If the warehouse options do not fit the network.
        ValueError: If ``pointwise`` or an argument of the static network is out of its range.

    Example:
        >>> backbone = mmkw.KWMobileNetV2(pointwise='separate', cell_num_ratio=4)
    """
    arguments = dict(locals())
    with static_arguments(arguments):
        network = MobileNetV2(widen_factor, **static)
    # This network freezes its stages only in train(). They must be frozen before the conversion.
    network.train()
    kinds = {len({home for _, home in mobilenet_v2_rule(network, p)}): p for p in POINTWISE}
    network._register_load_state_dict_pre_hook(partial(_check_sharing, pointwise, kinds))
    return make_dynamic(network, mobilenet_v2_rule(network, pointwise, method), arguments)


def _check_sharing(
    pointwise: str, kinds: dict[int, str], state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Refuses a checkpoint with another ``pointwise``. The number of warehouses shows which."""
    stored = len(stored_warehouses(state_dict, prefix))
    # A dynamic classifier has its own warehouse.
    stored -= any(key.startswith(f'{prefix}classifier.1.attention.') for key in state_dict)
    found = kinds.get(stored, pointwise)
    if found != pointwise:
        raise CheckpointMismatchError(
            f'This MobileNetV2 shares pointwise={pointwise!r}, the checkpoint {found!r}: it has '
            f'{stored} warehouses. With pointwise={found!r} and its budget it would fit.'
        )


def mobilenet_v2_names(
    blocks: list[int], nested: bool, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Translates torchvision's names of a MobileNetV2, ``features.I.conv.J``, to the library's.

    Args:
        blocks: Number of blocks in each of the seven groups.
        nested: Whether a block's convolutions are called ``conv.J`` (mmseg, mmpretrain) or have
            names (mmdet).
        state_dict: Changed in place.
        prefix: The network's place in the state dict. Other names do not change.
        *_: Other arguments that ``load_state_dict`` passes to a hook; not used.
    """
    places = ['conv1']
    for group, count in enumerate(blocks):
        places += [f'layer{group + 1}.{block}' for block in range(count)]
    places.append('conv2')
    for key in list(state_dict):
        name = key.removeprefix(f'{prefix}features.')
        number = re.fullmatch(r'[0-9]{1,3}', name.partition('.')[0])
        if not key.startswith(f'{prefix}features.') or number is None:
            continue
        index, rest = number[0], name.partition('.')[2]
        if int(index) in (0, len(places) - 1):
            translated = _single(rest)
        elif int(index) < len(places):
            translated = _block(rest, 1 if index == '1' else 2, nested)
        else:
            continue
        # Names that are not of a MobileNetV2 stay: a later check lists or refuses them.
        if translated is not None:
            state_dict[f'{prefix}{places[int(index)]}.{translated}'] = state_dict.pop(key)


def _single(name: str) -> str | None:
    """Translates a name in the first or the last feature: convolution ``0`` or its norm ``1``."""
    match = re.fullmatch(r'([01])\.(.+)', name)
    return match and f'{("conv", "bn")[int(match[1])]}.{match[2]}'


def _block(name: str, linear: int, nested: bool) -> str | None:
    """Translates a name in a block.

    Convolution J and its norm are called ``conv.J.0`` and ``conv.J.1``. Only the last convolution,
    of number ``linear``, and its norm are called ``conv.J`` and ``conv.(J + 1)``.
    """
    if match := re.fullmatch(r'conv\.(\d)\.([01])\.(.+)', name):
        number, kind, rest = int(match[1]), int(match[2]), match[3]
    elif match := re.fullmatch(r'conv\.(\d)\.(.+)', name):
        number, kind, rest = linear, int(match[1]) - linear, match[2]
    else:
        return None
    if number > linear or kind not in (0, 1):
        return None
    named = ['expand_conv', 'depthwise_conv', 'linear_conv'][2 - linear :]
    part = f'conv.{number}' if nested else named[number]
    return f'{part}.{("conv", "bn")[kind]}.{rest}'

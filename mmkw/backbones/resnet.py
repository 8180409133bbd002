"""ResNet with KernelWarehouse."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..layers import split_options
from ..registry import MODELS
from ..sharing import SharingPlan, convert, resnet_rule
from ..sharing.rules import absent_kernels
from .residual import add_drop_path, checkpoint_blocks
from .static import attention_norm, refuse_small_images, static_network


@MODELS.register_module()
def ResNet(
    depth: int,
    *,
    drop_path_rate: float | Sequence[float] = 0.0,
    with_cp: bool = False,
    **resnet: Any,
) -> nn.Module:
    """Builds the library's own static ResNet, the paper's baseline; stochastic depth is possible.

    With ``groups`` among the arguments it is the library's ``ResNeXt``.

    Args:
        depth: 18, 34, 50, 101 or 152.
        drop_path_rate: Stochastic depth of the last block, in [0, 1); earlier blocks have
            proportionally less. Or a sequence of one rate per block: the paper's detectors with
            KernelWarehouse have ``[0.1] * 16``.
        with_cp: Recompute the blocks' activations in the backward pass, to save memory.
        **resnet: The other arguments of the ``ResNet`` or ``ResNeXt`` of mmdet or mmseg.

    Returns:
        The network, of the library's class.

    Raises:
        ValueError: If ``drop_path_rate`` is out of range, or has not one value per block.
        TypeError: If ``drop_path_rate`` is no number, nor a sequence of numbers.
    """
    kind = 'ResNeXt' if 'groups' in resnet else 'ResNet'
    network = static_network(kind)(depth=depth, **resnet)
    blocks = [block for name in network.res_layers for block in getattr(network, name)]
    add_drop_path(blocks, drop_path_rate)
    if with_cp:
        checkpoint_blocks(blocks)
    return refuse_small_images(network)


@MODELS.register_module()
def KWResNet(
    depth: int,
    *,
    attention_norm_cfg: dict | None = None,
    start_tau: float = 0.0,
    freeze_warehouses: bool = True,
    **arguments: Any,
) -> nn.Module:
    """Builds the library's own ResNet with the paper's four warehouses, one per stage.

    The result is the ``ResNet`` of mmdet or mmseg, whichever the config belongs to, or their
    ``ResNeXt`` where ``groups`` is given: every argument of theirs keeps its meaning and every
    module its name. A warehouse is frozen by ``frozen_stages`` only when no trainable layer uses
    it. ``norm_eval`` covers the norms of the attentions.

    Args:
        depth: 18, 34, 50, 101 or 152.
        attention_norm_cfg: Norm of the attentions, ``BN1d``, ``SyncBN`` or ``LN``; by default
            SyncBN or BatchNorm where the network has it, else LayerNorm.
        start_tau: See :func:`~mmkw.sharing.convert`.
        freeze_warehouses: The same.
        **arguments: The warehouse options of :class:`~mmkw.layers.WarehouseOptions`, each one value
            or one per warehouse; and the arguments of :func:`ResNet`, those of the library's own
            among them.

    Returns:
        The network, of the library's class.

    Raises:
        PlanError: If the warehouse options do not fit the network.
        ValueError: If ``drop_path_rate`` is out of range, or has not one value per block.
        TypeError: If ``drop_path_rate`` is no number, nor a sequence of numbers.
    """
    options, static = split_options(arguments)
    network = ResNet(depth, **static)
    plan = SharingPlan.make(resnet_rule(network), **options)
    norm = attention_norm_cfg or attention_norm(network)
    absent = absent_kernels(network)
    return convert(network, plan, norm, absent, start_tau, freeze_warehouses)


@MODELS.register_module()
def KWResNetV1c(depth: int, **arguments: Any) -> nn.Module:
    """Builds a :func:`KWResNet` with a stem of three convolutions, as mmseg's ``ResNetV1c``.

    Args:
        depth: As in :func:`KWResNet`.
        **arguments: The other arguments of :func:`KWResNet`.
    """
    return KWResNet(depth, deep_stem=True, avg_down=False, **arguments)


@MODELS.register_module()
def KWResNetV1d(depth: int, **arguments: Any) -> nn.Module:
    """Builds a :func:`KWResNetV1c` that pools before its downsampling convolutions.

    Args:
        depth: As in :func:`KWResNet`.
        **arguments: The other arguments of :func:`KWResNet`.
    """
    return KWResNet(depth, deep_stem=True, avg_down=True, **arguments)

"""ResNet with KernelWarehouse."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..registry import MODELS
from ..sharing import resnet_rule
from .building import Option, make_dynamic
from .residual import add_drop_path, checkpoint_blocks
from .static import refuse_small_images, static_network


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
    cell_num_ratio: Option = 1.0,
    cell_inplane_ratio: Option = 1.0,
    cell_outplane_ratio: Option = 1.0,
    reduction: Option = 1 / 16,
    nonlocal_basis_ratio: Option = 1.0,
    spatial_partition: bool | Sequence[bool] = True,
    attention_norm_cfg: dict | None = None,
    start_tau: float = 0.0,
    freeze_warehouses: bool = True,
    **static: Any,
) -> nn.Module:
    """Builds the library's own ResNet with the paper's four warehouses, one per stage.

    The result is the ``ResNet`` of mmdet or mmseg, whichever the config belongs to, or their
    ``ResNeXt`` where ``groups`` is given: every argument of theirs keeps its meaning and every
    module its name. A warehouse is frozen by ``frozen_stages`` only when no trainable layer uses
    it. ``norm_eval`` covers the norms of the attentions.

    Args:
        depth: 18, 34, 50, 101 or 152.
        cell_num_ratio: The budget, and the other warehouse options of
            :class:`~mmkw.layers.WarehouseOptions`: each one value, or one per warehouse.
        cell_inplane_ratio: See there.
        cell_outplane_ratio: See there.
        reduction: See there.
        nonlocal_basis_ratio: See there.
        spatial_partition: See there.
        attention_norm_cfg: Norm of the attentions, ``BN1d``, ``SyncBN`` or ``LN``; by default
            SyncBN or BatchNorm where the network has it, else LayerNorm.
        start_tau: See :func:`~mmkw.sharing.convert`.
        freeze_warehouses: The same.
        **static: The arguments of :func:`ResNet`, those of the library's own among them.

    Returns:
        The network, of the library's class.

    Raises:
        PlanError: If the warehouse options do not fit the network.
        ValueError: If ``drop_path_rate`` is out of range, or has not one value per block.
        TypeError: If ``drop_path_rate`` is no number, nor a sequence of numbers.

    Example:
        >>> backbone = mmkw.KWResNet(50, cell_num_ratio=4, frozen_stages=1)
        >>> [tuple(y.shape) for y in backbone(torch.rand(2, 3, 64, 64))]
        [(2, 256, 16, 16), (2, 512, 8, 8), (2, 1024, 4, 4), (2, 2048, 2, 2)]
    """
    arguments = dict(locals())
    network = ResNet(depth, **static)
    return make_dynamic(network, resnet_rule(network), arguments)


@MODELS.register_module()
def KWResNetV1c(depth: int, **arguments: Any) -> nn.Module:
    """Builds a :func:`KWResNet` with a stem of three convolutions, as mmseg's ``ResNetV1c``.

    Args:
        depth: As in :func:`KWResNet`.
        **arguments: The other arguments of :func:`KWResNet`.

    Example:
        >>> backbone = mmkw.KWResNetV1c(18, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
    """
    return KWResNet(depth, deep_stem=True, avg_down=False, **arguments)


@MODELS.register_module()
def KWResNetV1d(depth: int, **arguments: Any) -> nn.Module:
    """Builds a :func:`KWResNetV1c` that pools before its downsampling convolutions.

    Args:
        depth: As in :func:`KWResNet`.
        **arguments: The other arguments of :func:`KWResNet`.

    Example:
        >>> backbone = mmkw.KWResNetV1d(50, cell_num_ratio=0.5, cell_inplane_ratio=0.5)
    """
    return KWResNet(depth, deep_stem=True, avg_down=True, **arguments)

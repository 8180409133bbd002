"""ResNet with KernelWarehouse."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..layers.residual import add_drop_path, checkpoint_blocks
from ..registry import MODELS
from ..sharing import SharingPlan, convert, resnet_rule
from .static import static_network


@MODELS.register_module()
def ResNet(
    depth: int, *, drop_path_rate: float = 0.0, with_cp: bool = False, **resnet: Any
) -> nn.Module:
    """Builds the library's own static ResNet, with stochastic depth: the paper's baseline.

    Args:
        depth: 18, 34, 50, 101 or 152.
        drop_path_rate: Stochastic depth of the last block, in [0, 1); earlier blocks have
            proportionally less.
        with_cp: Recompute the blocks' activations in the backward pass, to save memory.
        **resnet: The other arguments of the ``ResNet`` of mmdet or mmseg.

    Returns:
        The network, of the library's class.

    Raises:
        ValueError: If ``drop_path_rate`` is out of range.
    """
    network = static_network('ResNet')(depth=depth, **resnet)
    blocks = [block for name in network.res_layers for block in getattr(network, name)]
    add_drop_path(blocks, drop_path_rate)
    if with_cp:
        checkpoint_blocks(blocks)
    return network


@MODELS.register_module()
def KWResNet(
    depth: int,
    *,
    cell_num_ratio: float | Sequence[float] = 1.0,
    cell_inplane_ratio: float | Sequence[float] = 1.0,
    cell_outplane_ratio: float | Sequence[float] = 1.0,
    reduction: float | Sequence[float] = 1 / 16,
    nonlocal_basis_ratio: float | Sequence[float] = 1.0,
    spatial_partition: bool | Sequence[bool] = True,
    **resnet: Any,
) -> nn.Module:
    """Builds the library's own ResNet with the paper's four warehouses, one per stage.

    The result is the ``ResNet`` of mmdet or mmseg, whichever the config belongs to: every argument
    of theirs keeps its meaning and every module its name. A warehouse is frozen by
    ``frozen_stages`` only when no trainable layer uses it, and ``norm_eval`` covers the norms of
    the attentions.

    Args:
        depth: 18, 34, 50, 101 or 152.
        cell_num_ratio: The parameter budget b: 1 as many as the static network, 4 four times.
            This and the next five: one value, or one per warehouse; see
            :class:`~mmkw.layers.WarehouseOptions`.
        cell_inplane_ratio: Input channels of a cell, relative to the largest possible.
        cell_outplane_ratio: Output channels of a cell, relative to the largest possible.
        reduction: Hidden width of the attention, relative to a layer's input channels.
        nonlocal_basis_ratio: Below 1, other layers' cells are attended to through a basis.
        spatial_partition: Cells are 1x1 in space.
        **resnet: The arguments of the static network: those of the library's ``ResNet`` and
            ``drop_path_rate``; see :func:`ResNet`.

    Returns:
        The network, of the library's class.

    Raises:
        PlanError: If the warehouse options do not fit the network.
        ValueError: If ``drop_path_rate`` is out of range.
    """
    network = ResNet(depth, **resnet)
    plan = SharingPlan.make(
        resnet_rule(network),
        cell_num_ratio=cell_num_ratio,
        cell_inplane_ratio=cell_inplane_ratio,
        cell_outplane_ratio=cell_outplane_ratio,
        reduction=reduction,
        nonlocal_basis_ratio=nonlocal_basis_ratio,
        spatial_partition=spatial_partition,
    )
    return convert(network, plan)

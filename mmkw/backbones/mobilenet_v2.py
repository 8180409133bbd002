"""MobileNetV2 with KernelWarehouse."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from ..checkpoints.names import mobilenet_v2_names
from ..registry import MODELS
from ..sharing import SharingPlan, convert, mobilenet_v2_rule
from .static import static_network


@MODELS.register_module()
def KWMobileNetV2(
    widen_factor: float = 1.0,
    *,
    pointwise: str = 'joint',
    cell_num_ratio: float | Sequence[float] = 1.0,
    cell_inplane_ratio: float | Sequence[float] = 1.0,
    cell_outplane_ratio: float | Sequence[float] = 1.0,
    reduction: float | Sequence[float] = 1 / 16,
    nonlocal_basis_ratio: float | Sequence[float] = 1.0,
    spatial_partition: bool | Sequence[bool] = True,
    **mobilenet: Any,
) -> nn.Module:
    """Builds the library's own MobileNetV2 with the paper's sharing.

    The result is the ``MobileNetV2`` of mmdet or mmseg, whichever the config belongs to, with all
    its arguments. It also reads checkpoints that name the layers as torchvision does, among them
    the published ones. The paper's 1/2x has
    ``pointwise='last_stage', reduction=1 / 32`` and, for the nine warehouses of the backbone,
    ``cell_num_ratio=[1] * 6 + [.5, 1, .5]`` and the same inplane and outplane ratios.

    Args:
        widen_factor: Width of the network, relative to its channels at 1.
        pointwise: How pointwise convolutions share: ``joint`` (the paper's 1x), ``separate`` (4x)
            or ``last_stage`` (1/2x); see :func:`~mmkw.sharing.mobilenet_v2_rule`.
        cell_num_ratio: The parameter budget b. This and the next five: one value, or one per
            warehouse; see :class:`~mmkw.layers.WarehouseOptions`.
        cell_inplane_ratio: Input channels of a cell, relative to the largest possible.
        cell_outplane_ratio: Output channels of a cell, relative to the largest possible.
        reduction: Hidden width of the attention, relative to a layer's input channels.
        nonlocal_basis_ratio: Below 1, other layers' cells are attended to through a basis.
        spatial_partition: Cells are 1x1 in space.
        **mobilenet: The other arguments of the static network.

    Returns:
        The network, of the library's class.

    Raises:
        PlanError: If the warehouse options do not fit the network.
        ValueError: If ``pointwise`` or an argument of the static network is out of its range.
    """
    network = static_network('MobileNetV2')(widen_factor=widen_factor, **mobilenet)
    # This network freezes its stages in train() only; the conversion looks at what is frozen.
    network.train()
    plan = SharingPlan.make(
        mobilenet_v2_rule(network, pointwise),
        cell_num_ratio=cell_num_ratio,
        cell_inplane_ratio=cell_inplane_ratio,
        cell_outplane_ratio=cell_outplane_ratio,
        reduction=reduction,
        nonlocal_basis_ratio=nonlocal_basis_ratio,
        spatial_partition=spatial_partition,
    )
    blocks = [len(getattr(network, f'layer{group}')) for group in range(1, 8)]
    nested = hasattr(network.layer1[0], 'conv')
    network._register_load_state_dict_pre_hook(partial(mobilenet_v2_names, blocks, nested))
    return convert(network, plan)

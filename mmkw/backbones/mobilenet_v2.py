"""MobileNetV2 with KernelWarehouse."""

from functools import partial
from typing import Any

from torch import nn

from ..checkpoints.names import mobilenet_v2_names
from ..layers import KernelShape, split_options
from ..layers.residual import checkpoint_blocks
from ..registry import MODELS
from ..sharing import SharingPlan, convert, mobilenet_v2_rule
from .static import attention_norm, refuse_small_images, static_network


@MODELS.register_module()
def KWMobileNetV2(
    widen_factor: float = 1.0,
    *,
    pointwise: str = 'joint',
    with_cp: bool = False,
    **arguments: Any,
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
        with_cp: Recompute the blocks' activations in the backward pass, to save memory.
        **arguments: The warehouse options of :class:`~mmkw.layers.WarehouseOptions`, each one value
            or one per warehouse; and the other arguments of the static network.

    Returns:
        The network, of the library's class.

    Raises:
        PlanError: If the warehouse options do not fit the network.
        ValueError: If ``pointwise`` or an argument of the static network is out of its range.
    """
    options, static = split_options(arguments)
    network = static_network('MobileNetV2')(widen_factor=widen_factor, **static)
    groups = [getattr(network, f'layer{group}') for group in range(1, 8)]
    if with_cp:
        checkpoint_blocks([block for group in groups for block in group])
    # This network freezes its stages in train() only; the conversion looks at what is frozen.
    network.train()
    plan = SharingPlan.make(mobilenet_v2_rule(network, pointwise), **options)
    blocks = [len(group) for group in groups]
    nested = hasattr(network.layer1[0], 'conv')
    network._register_load_state_dict_pre_hook(partial(mobilenet_v2_names, blocks, nested))
    absent = [] if hasattr(network, 'conv2') else [_conv2(network)]
    return convert(refuse_small_images(network), plan, attention_norm(network), absent)


def _conv2(network: nn.Module) -> KernelShape:
    """The last convolution, which mmseg leaves out and the published warehouses have cells for."""
    convolutions = [m for m in network.layer7.modules() if isinstance(m, nn.Conv2d)]
    out_channels = int(1280 * max(1.0, network.widen_factor))
    return KernelShape('conv2.conv', out_channels, convolutions[-1].out_channels, (1, 1))

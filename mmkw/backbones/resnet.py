"""ResNet with KernelWarehouse."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..registry import MODELS
from ..sharing import family_rule, resnet_rule
from .building import Option, make_dynamic, static_arguments
from .classifiers import name_in_classifiers
from .residual import add_drop_path, checkpoint_blocks
from .static import check_stages, refuse_small_images, static_network


@MODELS.register_module()
def ResNet(
    depth: int,
    *,
    drop_path_rate: float | Sequence[float] = 0.0,
    with_cp: bool = False,
    **resnet: Any,
) -> nn.Module:
    """Builds the static ResNet of mmdet, mmseg or mmpretrain: the paper's baseline.

    With an argument ``groups`` it is the library's ``ResNeXt``.

    Args:
        depth: 18, 34, 50, 101 or 152.
        drop_path_rate: Stochastic depth of the last block, in [0, 1). The rates grow linearly from
            0 at the first block. Or a sequence with one rate per block: the paper's detectors with
            KernelWarehouse have ``[0.1] * 16``.
        with_cp: Whether the blocks' activations are recomputed in the backward pass, to save
            memory.
        **resnet: The other arguments of the ``ResNet`` or ``ResNeXt`` of the library.

    Returns:
        The network, of the library's class.

    Raises:
        ValueError: If ``drop_path_rate`` is out of range, or does not have one value per block. If
            ``num_stages``, ``out_indices`` or ``frozen_stages`` names stages that are not there.
        TypeError: If ``drop_path_rate`` is neither a number nor a sequence of numbers.
    """
    stages = resnet.get('num_stages', 4)
    if stages not in range(1, 5):
        raise ValueError(f'num_stages must be 1, 2, 3 or 4, got {stages!r}.')
    check_stages(stages, resnet.get('out_indices', ()), resnet.get('frozen_stages', -1))
    kind = 'ResNeXt' if 'groups' in resnet else 'ResNet'
    network = static_network(kind)(depth=depth, **resnet)
    blocks = [block for name in network.res_layers for block in getattr(network, name)]
    add_drop_path(blocks, drop_path_rate)
    if with_cp:
        checkpoint_blocks(blocks)
    network._checkpoint_filter = name_in_classifiers
    return refuse_small_images(network)


@MODELS.register_module()
def KWResNet(
    depth: int,
    *,
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
    """Builds the ResNet of a library with the paper's four warehouses, one per stage.

    The result is an object of the ``ResNet`` class of mmdet, mmseg or mmpretrain, depending on the
    config. With ``groups`` it is the library's ``ResNeXt``, with the warehouses of
    :func:`~mmkw.sharing.family_rule`. All arguments keep their meaning, and all modules keep their
    names. ``frozen_stages`` freezes a warehouse only if all its layers are
    frozen. ``norm_eval`` also applies to the norms of the attentions.

    Args:
        depth: 18, 34, 50, 101 or 152.
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
            every warehouse learns.
        keep_weights: Whether training from scratch begins with the static network's random kernels,
            as with those of a static checkpoint. By default cells and attentions have the random
            start of the paper, which needs a :class:`~mmkw.engine.hooks.TemperatureHook`.
        **static: The other arguments of :func:`ResNet`.

    Returns:
        The network, of the library's class.

    Raises:
        PlanError: If the warehouse options do not fit the network.
        ValueError: If ``drop_path_rate`` is out of range, or does not have one value per block.
        TypeError: If ``drop_path_rate`` is neither a number nor a sequence of numbers.

    Example:
        >>> backbone = mmkw.KWResNet(50, cell_num_ratio=4, frozen_stages=1)
        >>> [tuple(y.shape) for y in backbone(torch.rand(2, 3, 64, 64))]
        [(2, 256, 16, 16), (2, 512, 8, 8), (2, 1024, 4, 4), (2, 2048, 2, 2)]
        >>> other = mmkw.KWResNet(18, method='odconv', cell_num_ratio=4)
    """
    arguments = dict(locals())
    with static_arguments(arguments):
        network = ResNet(depth, **static)
    # Grouped kernels have few input channels: beside the others, their cells would be too small.
    rule = family_rule if 'groups' in static else resnet_rule
    return make_dynamic(network, rule(network, method), arguments)


@MODELS.register_module()
def KWResNetV1c(depth: int, **arguments: Any) -> nn.Module:
    """Builds a :func:`KWResNet` with a stem of three convolutions, like mmseg's ``ResNetV1c``.

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

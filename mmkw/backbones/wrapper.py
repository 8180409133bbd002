"""KernelWarehouse for any registered backbone, neck or head."""

from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from ..layers import split_options
from ..registry import MODELS
from ..sharing import family_rule, pattern_plan
from .building import Option, make_dynamic, static_arguments
from .residual import take_over_checkpoints


@MODELS.register_module()
def KWModule(
    module: dict,
    *,
    patterns: Sequence[dict] | None = None,
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
    **more: Any,
) -> nn.Module:
    r"""Builds a registered backbone, neck or head, and makes its layers dynamic.

    The result is an object of the module's own class, and its modules keep their names. A
    checkpoint of the static module gives it a warm start.

    Args:
        module: Config of the static module, of any library that the config can reach. If this
            wrapper is merged into the static module's own config, ``dict(type=...)`` is enough.
        patterns: Which layers become dynamic, and in which warehouse: a list of dicts such as
            ``dict(match=r'layer3\.\d+\.conv2', warehouse='stage3', cell_num_ratio=2)``. See
            :func:`~mmkw.sharing.pattern_plan`. By default the rule of the module's family decides;
            see :func:`~mmkw.sharing.family_rule`.
        method: ``kernelwarehouse``, or for comparison ``dyconv``, ``condconv`` or ``odconv``: then
            the layers are :class:`~mmkw.DYConv2d`, :class:`~mmkw.CondConv2d` or
            :class:`~mmkw.ODConv2d`, each with its own kernels. Of the warehouse options they take
            ``cell_num_ratio`` and ``reduction`` alone, but ``condconv`` no ``reduction``.
        cell_num_ratio: The budget ``b``: cells per mixture. Above 0, by default 1. Of the other
            methods the number of kernels, by default 4, 8 and 1. This and the next five options
            are one value or, without ``patterns``, one per warehouse.
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
            default SyncBN or BatchNorm if the module has it, else LayerNorm.
        start_tau: The temperature at which a static checkpoint starts the network: 0, or 1 with a
            :class:`~mmkw.engine.hooks.TemperatureHook`.
        freeze_warehouses: Whether a warehouse is frozen while all its layers are frozen. If not,
            every warehouse learns.
        keep_weights: Whether training from scratch begins with the static network's random kernels,
            as with those of a static checkpoint. By default cells and attentions have the random
            start of the paper, which needs a :class:`~mmkw.engine.hooks.TemperatureHook`.
        **more: More arguments of the module. Those in ``module`` take precedence.

    Returns:
        The module, of its own class.

    Raises:
        PlanError: If the plan or the options do not fit the module.
        ValueError: If ``start_tau`` is neither 0 nor 1.
        TypeError: If ``module`` is not a config.

    Example:
        >>> head = dict(type='mmdet.RetinaHead', num_classes=80, in_channels=256)
        >>> type(mmkw.KWModule(head, cell_num_ratio=2)).__name__
        'RetinaHead'
    """
    arguments = dict(locals())
    if not isinstance(module, dict):
        raise TypeError(
            "module must be the config of a module, such as dict(type='ResNet', depth=50), got "
            f'{module!r}.'
        )
    with static_arguments(arguments):
        network = MMENGINE_MODELS.build({**more, **module})
    take_over_checkpoints(network)
    if patterns is None:
        return make_dynamic(network, family_rule(network, method), arguments)
    plan = pattern_plan(network, patterns, **split_options(arguments)[0])
    return make_dynamic(network, plan, arguments)


@MODELS.register_module()
def KWBackbone(backbone: dict, **arguments: Any) -> nn.Module:
    """The former name of :func:`KWModule`.

    Args:
        backbone: The argument ``module`` of :func:`KWModule`.
        **arguments: The other arguments of :func:`KWModule`.
    """
    return KWModule(backbone, **arguments)

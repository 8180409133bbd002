"""KernelWarehouse for any registered backbone, neck or head."""

from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from ..layers import split_options
from ..registry import MODELS
from ..sharing import family_rule, pattern_plan
from .building import Option, make_dynamic
from .residual import take_over_checkpoints


@MODELS.register_module()
def KWModule(
    module: dict,
    *,
    patterns: Sequence[dict] | None = None,
    cell_num_ratio: Option = 1.0,
    cell_inplane_ratio: Option = 1.0,
    cell_outplane_ratio: Option = 1.0,
    reduction: Option = 1 / 16,
    nonlocal_basis_ratio: Option = 1.0,
    spatial_partition: bool | Sequence[bool] = True,
    attention_norm_cfg: dict | None = None,
    start_tau: float = 0.0,
    freeze_warehouses: bool = True,
    **more: Any,
) -> nn.Module:
    r"""Builds a registered module and makes its layers dynamic: a backbone, a neck or a head.

    The result is of the module's own class, with the names of its state dict: a checkpoint of the
    static module gives it a warm start.

    Args:
        module: Config of the static module, of any library that the config can reach. Its type is
            enough where the wrapper is merged into the static module's own config.
        patterns: Which layers become dynamic, and the warehouse of each: a list of
            ``dict(match=r'layer3\.\d+\.conv2', warehouse='stage3', cell_num_ratio=2)``; see
            :func:`~mmkw.sharing.pattern_plan`. By default the rule of the module's family; see
            :func:`~mmkw.sharing.family_rule`.
        cell_num_ratio: The budget, and the other warehouse options of
            :class:`~mmkw.layers.WarehouseOptions`: each one value, or without patterns one per
            warehouse.
        cell_inplane_ratio: See there.
        cell_outplane_ratio: See there.
        reduction: See there.
        nonlocal_basis_ratio: See there.
        spatial_partition: See there.
        attention_norm_cfg: Norm of the attentions, ``BN1d``, ``SyncBN`` or ``LN``; by default
            SyncBN or BatchNorm where the module has it, else LayerNorm.
        start_tau: See :func:`~mmkw.sharing.convert`.
        freeze_warehouses: See there.
        **more: Arguments of the module, but for those that ``module`` gives.

    Returns:
        The module, of its own class.

    Raises:
        PlanError: If the plan or the options do not fit the module.
        ValueError: If ``start_tau`` is neither 0 nor 1.
        TypeError: If ``module`` is no config.

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
    network = MMENGINE_MODELS.build({**more, **module})
    take_over_checkpoints(network)
    if patterns is None:
        return make_dynamic(network, family_rule(network), arguments)
    plan = pattern_plan(network, patterns, **split_options(arguments)[0])
    return make_dynamic(network, plan, arguments)


@MODELS.register_module()
def KWBackbone(backbone: dict, **arguments: Any) -> nn.Module:
    """The former name of :func:`KWModule`.

    Args:
        backbone: Its ``module``.
        **arguments: Its other arguments.
    """
    return KWModule(backbone, **arguments)

"""KernelWarehouse for any registered backbone, neck or head."""

from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from ..layers import split_options
from ..registry import MODELS
from ..sharing import SharingPlan, convert, family_rule, pattern_plan
from ..sharing.rules import absent_kernels
from .residual import take_over_checkpoints
from .static import attention_norm


@MODELS.register_module()
def KWBackbone(
    backbone: dict,
    *,
    patterns: Sequence[dict] | None = None,
    attention_norm_cfg: dict | None = None,
    start_tau: float = 0.0,
    freeze_warehouses: bool = True,
    **arguments: Any,
) -> nn.Module:
    r"""Builds a registered module and makes its layers dynamic: a backbone, a neck or a head.

    The result is of the module's own class, with the names of its state dict: a checkpoint of the
    static module gives it a warm start.

    Args:
        backbone: Config of the static module, of any library that the config can reach. Its type is
            enough where the wrapper is merged into the static module's own config.
        patterns: Which layers become dynamic, and the warehouse of each: a list of
            ``dict(match=r'layer3\.\d+\.conv2', warehouse='stage3', cell_num_ratio=2)``; see
            :func:`~mmkw.sharing.pattern_plan`. By default the rule of the module's family; see
            :func:`~mmkw.sharing.family_rule`.
        attention_norm_cfg: Norm of the attentions; by default SyncBN or BatchNorm where the module
            has it, else LayerNorm.
        start_tau: See :func:`~mmkw.sharing.convert`.
        freeze_warehouses: The same.
        **arguments: The warehouse options of :class:`~mmkw.layers.WarehouseOptions`; without
            patterns each one value or one per warehouse. The rest are arguments of the module, but
            for those that ``backbone`` gives.

    Raises:
        PlanError: If the plan or the options do not fit the module.
        ValueError: If ``start_tau`` is neither 0 nor 1.
        TypeError: If ``backbone`` is no config.
    """
    if not isinstance(backbone, dict):
        raise TypeError(
            "backbone must be the config of a module, such as dict(type='ResNet', depth=50), got "
            f'{backbone!r}.'
        )
    options, more = split_options(arguments)
    network = MMENGINE_MODELS.build({**more, **backbone})
    take_over_checkpoints(network)
    absent = []
    if patterns is None:
        plan = SharingPlan.make(family_rule(network), **options)
        absent = absent_kernels(network)
    else:
        plan = pattern_plan(network, patterns, **options)
    norm = attention_norm_cfg or attention_norm(network)
    return convert(network, plan, norm, absent, start_tau, freeze_warehouses)

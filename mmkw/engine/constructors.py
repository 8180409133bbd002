"""Gives warehouses the settings of an optimizer that their layers' kernels would get.

Constructors of optimizers choose rates and decays of parameters by names and modules: for example
for ``backbone.layer4``, for depthwise convolutions, or by the depth of a layer. Layers share cells,
so cells have no such name or module. Therefore a constructor runs twice. In the first run static
twins replace the dynamic layers, which shows the settings of every layer's kernel. The second run
is for the network itself.

This works for MMEngine's own constructor and for all derived ones, such as those of mmdet, mmseg
and mmpretrain.

They take one more key in ``paramwise_cfg``: ``attention_lr_mult``, a number of at least 0. The
attentions of dynamic layers learn at so many times the rate that they would have otherwise.
"""

import io
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mmengine.logging import MMLogger, print_log
from torch import nn

if TYPE_CHECKING:
    # At run time, mmengine.optim is still being imported when this module is imported.
    from mmengine.optim import DefaultOptimWrapperConstructor

# The keys of an optimizer's group that are not settings.
_NO_SETTINGS = ('params', 'param_names', 'param_name')
_MANAGER = 'warehouse_manager'


def take_place(theirs: ModuleType) -> None:
    """Makes MMEngine's constructors treat warehouses like the kernels of their layers.

    Args:
        theirs: The module ``mmengine.optim.optimizer.default_constructor``.
    """
    plain = theirs.DefaultOptimWrapperConstructor.__call__

    def __call__(self: 'DefaultOptimWrapperConstructor', model: nn.Module) -> Any:
        # Only the first call of add_params is ours. It removes itself, so that the constructor's
        # own add_params handles all further calls.
        self.add_params = partial(_add_params, self)
        try:
            return plain(self, model)
        finally:
            self.__dict__.pop('add_params', None)

    theirs.DefaultOptimWrapperConstructor.__call__ = __call__


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing is logged meanwhile; without a logger MMEngine prints."""

    def set_disabled(level: int) -> None:
        logging.disable(level)
        # MMEngine's loggers remember which levels are enabled; this has them forget it.
        logger = MMLogger.get_current_instance()
        logger.setLevel(logger.level)

    disabled = logging.root.manager.disable
    set_disabled(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        set_disabled(disabled)


def _add_params(
    constructor: 'DefaultOptimWrapperConstructor', params: list[dict], model: nn.Module
) -> None:
    # Imported here, because these modules import mmengine.optim, which may be incomplete above.
    from ..layers import StandsForStatic, static_twins

    del constructor.add_params
    scale = _attention_scale(constructor)
    if not any(isinstance(module, StandsForStatic) for module in model.modules()):
        constructor.add_params(params, model)
        return
    given: dict[nn.Parameter, list[dict]] = {}
    with static_twins(model, taking_values=False) as twins:
        asked: list[dict] = []
        with _silence():
            constructor.add_params(asked, model)
        settings = {parameter: _settings(g) for g in asked for parameter in g['params']}
        for dynamic, twin in twins.of.items():
            for parameter, own in dynamic.counterparts(twin):
                # A parameter without settings is frozen.
                for counterpart in own if parameter in settings else ():
                    given.setdefault(counterpart, []).append(settings[parameter])
    constructor.add_params(params, model)
    held = {parameter for group in params for parameter in group['params']}
    for name, parameter in model.named_parameters():
        if parameter in given and parameter in held and not _is_named(constructor, name):
            leading = _leading(constructor, name, given[parameter])
            told = ', '.join(f'{key}={value}' for key, value in leading.items()) or 'defaults'
            _regroup(params, name, parameter, leading, f"its layers' {told}")
    if scale != 1:
        _scale_attentions(constructor, params, model, scale)


def _attention_scale(constructor: 'DefaultOptimWrapperConstructor') -> float:
    """What the rates of attentions are multiplied by."""
    scale = constructor.paramwise_cfg.get('attention_lr_mult', 1)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < math.inf:
        raise ValueError(
            f'paramwise_cfg.attention_lr_mult must be a number of at least 0, got {scale!r}.'
        )
    if scale != 1 and constructor.base_lr is None:
        raise ValueError(
            f'paramwise_cfg.attention_lr_mult is {scale}, but optimizer.lr is missing. Give the '
            'rate that it multiplies.'
        )
    return scale


def _scale_attentions(
    constructor: 'DefaultOptimWrapperConstructor',
    params: list[dict],
    model: nn.Module,
    scale: float,
) -> None:
    from ..layers.attention import LayerAttention

    attentions = [module for module in model.modules() if isinstance(module, LayerAttention)]
    own = {parameter for attention in attentions for parameter in attention.parameters()}
    held = {parameter for group in params for parameter in group['params']}
    for name, parameter in model.named_parameters():
        if parameter in own and parameter in held:
            settings = _settings(_group_of(params, parameter))
            settings['lr'] = settings.get('lr', constructor.base_lr) * scale
            told = f'lr={settings["lr"]:g}, by attention_lr_mult'
            _regroup(params, name, parameter, settings, told)


def _settings(group: dict) -> dict:
    return {name: value for name, value in group.items() if name not in _NO_SETTINGS}


def _is_named(constructor: 'DefaultOptimWrapperConstructor', name: str) -> bool:
    """Whether the ``custom_keys`` entry that decides about a parameter names warehouses."""
    keys = (constructor.paramwise_cfg or {}).get('custom_keys', {})
    found = sorted(sorted(key for key in keys if key in name), key=len, reverse=True)
    return bool(found) and _MANAGER in found[0]


def _leading(
    constructor: 'DefaultOptimWrapperConstructor', name: str, given: list[dict]
) -> dict[str, Any]:
    """Selects the settings with the largest rate, then the largest decay, and logs a choice."""

    def rank(settings: dict) -> tuple[float, float]:
        rate = settings.get('lr', constructor.base_lr)
        decay = settings.get('weight_decay', constructor.base_wd)
        return rate or 0.0, decay or 0.0

    leading = max(given, key=rank)
    others = [settings for settings in given if settings != leading]
    if others:
        print_log(
            f'{name}: of its {len(given)} layers {len(others)} are given other settings, such as '
            f'{others[0]}. It takes those with the largest rate: {leading}. For others name it in '
            f"paramwise_cfg=dict(custom_keys={{'{name}': dict(lr_mult=..., decay_mult=...)}})",
            logger='current',
        )
    return leading


def _group_of(params: list[dict], parameter: nn.Parameter) -> dict:
    return next(g for g in params if any(other is parameter for other in g['params']))


def _regroup(
    params: list[dict], name: str, parameter: nn.Parameter, settings: dict, told: str
) -> None:
    """Moves a parameter to a group with these settings. Makes the group if there is none."""
    group = _group_of(params, parameter)
    if _settings(group) == settings:
        return
    print_log(f'paramwise_options -- {name}: {told}, whatever is above', logger='current')
    if len(group['params']) == 1:
        # MMEngine makes one group per parameter. The settings of this group can simply change.
        for key in _settings(group):
            del group[key]
        group.update(settings)
        return
    place = [other is parameter for other in group['params']].index(True)
    del group['params'][place]
    names = group.get('param_names')
    if names:
        del names[place]
    target = next((other for other in params if _settings(other) == settings), None)
    if target is None:
        target = dict(params=[], **settings)
        if names is not None:
            target['param_names'] = []
        params.append(target)
    target['params'].append(parameter)
    if names is not None:
        target['param_names'].append(name)

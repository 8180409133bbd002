"""Gives warehouses, in an optimizer, what their layers were given.

Constructors of optimizers give rates and decays to parameters by their names and their modules:
``backbone.layer4``, depthwise convolutions, the depth of a layer. Cells have neither, since layers
share them. So a constructor is asked twice: once about the static twins of dynamic layers, which
tells what the kernel of every layer would be given; and once about the network itself.

This holds for MMEngine's own constructor and for every one derived from it, as those of mmdet,
mmseg and mmpretrain are.
"""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial, wraps
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

# Of a group of an optimizer, what is no setting of its parameters.
_NO_SETTINGS = ('params', 'param_names')
_MANAGER = 'warehouse_manager'


def install() -> None:
    """Has MMEngine's constructors know warehouses. Calling it again does nothing."""
    plain = DefaultOptimWrapperConstructor.__call__
    if not hasattr(plain, '__wrapped__'):
        DefaultOptimWrapperConstructor.__call__ = _knowing_warehouses(plain)


def _knowing_warehouses(plain: Callable) -> Callable:
    @wraps(plain)
    def construct(constructor: DefaultOptimWrapperConstructor, model: nn.Module) -> Any:
        # For its one call from there; what it calls itself is its own again.
        constructor.add_params = partial(_add_params, constructor)
        try:
            return plain(constructor, model)
        finally:
            constructor.__dict__.pop('add_params', None)

    return construct


def _add_params(
    constructor: DefaultOptimWrapperConstructor, params: list[dict], model: nn.Module
) -> None:
    # Late: the layers are registered with what is below this in the order of imports.
    from ..layers import StandsForStatic, static_twins

    del constructor.add_params
    if not any(isinstance(module, StandsForStatic) for module in model.modules()):
        constructor.add_params(params, model)
        return
    given: dict[nn.Parameter, list[dict]] = {}
    with static_twins(model, taking_values=False) as twins:
        asked: list[dict] = []
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            # Without a logger MMEngine prints.
            with redirect_stdout(io.StringIO()):
                constructor.add_params(asked, model)
        finally:
            logging.disable(disabled)
        settings = {parameter: _settings(g) for g in asked for parameter in g['params']}
        for dynamic, twin in twins.of.items():
            for parameter, own in dynamic.counterparts(twin):
                # Without settings it is frozen.
                for counterpart in own if parameter in settings else ():
                    given.setdefault(counterpart, []).append(settings[parameter])
    constructor.add_params(params, model)
    held = {parameter for group in params for parameter in group['params']}
    for name, parameter in model.named_parameters():
        if parameter in given and parameter in held and not _is_named(constructor, name):
            _regroup(params, name, parameter, _leading(constructor, name, given[parameter]))


def _settings(group: dict) -> dict:
    return {name: value for name, value in group.items() if name not in _NO_SETTINGS}


def _is_named(constructor: DefaultOptimWrapperConstructor, name: str) -> bool:
    """Whether the key that decides about a parameter speaks of warehouses."""
    keys = constructor.paramwise_cfg.get('custom_keys', {})
    found = sorted(sorted(key for key in keys if key in name), key=len, reverse=True)
    return bool(found) and _MANAGER in found[0]


def _leading(
    constructor: DefaultOptimWrapperConstructor, name: str, given: list[dict]
) -> dict[str, Any]:
    """Of the settings of layers those with the largest rate, then the largest decay."""

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


def _regroup(params: list[dict], name: str, parameter: nn.Parameter, settings: dict) -> None:
    """Moves a parameter to a group with the settings, which is made if there is none."""
    (group,) = _holding(params, parameter)
    if _settings(group) == settings:
        return
    given = ', '.join(f'{key}={value}' for key, value in settings.items())
    print_log(
        f"paramwise_options -- {name}: its layers' {given or 'defaults'}, whatever is above",
        logger='current',
    )
    if len(group['params']) == 1:
        # One parameter a group: MMEngine's way.
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


def _holding(params: list[dict], parameter: nn.Parameter) -> Iterator[dict]:
    return (group for group in params if any(other is parameter for other in group['params']))

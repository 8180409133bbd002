"""Checks a checkpoint for all converted parts of a model before any part is loaded.

A converted network refuses a state dict that does not fit. In a model with several parts, earlier
parts would already be loaded then. So the model itself checks all converted parts first, in a hook.
A model gets the hook when a module that is or contains a converted network becomes its submodule.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..checkpoints import only_checking
from ..layers import WarehouseManager
from ..ops import modes

_LOOKS_FIRST = '_checks_converted_parts'


def _notice(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    # A compiler traces this, too, also on modules that are not made yet.
    if modes.is_compiling() or child is None:
        return
    if not (is_converted(child) or _LOOKS_FIRST in child.__dict__):
        return
    if _LOOKS_FIRST not in parent.__dict__:
        parent.__dict__[_LOOKS_FIRST] = True
        parent._register_load_state_dict_pre_hook(_check_parts, with_module=True)


def is_converted(module: nn.Module) -> bool:
    """Whether :func:`~mmkw.sharing.convert` has made a module dynamic.

    Args:
        module: Any module. The answer is no for a dynamic layer, and for a detector of which only
            a part is converted.

    Example:
        >>> detector = torch.nn.ModuleDict(dict(backbone=mmkw.KWResNet(18, base_channels=8)))
        >>> [name for name, part in detector.named_modules() if mmkw.is_converted(part)]
        ['backbone']
    """
    if isinstance(module, torch.jit.ScriptModule):
        # Its submodules are no dictionary, also while it is loaded from a file.
        return False
    # A dynamic layer with its own warehouse has a manager, too, and a static_class.
    manager = module._modules.get('warehouse_manager')
    return isinstance(manager, WarehouseManager) and not hasattr(module, 'static_class')


# Also of converted networks that come from a file, whole.
register_module_module_registration_hook(_notice)


def _check_parts(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *more: Any) -> None:
    """Checks all converted parts; a hook of ``load_state_dict`` that changes nothing."""
    state_dict = _as_translated(model, state_dict, prefix, *more)
    for name, part in model.named_modules():
        # A part with its own _load_from_state_dict may translate names, so it is not checked here.
        if part is model or not is_converted(part) or _reads_itself(part):
            continue
        place = f'{prefix}{name}.'
        own = {key: value for key, value in state_dict.items() if key.startswith(place)}
        with only_checking():
            _run_hooks(part, own, place, *more)


def _as_translated(
    model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *more: Any
) -> dict[str, Tensor]:
    """What the model's hooks after :func:`_check_parts` will make of a state dict.

    mmpretrain's classifiers translate the names of ImageNet files in such a hook.
    """
    hooks = list(model._load_state_dict_pre_hooks.values())
    later = hooks[[hook.hook for hook in hooks].index(_check_parts) + 1 :]
    state_dict = dict(state_dict)
    copies = [list(m) if isinstance(m, list) else m for m in more]
    with only_checking():
        for hook in later:
            hook(state_dict, prefix, *copies)
    return state_dict


def run_hooks_always(network: nn.Module) -> None:
    """Has a network run its hooks of ``load_state_dict``, also where its class leaves them out.

    The class does where it has a ``_load_from_state_dict`` that does nothing, as MMDetection's
    VFNetHead: without its hooks such a network would not know static kernels.

    Args:
        network: Any network; one that reads state dicts in PyTorch's way stays as it is.
    """
    if _reads_itself(network):
        network._load_from_state_dict = partial(_load, network)


def _load(network: nn.Module, state_dict: dict[str, Tensor], prefix: str, *more: Any) -> None:
    ran = []
    handle = network._register_load_state_dict_pre_hook(lambda *_: ran.append(True))
    try:
        type(network)._load_from_state_dict(network, state_dict, prefix, *more)
    finally:
        handle.remove()
    if not ran:
        _run_hooks(network, state_dict, prefix, *more)


def _reads_itself(network: nn.Module) -> bool:
    """Whether the class of a network has its own way to read a state dict."""
    return type(network)._load_from_state_dict is not nn.Module._load_from_state_dict


def _run_hooks(network: nn.Module, state_dict: dict[str, Tensor], prefix: str, *more: Any) -> None:
    for hook in network._load_state_dict_pre_hooks.values():
        hook(state_dict, prefix, *more)

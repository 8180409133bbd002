"""Finds the static network that a KernelWarehouse backbone is made from."""

from mmengine.registry import MODELS, DefaultScope
from torch import nn


def static_network(name: str) -> type[nn.Module]:
    """Finds a backbone class of the library whose config is being built.

    Args:
        name: Registered name, such as ``ResNet``.

    Returns:
        The class of the current default scope (mmdet's in an mmdet config, mmseg's in an mmseg
        config); outside any config mmdet's, or mmseg's where mmdet is not installed.

    Raises:
        ModuleNotFoundError: If no installed library has the backbone.
    """
    current = DefaultScope.get_current_instance()
    scopes = ['mmdet', 'mmseg']
    if current is not None and current.scope_name not in ('mmengine', 'mmkw'):
        scopes.insert(0, current.scope_name)
    for scope in scopes:
        # Without the package MMEngine answers None or, from some releases on, raises.
        try:
            backbone = MODELS.get(f'{scope}.{name}')
        except RuntimeError:
            backbone = None
        if backbone is not None:
            return backbone
    raise ModuleNotFoundError(
        f'No static {name} found in {scopes}. Install a library that has it: '
        "pip install 'mmkw[det]' or pip install 'mmkw[seg]'."
    )

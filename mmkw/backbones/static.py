"""Finds the static network for a KernelWarehouse backbone; its smallest image; its norm."""

from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import Any

from mmengine.registry import MODELS, DefaultScope
from torch import nn

from ..ops import modes


def static_network(name: str) -> type[nn.Module]:
    """Finds a backbone class of the library whose config is being built.

    Args:
        name: Registered name, such as ``ResNet``.

    Returns:
        The class of the current default scope: mmdet's in an mmdet config, mmseg's in an mmseg
        config, mmpretrain's in an mmpretrain config. Outside any config the class of the first of
        these libraries that is installed.

    Raises:
        ModuleNotFoundError: If no installed library has the backbone.
    """
    current = DefaultScope.get_current_instance()
    scopes = ['mmdet', 'mmseg', 'mmpretrain']
    if current is not None and current.scope_name not in ('mmengine', 'mmkw'):
        scopes.insert(0, current.scope_name)
    for scope in scopes:
        # If the package is missing, MMEngine returns None or, in newer releases, raises.
        try:
            backbone = MODELS.get(f'{scope}.{name}')
        except RuntimeError:
            backbone = None
        if backbone is not None:
            return backbone
    raise ModuleNotFoundError(
        f'No static {name} found in {scopes}. Install a library that has it: '
        "pip install 'mmkw[det]', 'mmkw[seg]' or 'mmkw[cls]'."
    )


def check_stages(stages: int, out_indices: Any, frozen_stages: Any) -> None:
    """Checks what names stages of a backbone, before the backbone is built.

    Args:
        stages: How many the backbone has.
        out_indices: The stages whose output is returned, from 0.
        frozen_stages: How many are frozen, -1 for none and not even the stem.

    Raises:
        ValueError: If there is no such stage.
    """
    numbers = range(stages)
    if not isinstance(out_indices, Sequence) or any(i not in numbers for i in out_indices):
        raise ValueError(
            f'out_indices must be a tuple of numbers from 0 to {stages - 1}, got {out_indices!r}.'
        )
    whole = isinstance(frozen_stages, Integral) and not isinstance(frozen_stages, bool)
    if not whole or not -1 <= frozen_stages <= stages:
        raise ValueError(
            f'frozen_stages must be a whole number from -1 to {stages}, got {frozen_stages!r}.'
        )


def refuse_small_images(network: nn.Module, side: int = 4) -> nn.Module:
    """Makes a backbone refuse images that are too small.

    Args:
        network: Backbone for Tensor[batch, channels, height, width]. It gets a forward pre-hook.
        side: The smallest height and width in pixels. By default the stride of a stem.

    Returns:
        The same network. Its forward pass raises ValueError for a smaller image.
    """
    network.register_forward_pre_hook(partial(_check_size, side), with_kwargs=True)
    return network


def _check_size(
    side: int, network: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> None:
    (image,) = inputs or named.values()
    # torch.fx traces without an image size.
    if modes.is_symbolic(image):
        return
    height, width = image.shape[-2:]
    if height < side or width < side:
        raise ValueError(
            f'{type(network).__name__} got an image of {height} x {width} pixels; a side must have '
            f"at least {side}. Resize it, or pad it with the data preprocessor's "
            'size_divisor (MMSegmentation, in its test_cfg) or pad_size_divisor (MMDetection).'
        )

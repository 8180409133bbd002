"""Translates the names of other releases in a state dict, when it is loaded."""

import re
from typing import Any

from torch import Tensor

_CONVNEXT_PARTS = {
    'depthwise_conv': 'dwconv',
    'pointwise_conv1': 'pwconv1',
    'pointwise_conv2': 'pwconv2',
}


def convnext_names(state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Translates a state dict of the original ConvNeXt or of mmpretrain's.

    mmpretrain's names of a block's convolutions become the original names. Pointwise weights of
    linear layers become those of 1x1 convolutions. A layer scale of shape ``(channels,)`` becomes
    ``(1, channels, 1, 1)``.

    Args:
        state_dict: Changed in place.
        prefix: The network's place in the state dict. Other names do not change.
        *_: Other arguments that ``load_state_dict`` passes to a hook; not used.
    """
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        name = re.sub(
            r'\b(depthwise_conv|pointwise_conv1|pointwise_conv2)\b',
            lambda match: _CONVNEXT_PARTS[match[1]],
            key[len(prefix) :],
        )
        if not isinstance(value, Tensor):
            pass  # A later check refuses it and names it.
        elif name.endswith(('pwconv1.weight', 'pwconv2.weight')) and value.dim() == 2:
            value = value[:, :, None, None]
        elif name.endswith('gamma') and value.dim() == 1:
            value = value.view(1, -1, 1, 1)
        state_dict[prefix + name] = value


def mobilenet_v2_names(
    blocks: list[int], nested: bool, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Translates torchvision's names of a MobileNetV2, ``features.I.conv.J``, to the library's.

    Args:
        blocks: Number of blocks in each of the seven groups.
        nested: Whether a block's convolutions are called ``conv.J`` (mmseg) or have names (mmdet).
        state_dict: Changed in place.
        prefix: The network's place in the state dict. Other names do not change.
        *_: Other arguments that ``load_state_dict`` passes to a hook; not used.
    """
    places = ['conv1']
    for group, count in enumerate(blocks):
        places += [f'layer{group + 1}.{block}' for block in range(count)]
    places.append('conv2')
    for key in list(state_dict):
        name = key.removeprefix(f'{prefix}features.')
        number = re.fullmatch(r'[0-9]{1,3}', name.partition('.')[0])
        if not key.startswith(f'{prefix}features.') or number is None:
            continue
        index, _, rest = name.partition('.')
        if int(index) in (0, len(places) - 1):
            translated = _single(rest)
        elif int(index) < len(places):
            translated = _block(rest, 1 if index == '1' else 2, nested)
        else:
            continue
        # Names that are not of a MobileNetV2 stay: a later check lists or refuses them.
        if translated is not None:
            state_dict[f'{prefix}{places[int(index)]}.{translated}'] = state_dict.pop(key)


def _single(name: str) -> str | None:
    """Translates a name in the first or the last feature: convolution ``0`` or its norm ``1``."""
    match = re.fullmatch(r'([01])\.(.+)', name)
    return match and f'{("conv", "bn")[int(match[1])]}.{match[2]}'


def _block(name: str, linear: int, nested: bool) -> str | None:
    """Translates a name in a block.

    Convolution J and its norm are called ``conv.J.0`` and ``conv.J.1``. Only the last convolution,
    of number ``linear``, and its norm are called ``conv.J`` and ``conv.(J + 1)``.
    """
    if match := re.fullmatch(r'conv\.(\d)\.([01])\.(.+)', name):
        number, kind, rest = int(match[1]), int(match[2]), match[3]
    elif match := re.fullmatch(r'conv\.(\d)\.(.+)', name):
        number, kind, rest = linear, int(match[1]) - linear, match[2]
    else:
        return None
    if number > linear or kind not in (0, 1):
        return None
    named = ['expand_conv', 'depthwise_conv', 'linear_conv'][2 - linear :]
    part = f'conv.{number}' if nested else named[number]
    return f'{part}.{("conv", "bn")[kind]}.{rest}'

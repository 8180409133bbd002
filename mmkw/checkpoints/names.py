"""Names of other releases in state dicts, translated to ours in place, on load."""

import re
from typing import Any

from torch import Tensor

_CONVNEXT_PARTS = {
    'depthwise_conv': 'dwconv',
    'pointwise_conv1': 'pwconv1',
    'pointwise_conv2': 'pwconv2',
}


def convnext_names(state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Reads the ConvNeXt of the original release and of mmpretrain.

    mmpretrain's names of a block's convolutions become the original ones, linear pointwise weights
    1x1 convolutions, and a flat layer scale ``(1, channels, 1, 1)``.

    Args:
        state_dict: Changed in place.
        prefix: Names that begin otherwise are left alone.
        *_: What ``load_state_dict`` passes to a hook beyond that.
    """
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        name = re.sub(
            r'\b(depthwise_conv|pointwise_conv1|pointwise_conv2)\b',
            lambda match: _CONVNEXT_PARTS[match[1]],
            key[len(prefix) :],
        )
        if not isinstance(value, Tensor):
            pass  # Refused later, by its name.
        elif name.endswith(('pwconv1.weight', 'pwconv2.weight')) and value.dim() == 2:
            value = value[:, :, None, None]
        elif name.endswith('gamma') and value.dim() == 1:
            value = value.view(1, -1, 1, 1)
        state_dict[prefix + name] = value


def mobilenet_v2_names(
    blocks: list[int], nested: bool, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Reads a MobileNetV2 named as by torchvision, ``features.I.conv.J``, as mmdet or mmseg do.

    Args:
        blocks: Blocks in each of the seven groups.
        nested: Whether a block's convolutions are ``conv.J`` (mmseg) or have names (mmdet).
        state_dict: Changed in place.
        prefix: Names that begin otherwise are left alone.
        *_: What ``load_state_dict`` passes to a hook beyond that.
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
        # What MobileNetV2 does not have stays, to be listed or refused.
        if translated is not None:
            state_dict[f'{prefix}{places[int(index)]}.{translated}'] = state_dict.pop(key)


def _single(name: str) -> str | None:
    """The first and the last feature: a convolution ``0`` and its norm ``1``."""
    match = re.fullmatch(r'([01])\.(.+)', name)
    return match and f'{("conv", "bn")[int(match[1])]}.{match[2]}'


def _block(name: str, linear: int, nested: bool) -> str | None:
    """A block: convolution J and its norm are ``conv.J.0`` and ``conv.J.1``.

    Only those of the last, the ``linear`` one, are ``conv.J`` and ``conv.(J + 1)``.
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

"""Names of other releases in state dicts, translated to ours in place, on load."""

import re
from typing import Any

from torch import Tensor

_CONVNEXT_PARTS = {
    'depthwise_conv': 'dwconv',
    'pointwise_conv1': 'pwconv1',
    'pointwise_conv2': 'pwconv2',
}


def convnext_names(state_dict: dict[str, Tensor], prefix: str) -> None:
    """Reads the ConvNeXt of the original release and of mmpretrain.

    mmpretrain's names of a block's convolutions become the original ones, linear pointwise weights
    1x1 convolutions, and a flat layer scale ``(1, channels, 1, 1)``.

    Args:
        state_dict: Changed in place.
        prefix: Names that begin otherwise are left alone.
    """
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        name = re.sub(
            r'\b(depthwise_conv|pointwise_conv1|pointwise_conv2)\b',
            lambda match: _CONVNEXT_PARTS[match[1]],
            key[len(prefix) :],
        )
        if name.endswith(('pwconv1.weight', 'pwconv2.weight')) and value.dim() == 2:
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
    pattern = re.compile(re.escape(prefix) + r'features\.(\d+)\.(.+)')
    for key in list(state_dict):
        match = pattern.fullmatch(key)
        if match is None or int(match[1]) >= len(places):
            continue
        index, rest = int(match[1]), match[2]
        if index in (0, len(places) - 1):
            part, rest = '', rest
        else:
            # The convolutions of a block with their norm: nested, but for the last.
            last = 1 if index == 1 else 2
            number, _, rest = rest.removeprefix('conv.').partition('.')
            if int(number) >= last:
                part, rest = last, f'{int(number) - last}.{rest}'
            else:
                part = int(number)
            named = ['expand_conv', 'depthwise_conv', 'linear_conv'][2 - last :]
            part = f'.conv.{part}' if nested else f'.{named[part]}'
        kind, _, rest = rest.partition('.')
        state_dict[f'{prefix}{places[index]}{part}.{("conv", "bn")[int(kind)]}.{rest}'] = (
            state_dict.pop(key)
        )

"""The paper's rules: from the module names of a static network to pairs (layer, warehouse)."""

import re

from torch import nn

from ..layers import DYNAMIC_LAYERS

_RESNET_LAYER = re.compile(r'layer(\d+)\.(\d+)\.(conv\d+|downsample\.\d+)')


def resnet_rule(network: nn.Module) -> list[tuple[str, str]]:
    """One warehouse per stage of a ResNet; the stem is static (paper, section 4.1).

    The first block of a later stage hands its conv1 and its downsample convolution to the warehouse
    of the stage before. In the first stage these two are static where blocks are bottlenecks. Only
    plain convolutions are named: one that ``dcn`` made deformable stays as it is.

    Args:
        network: A ResNet with the module names that torchvision, mmdet and mmseg share.

    Returns:
        Pairs of layer and warehouse (``stage0`` to ``stage3``) in module order.
    """
    pairs = []
    for name, module in network.named_modules():
        match = _RESNET_LAYER.fullmatch(name)
        if match is None or type(module) not in DYNAMIC_LAYERS:
            continue
        stage, block, part = int(match[1]) - 1, int(match[2]), match[3]
        if block == 0 and (part == 'conv1' or part.startswith('downsample')):
            bottleneck = hasattr(network.get_submodule(f'layer{match[1]}.0'), 'conv3')
            if stage == 0 and bottleneck:
                continue
            stage = max(stage - 1, 0)
        pairs.append((name, f'stage{stage}'))
    return pairs

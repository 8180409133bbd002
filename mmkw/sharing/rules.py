"""The paper's rules: they make pairs of layer and warehouse from a static network's module names.

Stages count from 1, as in the paper, whatever the module names are.
"""

import itertools
import re

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..layers import KernelShape, PlanError, dynamic_class, kernel_shape
from ..layers.partition import KERNELWAREHOUSE, is_comparator

# The general rule leaves layers with fewer channels static: they take the image as their input, or
# make predictions.
MIN_CHANNELS = 16
# Res2Net has several 3x3 convolutions ``convs`` instead of conv2.
_RESNET_LAYER = re.compile(r'layer(\d+)\.(\d+)\.(conv\d+|convs\.\d+|downsample\.\d+)')


def resnet_rule(network: nn.Module, method: str = KERNELWAREHOUSE) -> list[tuple[str, str]]:
    """One warehouse per stage of a ResNet; the stem is static (paper, section 4.1).

    In the first block of a stage, conv1 and the downsample convolution belong to the warehouse of
    the stage before. In stage 1 these two are static if the blocks are bottlenecks, and else belong
    to stage 1. The rule names plain convolutions only, so convolutions that ``dcn`` makes
    deformable do not change. If ``num_stages`` leaves out later stages, the rule also names these
    two convolutions of the next stage, as absent kernels: their cells are in the published
    warehouses. See :func:`absent_kernels`.

    A comparator shares nothing. There the first block of stage 1 is as all others. The downsample
    convolutions are dynamic, but not those of ``odconv``: so its networks have the parameters of
    their papers, and take the authors' files.

    Args:
        network: A ResNet with the module names that torchvision, mmdet and mmseg share.
        method: As in :class:`~mmkw.layers.WarehouseOptions`.

    Returns:
        Pairs of layer and warehouse (``stage1`` to ``stage4``) in module order.
    """
    pairs = []
    for name, module in network.named_modules():
        match = _RESNET_LAYER.fullmatch(name)
        if match is None or dynamic_class(module) is None:
            continue
        stage, block, part = int(match[1]), int(match[2]), match[3]
        if is_comparator(method):
            if method != 'odconv' or not part.startswith('downsample'):
                pairs.append((name, name))
            continue
        if block == 0 and (part == 'conv1' or part.startswith('downsample')):
            bottleneck = hasattr(network.get_submodule(f'layer{match[1]}.0'), 'conv3')
            if stage == 1 and bottleneck:
                continue
            stage = max(stage - 1, 1)
        pairs.append((name, f'stage{stage}'))
    refuse_nothing(network, pairs)
    if is_comparator(method):
        return pairs
    last = pairs[-1][1]
    return pairs + [(kernel.layer, last) for kernel in absent_kernels(network)]


def absent_kernels(network: nn.Module) -> list[KernelShape]:
    """Kernels of the paper's network that a variant lacks, and whose cells it keeps.

    The variant has other layers of the same warehouse. So this warehouse has as many cells as in
    the whole network, and loads checkpoints of the whole network. See ``absent`` in
    :func:`~mmkw.sharing.convert`.

    Args:
        network: A static network.

    Returns:
        For a ResNet or ResNeXt with fewer than four stages: the conv1 and the downsample
        convolution of the next stage. For mmseg's MobileNetV2: the last convolution. Else nothing.
    """
    name = type(network).__name__
    if name == 'MobileNetV2' and hasattr(network, 'layer7') and not hasattr(network, 'conv2'):
        convolutions = [m for m in network.layer7.modules() if isinstance(m, nn.Conv2d)]
        out_channels = int(1280 * max(1.0, network.widen_factor))
        return [KernelShape('conv2.conv', out_channels, convolutions[-1].out_channels, (1, 1))]
    if name in _RESNETS and hasattr(network, 'make_res_layer') and network.num_stages < 4:
        return _next_stage(network)
    return []


_RESNETS = ('ResNet', 'ResNeXt', 'ResNetV1c', 'ResNetV1d')


def _next_stage(network: nn.Module) -> list[KernelShape]:
    number = network.num_stages + 1
    if hasattr(network, 'inplanes'):
        channels = dict(
            inplanes=network.inplanes, planes=network.base_channels * 2**network.num_stages
        )
    else:
        # mmpretrain's ResNet.
        last = getattr(network, network.res_layers[-1])[-1]
        channels = dict(in_channels=last.out_channels, out_channels=2 * last.out_channels)
    with torch.device('meta'):
        stage = network.make_res_layer(
            **channels,
            block=network.block,
            num_blocks=1,
            stride=2,
            dilation=1,
            style=network.style,
            avg_down=network.avg_down,
            conv_cfg=network.conv_cfg,
            norm_cfg=network.norm_cfg,
        )
    convolutions = [stage[0].conv1, *stage[0].downsample]
    return [
        kernel_shape(f'layer{number}.0.{name}', layer)
        for name, layer in stage[0].named_modules()
        if layer in convolutions and dynamic_class(layer)
    ]


def layers_with_kernels(network: nn.Module) -> dict[str, nn.Module]:
    """All layers with a weight of two or more dimensions, by name. Lazy ones have none yet.

    Args:
        network: A static network.
    """
    weights = {
        name: (module, getattr(module, 'weight', None)) for name, module in network.named_modules()
    }
    return {
        name: module
        for name, (module, weight) in weights.items()
        if weight is not None and not is_lazy(weight) and weight.dim() > 1
    }


def refuse_nothing(network: nn.Module, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Checks that a rule has found at least one layer.

    Args:
        network: A static network.
        pairs: The pairs that the rule has found.

    Returns:
        The same pairs.

    Raises:
        PlanError: If there are no pairs. The message names some layers of the network.
    """
    if pairs:
        return pairs
    for name, module in network.named_modules():
        if any(map(is_lazy, module._parameters.values())):
            raise PlanError(
                f'{type(network).__name__} has no layer that could be dynamic: the size of {name}, '
                f'a {type(module).__name__}, is not known yet. Call the network once before.'
            )
    some = itertools.islice(layers_with_kernels(network).items(), 4)
    found = ', '.join(f'{name} is a {_kind(layer)}' for name, layer in some)
    raise PlanError(
        f'{type(network).__name__} has no layer that could be dynamic: '
        f'{found or "it has no kernel"}. Only plain convolutions and linear layers can, without '
        f'conv_cfg, dcn or other kinds; where no rule of the paper holds, those of at least '
        f'{MIN_CHANNELS} channels whose attention, if theirs alone, has at most a fourth of the '
        "kernel's parameters. Name others by patterns or in a SharingPlan."
    )


def _kind(layer: nn.Module) -> str:
    """The class of a layer with the channels of its kernel."""
    return f'{type(layer).__name__} of {"x".join(map(str, layer.weight.shape[:2]))} channels'


# The names of the original release and of mmpretrain, of timm, and of torchvision, each with the
# stage. Pointwise layers may be linear.
_CONVNEXT_STEM = re.compile(r'downsample_layers\.0\.0|stem\.0|features\.0\.0')
_CONVNEXT_DOWNSAMPLE = re.compile(
    r'downsample_layers\.(?P<original>[1-9])\.\d+'
    r'|stages\.(?P<timm>\d+)\.downsample\.\d+'
    r'|features\.(?P<torchvision>[246])\.\d+'
)
_CONVNEXT_DEPTHWISE = re.compile(
    r'stages\.(?P<original>\d+)\.\d+\.(?:dwconv|depthwise_conv)'
    r'|stages\.(?P<timm>\d+)\.blocks\.\d+\.conv_dw'
    r'|features\.(?P<torchvision>[1357])\.\d+\.block\.0'
)
_CONVNEXT_POINTWISE = re.compile(
    r'stages\.(?P<original>\d+)\.\d+\.(?:pwconv|pointwise_conv)[12]'
    r'|stages\.(?P<timm>\d+)\.blocks\.\d+\.mlp\.fc[12]'
    r'|features\.(?P<torchvision>[1357])\.\d+\.block\.[35]'
)


def convnext_rule(network: nn.Module) -> list[tuple[str, str]]:
    """All convolutions of a ConvNeXt are dynamic (paper, section 4.1).

    The stem has its own warehouse, and so has every downsampling convolution. A stage has one
    warehouse for its depthwise convolutions and one for its pointwise convolutions. The convolution
    of ``downsample2`` comes before ``stage2``.

    Args:
        network: A ConvNeXt with the module names of the original release, mmpretrain, timm or
            torchvision.

    Returns:
        Pairs of layer and warehouse in module order.
    """
    pairs = []
    for name, module in network.named_modules():
        if dynamic_class(module) is None:
            continue
        if _CONVNEXT_STEM.fullmatch(name):
            pairs.append((name, 'stem'))
        elif match := _CONVNEXT_DOWNSAMPLE.fullmatch(name):
            pairs.append((name, f'downsample{_convnext_stage(match)}'))
        elif match := _CONVNEXT_DEPTHWISE.fullmatch(name):
            pairs.append((name, f'stage{_convnext_stage(match)}_depthwise'))
        elif match := _CONVNEXT_POINTWISE.fullmatch(name):
            pairs.append((name, f'stage{_convnext_stage(match)}_pointwise'))
    return pairs


def _convnext_stage(match: re.Match) -> int:
    """The stage, from 1. In torchvision's names the stages are every other part of ``features``."""
    number = int(match[match.lastgroup or 0])
    return number // 2 + 1 if match.lastgroup == 'torchvision' else number + 1


# How the pointwise convolutions of a MobileNetV2 share: the paper's 1x, 4x and 1/2x.
POINTWISE = ('joint', 'separate', 'last_stage')
# The stage of each of the seven groups of blocks.
_MOBILENET_STAGES = (1, 2, 3, 4, 5, 6, 6)
# The names of mmdet, mmseg and mmpretrain, and those of torchvision, which counts the blocks.
_MOBILENET_LAYER = re.compile(
    r'layer(?P<group>\d+)\.(?P<block>\d+)\.(?:conv\.\d+|\w+_conv)\.conv'
    r'|features\.(?P<number>\d+)\.conv\.\d+(?P<inner>\.0)?'
)
_MOBILENET_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
_MOBILENET_PLACES = [
    (group, block) for group, blocks in enumerate(_MOBILENET_BLOCKS) for block in range(blocks)
]


def mobilenet_v2_rule(
    network: nn.Module, pointwise: str, method: str = KERNELWAREHOUSE
) -> list[tuple[str, str]]:
    """The sharing of a MobileNetV2 (paper, section 4.1).

    The stem has its own warehouse; with ``odconv`` it is static, as in its authors' files. The
    seven groups of blocks form stages 1 to 6: the last two groups are both in stage 6. But the
    first block of every group belongs to the stage of the group before. A stage has one warehouse
    for its depthwise convolutions. The last 1x1 convolution belongs to the projections of the last
    stage. The rule names this convolution also if the network lacks it (mmseg), because its cells
    are in the published warehouses; see :func:`absent_kernels`.

    Args:
        network: The MobileNetV2 of mmdet, mmseg, mmpretrain or torchvision.
        pointwise: How pointwise convolutions share. ``joint``: the expansions and projections of a
            stage share one warehouse (the paper's 1x). ``separate``: expansions share one warehouse
            and projections another (4x). ``last_stage``: as ``separate``, but only the last stage
            is dynamic (1/2x).
        method: As in :class:`~mmkw.layers.WarehouseOptions`.

    Returns:
        Pairs of layer and warehouse in module order. None if the network has other names, or
        another number of blocks.

    Raises:
        ValueError: If ``pointwise`` is none of these.
    """
    if pointwise not in POINTWISE:
        raise ValueError(
            f"pointwise must be 'joint', 'separate' or 'last_stage', got {pointwise!r}."
        )
    last = _MOBILENET_STAGES[-1]

    def warehouse(stage: int, kind: str) -> str | None:
        if kind == 'depthwise':
            return f'stage{stage}_depthwise'
        if pointwise == 'joint':
            return f'stage{stage}_pointwise'
        return f'stage{stage}_{kind}' if pointwise == 'separate' or stage == last else None

    stem, end = 'conv1.conv', 'conv2.conv'
    if hasattr(network, 'features'):
        stem, end = 'features.0.0', f'features.{len(_MOBILENET_PLACES) + 1}.0'
        if len(network.features) != len(_MOBILENET_PLACES) + 2:
            return []
    pairs: list[tuple[str, str | None]] = []
    for name, module in network.named_modules():
        match = _MOBILENET_LAYER.fullmatch(name)
        if dynamic_class(module) is None or name == end:
            continue
        if name == stem:
            if method != 'odconv':
                pairs.append((name, 'stem'))
        elif match is not None:
            if match['number']:
                group, block = _MOBILENET_PLACES[int(match['number']) - 1]
                projects = not match['inner']
            else:
                group, block = int(match['group']) - 1, int(match['block'])
                # The ConvModule of a projection has no activation.
                projects = not network.get_submodule(name.rpartition('.')[0]).with_activation
            stage = _MOBILENET_STAGES[max(group - 1, 0) if block == 0 else group]
            kind = 'projection' if projects else 'expansion'
            pairs.append((name, warehouse(stage, 'depthwise' if module.groups > 1 else kind)))
    if pairs:
        pairs.append((end, warehouse(last, 'projection')))
    return [(layer, home) for layer, home in pairs if home is not None]

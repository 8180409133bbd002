"""Decides which layers of a network share a warehouse: family rules, and a general rule."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from torch import nn

from ..checkpoints.static_kernels import stage_of
from ..layers import PlanError, StandsForStatic, WarehouseOptions, dynamic_class, kernel_shape
from ..layers.attention import attention_width
from ..layers.partition import KERNELWAREHOUSE, is_comparator, partition_warehouse
from ..layers.static_layers import predictions, used_by_others
from .rules import (
    MIN_CHANNELS,
    absent_kernels,
    convnext_rule,
    mobilenet_v2_rule,
    refuse_nothing,
    resnet_rule,
)
from .value_projection import fused_projections

LOGGER = logging.getLogger('mmkw')

# The general rule leaves a layer static if its attention has more parameters than this part of its
# kernel. The layer is counted as if it had its own warehouse.
MAX_OWN_OVERHEAD = 0.25
# A warehouse is split if its attentions have more parameters than this multiple of its cells', at a
# budget of 1.
MAX_OVERHEAD = 1.0
# A rule that makes a smaller part of a network's kernels dynamic says so in the log.
ENOUGH = 0.5


def plannable_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of a network that can be dynamic, by name, in module order.

    A value projection inside a fused projection ``NAME`` is included as ``NAME.value``. A layer
    that others use as it is, is not included; see
    :func:`~mmkw.layers.static_layers.used_by_others`.

    Args:
        network: A static network.
    """
    layers = {}
    fused = fused_projections(network)
    used = used_by_others(network)
    inside: tuple[str, ...] = ()
    for name, module in network.named_modules():
        if isinstance(module, StandsForStatic):
            # A part of the network is converted: what is in its dynamic layers is theirs.
            inside = (f'{name}.', *inside)
        if name in used or name.startswith(inside):
            continue
        if name in fused:
            channels = module.embed_dim if hasattr(module, 'embed_dim') else module.in_features
            layers[f'{name}.value'] = nn.Linear(channels, channels, device='meta')
        elif dynamic_class(module):
            layers[name] = module
    return layers


def family_rule(network: nn.Module, method: str = KERNELWAREHOUSE) -> list[tuple[str, str]]:
    """Finds the warehouse of every layer, by the rule of the network's family or a general rule.

    ResNets (also derived classes: ResNeXt, Res2Net, RegNet), ConvNeXt and MobileNetV2 share as in
    the paper. In transformers (ViT, BEiT, Swin, MiT) the value projections of a stage share one
    warehouse, and the MLPs of a stage share another. The layers of a ViT are divided into four
    stages.

    The general rule is for all other networks. There a stage is the part of a layer's name up to
    the first number. A stage has one warehouse for convolutions, one for grouped convolutions and
    one for linear layers. This rule leaves the predictions of heads static
    (:func:`~mmkw.layers.static_layers.predictions`). It also leaves layers with fewer than 16
    channels static, and layers whose kernel is too small for an attention (most depthwise ones).

    All rules leave a layer static if others use it as it is: if another module reads or shares its
    weight, or if a plain list holds it.
    Warehouses whose cells would be too small are split; see :func:`split_groups`. A rule that makes
    less than half of the kernels dynamic says so in the log.

    With another method the same layers are dynamic, as far as the method has a layer for them, and
    each has a warehouse of its own. ResNets and MobileNetV2 differ a little; see
    :func:`resnet_rule` and :func:`mobilenet_v2_rule`.

    Args:
        network: A static network.
        method: As in :class:`~mmkw.layers.WarehouseOptions`.

    Returns:
        Pairs of layer and warehouse in module order.
    """
    layers = plannable_layers(network)
    families = _families_of(network)
    rule = _FAMILIES[families[0]] if families else _general_rule
    if rule in (resnet_rule, _mobilenet_v2_rule):
        rule = partial(rule, method=method)
    # A network may have only its class's name in common with its family.
    pairs = refuse_nothing(network, rule(network) or _general_rule(network))
    if is_comparator(method):
        pairs = [
            (name, name)
            for name, _ in pairs
            if name in layers and dynamic_class(layers[name], method)
        ]
        if not pairs:
            raise PlanError(
                f'{type(network).__name__}: the rule makes no Conv2d dynamic, and '
                f'method={method!r} has no layer for others. Name some by patterns or in a '
                f'SharingPlan, or take method={KERNELWAREHOUSE!r}.'
            )
    _tell_of_little(network, pairs, layers)
    if is_comparator(method):
        return pairs
    absent = {
        kernel.layer: nn.Conv2d(
            kernel.in_channels,
            kernel.out_channels,
            kernel.kernel_size,  # type: ignore[arg-type]
            device='meta',
        )
        for kernel in absent_kernels(network)
    }
    pairs = split_groups(pairs, {**layers, **absent})
    # After the split, a warehouse may hold absent kernels alone. No layer would mix its cells.
    mixed = {warehouse for name, warehouse in pairs if name not in absent}
    return [(name, warehouse) for name, warehouse in pairs if warehouse in mixed]


def _tell_of_little(
    network: nn.Module, pairs: list[tuple[str, str]], layers: Mapping[str, nn.Module]
) -> None:
    """Writes a warning if a rule leaves most of the kernels static."""
    found = dict(pairs)
    values = {name: layer.weight.numel() for name, layer in layers.items()}
    part = sum(values[name] for name in found if name in values) / sum(values.values())
    if part < ENOUGH:
        largest = max((name for name in values if name not in found), key=values.__getitem__)
        LOGGER.warning(
            f'{type(network).__name__}: the rule makes {len(found)} of {len(layers)} layers '
            f'dynamic, {part:.0%} of the kernels. The largest that it leaves static is {largest}. '
            'Name others by patterns.'
        )


def is_of_the_paper(network: nn.Module) -> bool:
    """Whether the paper has a network of this family: ResNet, ConvNeXt or MobileNetV2.

    Args:
        network: A static network.
    """
    rules = {_FAMILIES[name] for name in _families_of(network)}
    return bool(rules & {resnet_rule, convnext_rule, _mobilenet_v2_rule})


def _families_of(network: nn.Module) -> list[str]:
    return [parent.__name__ for parent in type(network).__mro__ if parent.__name__ in _FAMILIES]


def split_groups(
    pairs: Iterable[tuple[str, str]], layers: Mapping[str, nn.Module]
) -> list[tuple[str, str]]:
    """Splits warehouses whose cells would be too small.

    The channels of a cell are the greatest common divisor of the layers' channels. If the divisor
    is small, there are many cells, and every mixture attends to all of them. A warehouse is split
    if its attentions have more parameters than its cells. First it is split by the shapes of its
    kernels. Shapes that fit together are joined again. If one shape still has too many layers,
    these are split into runs of layers.

    Args:
        pairs: Pairs of layer and warehouse in module order.
        layers: The static layers.

    Returns:
        The pairs in the same order. The names of split warehouses end with a number.
    """
    pairs = list(pairs)
    groups: dict[str, list[str]] = {}
    for layer, warehouse in pairs:
        groups.setdefault(warehouse, []).append(layer)
    home: dict[str, str] = {}
    for warehouse, members in groups.items():
        parts = _split([member for member in members if member in layers], layers)
        for number, part in enumerate(parts, 1):
            name = warehouse if len(parts) == 1 else f'{warehouse}_{number}'
            home |= dict.fromkeys(part, name)
    return [(layer, home[layer]) for layer, _ in pairs if layer in home]


def attention_overhead(members: Sequence[str], layers: Mapping[str, nn.Module]) -> float:
    """Parameters of the attentions of layers that share a warehouse, relative to its cells.

    Args:
        members: Names of the layers.
        layers: The static layers.
    """
    kernels = [kernel_shape(name, layers[name]) for name in members]
    options = WarehouseOptions()
    try:
        partition = partition_warehouse('', kernels, options)
    except PlanError:
        # There would be too many cells.
        return math.inf
    weights = 0.0
    for share in partition.layers:
        groups = getattr(layers[share.kernel.layer], 'groups', 1)
        width = attention_width(share.kernel.in_channels * groups, options)
        weights += share.num_mixtures * (partition.num_cells + 1) * width
    return weights / (partition.num_cells * math.prod(partition.cell_shape))


def _split(members: list[str], layers: Mapping[str, nn.Module]) -> list[list[str]]:
    dims = {layers[name].weight.dim() for name in members}
    if len(members) < 2 or (len(dims) == 1 and attention_overhead(members, layers) <= MAX_OVERHEAD):
        return [members] if members else []
    shapes: dict[tuple, list[str]] = {}
    for name in members:
        shapes.setdefault(tuple(layers[name].weight.shape), []).append(name)
    if len(shapes) == 1:
        half = len(members) // 2
        return _split(members[:half], layers) + _split(members[half:], layers)
    joined: list[list[str]] = []
    for part in (part for same in shapes.values() for part in _split(same, layers)):
        for other in joined:
            fits = layers[other[0]].weight.dim() == layers[part[0]].weight.dim()
            if fits and attention_overhead(other + part, layers) <= MAX_OVERHEAD:
                other += part
                break
        else:
            joined.append(list(part))
    order = {name: place for place, name in enumerate(members)}
    return sorted(
        (sorted(part, key=order.__getitem__) for part in joined), key=lambda part: order[part[0]]
    )


def _general_rule(network: nn.Module) -> list[tuple[str, str]]:
    pairs = []
    predicting = predictions(network)
    for name, layer in plannable_layers(network).items():
        if name in predicting:
            continue
        shape = kernel_shape(name, layer)
        groups = getattr(layer, 'groups', 1)
        if shape.out_channels < MIN_CHANNELS or shape.in_channels * groups < MIN_CHANNELS:
            continue
        if attention_overhead([name], {name: layer}) > MAX_OWN_OVERHEAD:
            continue
        kind = 'linear' if isinstance(layer, nn.Linear) else 'grouped' if groups > 1 else 'conv'
        pairs.append((name, f'{_stage(name)}_{kind}'))
    return pairs


def _stage(name: str) -> str:
    """The first parts of a name, up to the first part with a number."""
    *parents, _ = name.split('.')
    stage = stage_of('.'.join(parents)) or (parents[0] if parents else 'network')
    return stage.replace('.', '_')


_VALUE_OR_MLP = re.compile(
    r'(.+?)\.(?:(attn|ga|self_attention)\b.*\.value|ffn\..+|mlp\.(?:fc\d|\d))'
)


def _transformer_rule(network: nn.Module) -> list[tuple[str, str]]:
    found = []
    for name, layer in plannable_layers(network).items():
        match = _VALUE_OR_MLP.fullmatch(name)
        # MiT's MLP has a depthwise convolution, which does not share with linear layers.
        if match is None or getattr(layer, 'groups', 1) > 1:
            continue
        found.append((name, match[1], 'value' if match[2] else 'mlp'))
    blocks = list(dict.fromkeys(block for _, block, _ in found))
    stages = {block: _stage(f'{block}.') for block in blocks}
    if len(set(stages.values())) == len(blocks):
        # The network has blocks but no stages. It gets four, because feature pyramids take four.
        stages = {block: f'stage{4 * i // len(blocks) + 1}' for i, block in enumerate(blocks)}
    return [(name, f'{stages[block]}_{kind}') for name, block, kind in found]


def _mobilenet_v2_rule(network: nn.Module, method: str = KERNELWAREHOUSE) -> list[tuple[str, str]]:
    return mobilenet_v2_rule(network, 'joint', method)


# The rule of a network's class, or of its nearest base class.
_FAMILIES: dict[str, Callable[[nn.Module], list[tuple[str, str]]]] = {
    'ResNet': resnet_rule,
    'ConvNeXt': convnext_rule,
    'MobileNetV2': _mobilenet_v2_rule,
    'SwinTransformer': _transformer_rule,
    'VisionTransformer': _transformer_rule,
    'BEiT': _transformer_rule,
    'MixVisionTransformer': _transformer_rule,
}

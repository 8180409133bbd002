"""Finds the layers that should stay static."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from torch import nn


def predictions(network: nn.Module) -> set[str]:
    """The layers that make the predictions of heads.

    A head is a module whose class name, or the name of a base class, ends with ``Head``, or is one
    of those in torchvision and Ultralytics. Its hidden layers are:

    - layers of an ``FFN``, or of a ``ConvModule`` with a norm or an activation;
    - layers of a list named ``...fcs``, and layers named ``..._conv``;
    - layers with an activation or a norm after them in a ``Sequential``, or with a ``bn`` beside
      them.

    All other layers of a head predict. Elsewhere the last layer of a classifier predicts: a module
    of the network itself that is called ``fc``, ``head`` or the like. The channels of a prediction
    are classes, anchors or coordinates. They are too few to share, and the next training may have
    others.

    Args:
        network: Any network, static or dynamic.

    Returns:
        Names of modules.

    Example:
        >>> head = dict(type='mmdet.RetinaHead', num_classes=80, in_channels=256)
        >>> sorted(predictions(MODELS.build(head)))
        ['retina_cls', 'retina_reg']
    """
    found: set[str] = set()
    for name, module in network.named_modules():
        if _has_kernel(module):
            around = list(_around(network, name))
            in_head = any(map(is_head, around))
            if in_head and not any(map(_is_hidden, around)) and not _goes_on(name, around[-1]):
                found.add(name)
    return found | _of_classifier(network)


# What torchvision, timm and Ultralytics call the modules at the end of a classifier.
_CLASSIFIERS = ('fc', 'classifier', 'head', 'heads', 'head_dist', 'last_linear')


def _of_classifier(network: nn.Module) -> set[str]:
    """The last layer of every module of a network that is named as a classifier."""
    found = {}
    for name, module in network.named_modules():
        if name.split('.')[0] in _CLASSIFIERS and _has_kernel(module):
            found[name.split('.')[0]] = name
    return set(found.values())


def _has_kernel(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or hasattr(module, 'cells')


def _around(network: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that contain a module, the network first."""
    module = network
    for part in name.split('.'):
        yield module
        module = getattr(module, part)


def is_head(module: nn.Module) -> bool:
    """Whether a module is a head of a detector or segmentor, by the name of its class.

    Args:
        module: Any module.
    """
    # The last three are of torchvision's detectors and of Ultralytics.
    return _is_named(module, 'Head', 'Predictor', 'Detect', 'Classify')


def _is_named(module: nn.Module, *endings: str) -> bool:
    return any(parent.__name__.endswith(endings) for parent in type(module).__mro__)


def _is_hidden(module: nn.Module) -> bool:
    ends = getattr(module, 'with_norm', False) or getattr(module, 'with_activation', False)
    return _is_named(module, 'FFN') or (_is_named(module, 'ConvModule') and ends)


def _goes_on(name: str, parent: nn.Module) -> bool:
    """Whether more layers follow, by the name of a layer or by what comes next in its parent."""
    *before, last = name.split('.')
    if last.endswith('_conv') or any(part.endswith('fcs') for part in before):
        return True
    if last == 'conv' and 'bn' in parent._modules:
        return True
    if not isinstance(parent, nn.Sequential):
        return False
    follower = parent._modules.get(str(int(last) + 1)) if last.isdigit() else None
    # Activations and norms have no parameters of two dimensions; other layers have.
    return follower is not None and all(p.dim() < 2 for p in follower.parameters())


# The layers of PyTorch's transformers, which by default take Tensor[sequence, batch, channels].
_OF_SEQUENCES = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# Methods that give modules Tensor[decoder layers, images, queries, channels], and these modules.
_OF_STACKS = {'DETRHead.forward': ('reg_ffn',), 'MaskFormerHead.forward': ('mask_embed',)}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Attributes of every module, which hold what belongs to PyTorch.
_OF_TORCH = frozenset(vars(nn.Module()))


def used_by_others(network: nn.Module) -> dict[str, str]:
    """The layers that others than their parent's call use, so that they have to stay as they are.

    The weight of some is read by their parent module in the forward pass, as BEiT's attention does
    with that of its ``qkv``: a dynamic layer has no weight, but one kernel per image. Others share
    their weight with another module, as a decoder and an embedding do. And some are held beside
    the modules, as in a list in Detectron2's FPN, which calls them from there. Transformers of
    PyTorch and others may have the images second, beside an attention that has them so, and so have
    heads that get the results of all layers of a decoder at once; a linear layer would take the
    images for what it averages.

    Args:
        network: A static network.

    Returns:
        A dict from the layer's name to a sentence that says who uses it.
    """
    found, owner_of, keeper_of = {}, dict[nn.Parameter, str](), _of_sequences(network)
    for name, module in network.named_modules():
        kind, place = type(module), f'{name}.'.lstrip('.')
        reads = _weights_read(kind)  # type: ignore[arg-type]
        stacks = _OF_STACKS.get(getattr(kind.forward, '__qualname__', ''), ())
        for part, _ in module.named_modules() if reads or stacks else ():
            if part in reads:
                found[place + part] = f'{kind.__name__} computes with its weight'
            if part.split('.')[0] in stacks:
                found[place + part] = f'{kind.__name__} gives it the layers of a decoder first'
        if isinstance(module, _OF_SEQUENCES) and not module.self_attn.batch_first:
            for child in module._modules:
                found[place + child] = f'{kind.__name__} gives it sequences before images'
        weight = module._parameters.get('weight')
        if weight is not None:
            owner = owner_of.setdefault(weight, name)
            if owner != name:
                found[name] = f'its weight is also that of {owner}'
                found[owner] = f'its weight is also that of {name}'
        for attribute, value in vars(module).items():
            if attribute not in _OF_TORCH:
                for held in _modules_in(value):
                    if held is not module:
                        keeper_of[held] = f'{place}{attribute} holds it, too, and no module'
    for name, module in network.named_modules():
        if module in keeper_of:
            found[name] = keeper_of[module]
    return found


def _of_sequences(network: nn.Module) -> dict[nn.Module, str]:
    """The linear layers beside an attention with the images second, in the module that holds it."""
    found = {}
    for name, module in network.named_modules():
        if not _is_named(module, 'Attention') or getattr(module, 'batch_first', True):
            continue
        reason = f'the {type(module).__name__} beside it has sequences before images'
        around = [m for m in _around(network, name) if not isinstance(m, _CONTAINERS)]
        beside = list(_parts(around[-1])) if name and around else []
        for part in [module, *beside]:
            kinds = list(part.modules())
            # PyTorch's attention knows where its images are; parts with others are no MLP of this.
            if not any(_is_named(m, 'MultiheadAttention', '_ConvNd') for m in kinds) and (
                part is module or not any(_is_named(m, 'Attention') for m in kinds)
            ):
                found.update({m: reason for m in kinds if isinstance(m, nn.Linear)})
    return found


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in a module, through its lists and sequences."""
    for child in module.children():
        yield from _parts(child) if isinstance(child, _CONTAINERS) else [child]


def _modules_in(value: Any, depth: int = 2) -> Iterator[nn.Module]:
    """The module that a value is, or whose method it is, or those in a plain collection of such."""
    if inspect.ismethod(value):
        value = value.__self__
    if isinstance(value, partial):
        value = [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, (list, tuple, set, frozenset, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item, depth - 1)


@cache
def _weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """The names ``x`` of every ``self.x.weight`` in ``forward`` and in the methods it calls.

    A name may have several parts, as of ``self.x.y.weight``.
    """
    todo, seen, found = {'forward'}, set(), set()
    while todo:
        method = todo.pop()
        seen.add(method)
        for node in ast.walk(_syntax_tree(kind, method)):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            if _is_self(owner) and inspect.isfunction(getattr(kind, node.attr, None)):
                todo |= {node.attr} - seen
            elif node.attr == 'weight':
                found |= {_name_in_self(owner)} - {''}
    return frozenset(found)


def _name_in_self(node: ast.AST) -> str:
    """``x.y`` of ``self.x.y``; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return '.'.join(parts) if _is_self(node) else ''


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == 'self'


def _syntax_tree(kind: type[nn.Module], method: str) -> ast.AST:
    """The syntax tree of a method. It is empty if the source code is not available."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(getattr(kind, method))))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])

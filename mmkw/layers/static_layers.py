"""Layers that are better left static, and how they are told."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn


def predictions(network: nn.Module) -> set[str]:
    """The layers that make the predictions of heads.

    In a head, a module whose class is named so, hidden are the layers of an ``FFN``, of a
    ``ConvModule`` with a norm or an activation, and of a list named ``...fcs``. All others predict.
    A prediction has as many channels as there are classes, anchors or coordinates: too few to
    share, and other ones in the next training.

    Args:
        network: Any network, static or dynamic.

    Returns:
        Names of modules.

    Example:
        >>> sorted(predictions(retina_head))
        ['retina_cls', 'retina_reg']
    """
    found: set[str] = set()
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or hasattr(module, 'cells'):
            around = list(_around(network, name))
            in_head = any(map(is_head, around))
            if in_head and not any(map(_is_hidden, around)) and not _in_list(name):
                found.add(name)
    return found


def _around(network: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that a module is in, from the network on."""
    module = network
    for part in name.split('.'):
        yield module
        module = getattr(module, part)


def is_head(module: nn.Module) -> bool:
    """Whether a module is a head of a detector or segmentor, by the name of its class.

    Args:
        module: Any module.
    """
    return _is_named(module, 'Head')


def _is_named(module: nn.Module, ending: str) -> bool:
    return any(parent.__name__.endswith(ending) for parent in type(module).__mro__)


def _is_hidden(module: nn.Module) -> bool:
    ends = getattr(module, 'with_norm', False) or getattr(module, 'with_activation', False)
    return _is_named(module, 'FFN') or (_is_named(module, 'ConvModule') and ends)


def _in_list(name: str) -> bool:
    return any(part.endswith('fcs') for part in name.split('.')[:-1])


def read_by_others(network: nn.Module) -> dict[str, str]:
    """The layers whose weight is read, when the network computes, by the module that they are in.

    Such a module computes with the kernel itself, as BEiT's attention does with that of its
    ``qkv``. A dynamic layer has none to give, but one for every image.

    Args:
        network: A static network.

    Returns:
        By the name of a layer, the class that reads it.
    """
    found = {}
    for name, module in network.named_modules():
        for child in _weights_read(type(module)) & set(module._modules):
            found[f'{name}.{child}'.lstrip('.')] = type(module).__name__
    return found


@cache
def _weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """The names ``x`` of every ``self.x.weight`` in ``forward``, or in a method that it calls."""
    todo, seen, found = ['forward'], set(), set()
    while todo:
        method = todo.pop()
        seen.add(method)
        for node in ast.walk(_syntax_tree(kind, method)):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            if _is_self(owner) and inspect.isfunction(getattr(kind, node.attr, None)):
                todo += {node.attr} - seen
            elif node.attr == 'weight' and isinstance(owner, ast.Attribute):
                found |= {owner.attr} if _is_self(owner.value) else set()
    return frozenset(found)


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == 'self'


def _syntax_tree(kind: type[nn.Module], method: str) -> ast.AST:
    """Of a method; an empty one where its source cannot be had."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(getattr(kind, method))))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])

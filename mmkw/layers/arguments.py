"""Checks the arguments of a dynamic layer before the layer is built."""

import inspect
import math
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral
from typing import Any

import torch
from torch import nn

from .partition import METHODS, WarehouseOptions, check_size

# The smallest value of each argument, and the largest number that PyTorch's convolutions take.
_LEAST = dict.fromkeys(('in_channels', 'out_channels', 'in_features', 'out_features', 'groups'), 1)
_LEAST_OF_SPACE = dict(kernel_size=1, stride=1, dilation=1, padding=0)
_MOST = 2**31 - 1
_DIMS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def check_arguments(static_class: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> None:
    """Checks the arguments that ``torch.nn`` does not check, or checks too late.

    Args:
        static_class: The static class of the layer, such as ``nn.Conv2d``.
        args: The positional arguments of the layer.
        kwargs: The keyword arguments of the layer.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If an argument is missing, unknown, or of a wrong type.
    """
    signature = inspect.signature(static_class.__init__)
    try:
        given = signature.bind(None, *args, **kwargs).arguments
    except TypeError as error:
        known = ', '.join(list(signature.parameters)[1:])
        raise TypeError(f'{error}; the arguments of {static_class.__name__} are {known}.') from None
    for name, least in _LEAST.items():
        if name in given:
            _check_numbers(name, given[name], (given[name],), least, 'a whole number')
    dims = _DIMS.get(static_class, 0)
    for name, least in _LEAST_OF_SPACE.items():
        value = given.get(name, least)
        # torch.nn checks a padding that is given as a word, such as 'same'.
        if isinstance(value, str) and name == 'padding':
            continue
        several = isinstance(value, Iterable) and not isinstance(value, str)
        values = tuple(value) if several else (value,)
        if several and len(values) != dims:
            raise ValueError(f'{name} must be one number or {dims}, got {value!r}.')
        _check_numbers(name, value, values, least, f'a whole number, or {dims} of them,')
    dtype = given.get('dtype')
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f'dtype must be one of real numbers, got {dtype!r}.')
    _check_kernel(given, dims)


def signature_of(static_class: type[nn.Module], norm_cfg: dict, method: str) -> inspect.Signature:
    """The signature of a dynamic layer: the static layer's arguments, then the warehouse options.

    Args:
        static_class: The static class of the layer.
        norm_cfg: The default of ``attention_norm_cfg``.
        method: The method of the layer, whose options these are.
    """
    _, *own = inspect.signature(static_class.__init__).parameters.values()
    taken = METHODS[method]
    options: dict[str, tuple[Any, Any]] = {}
    if taken.has_norm:
        options['attention_norm_cfg'] = (norm_cfg, dict)
    for field in fields(WarehouseOptions):
        if field.name in taken.options:
            default = taken.defaults.get(field.name, field.default)
            options[field.name] = (default, field.type)
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [
        inspect.Parameter(name, kind, default=default, annotation=annotation)
        for name, (default, annotation) in options.items()
    ]
    return inspect.Signature([*own, *more])


def _check_numbers(name: str, value: Any, values: tuple, least: int, expected: str) -> None:
    message = f'{name} must be {expected} from {least} to {_MOST}, got {value!r}.'
    if not all(isinstance(number, Integral) and not isinstance(number, bool) for number in values):
        raise TypeError(message)
    if not all(least <= number <= _MOST for number in values):
        raise ValueError(message)


def _check_kernel(given: dict[str, Any], dims: int) -> None:
    if dims == 0:
        sizes = dict(out_features=given['out_features'], in_features=given['in_features'])
        values = math.prod(sizes.values())
    else:
        sizes = {name: given[name] for name in ('out_channels', 'in_channels', 'kernel_size')}
        groups = given.get('groups', 1)
        for name in ('in_channels', 'out_channels'):
            if given[name] % groups:
                raise ValueError(
                    f'{name} must be divisible by groups, got {given[name]} for groups={groups}.'
                )
        kernel_size = sizes['kernel_size']
        places = kernel_size**dims if isinstance(kernel_size, Integral) else math.prod(kernel_size)
        values = sizes['out_channels'] * sizes['in_channels'] * places // groups
    text = ', '.join(f'{name}={value!r}' for name, value in sizes.items())
    check_size(f'A kernel of {text}', values, 'Make one of them smaller')

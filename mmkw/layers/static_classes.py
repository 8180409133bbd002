"""Recognises the classes of static layers that a dynamic layer can replace.

Libraries derive classes from those of ``torch.nn``. Some compute the same, such as mmcv's
``Conv2d``. Some pad their input first, so that the output has ``ceil(size / stride)`` values:
mmcv's ``Conv2dAdaptivePadding`` and timm's ``Conv2dSame``. Others compute something else, such as
convolutions with standardised weights. What a class computes is tried out on a small layer of it;
a layer with options beyond those of ``torch.nn``, such as a norm or an activation, stays static.
"""

from collections.abc import Sequence
from enum import Enum
from functools import cache
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

STATIC_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# What computes in a layer.
_METHODS = ('forward', '_conv_forward', '__call__')


class Kind(Enum):
    """What a class of layers computes, beside its base class in ``torch.nn``."""

    SAME_AS_TORCH = 'the same'
    PADS_BY_SIZE = 'the same, after padding its input to ceil(size / stride) output values'
    OTHER = 'something else'


def base_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class of ``torch.nn`` whose dynamic twin can replace a layer.

    Args:
        layer: Any module.

    Returns:
        ``Conv1d``, ``Conv2d``, ``Conv3d`` or ``Linear``. None if the layer computes something
        else, or has no weight of its own.

    Example:
        >>> base_class(mmcv.cnn.bricks.Conv2dAdaptivePadding(8, 8, 3))
        <class 'torch.nn.modules.conv.Conv2d'>
        >>> base_class(torch.nn.ConvTranspose2d(8, 8, 3)) is None
        True
    """
    base = next((base for base in STATIC_CLASSES if isinstance(layer, base)), None)
    weight = layer._parameters.get('weight')
    if base is None or weight is None or is_lazy(weight) or not weight.is_floating_point():
        return None
    if any(_has_its_own(layer, method) for method in _METHODS):
        return None
    # A norm, or factors of low rank, that this layer has beside its kernel.
    if layer._modules or layer._buffers or not layer._parameters.keys() <= {'weight', 'bias'}:
        return None
    kind = kind_of(type(layer))  # type: ignore[arg-type]
    if kind is Kind.OTHER or not (_computes_as(type(layer), base) or _is_as_tried(layer, base)):
        return None
    return base


def own_attributes(layer: nn.Module) -> dict[str, Any]:
    """What a static layer has beside what all of its class in ``torch.nn`` have.

    A network may read it: a scale of a residual branch, or a mark for an initialiser.

    Args:
        layer: A layer for which :func:`base_class` gives a class.

    Returns:
        The values by their names: those of the layer, and the plain ones of its own class, but for
        what every module has.

    Example:
        >>> layer = torch.nn.Linear(4, 4)
        >>> layer.scale = 0.5
        >>> own_attributes(layer)
        {'scale': 0.5}
    """
    base = next(base for base in STATIC_CLASSES if isinstance(layer, base))
    kinds = type(layer).__mro__
    found = {
        name: value
        for kind in reversed(kinds[: kinds.index(base)])
        for name, value in vars(kind).items()
        if not name.startswith('__') and not hasattr(value, '__get__')
    }
    found |= {
        name: value
        for name, value in vars(layer).items()
        # Its own methods some put back after they had replaced them.
        if name not in _names_in(base) and getattr(value, '__self__', None) is not layer
    }
    # MMEngine notes there how each parameter is initialised, while it does so.
    found.pop('_params_init_info', None)
    return {name: value for name, value in found.items() if not hasattr(nn.Module, name)}


@cache
def _names_in(base: type[nn.Module]) -> frozenset[str]:
    """The names in every layer of a class of ``torch.nn``."""
    with torch.device('meta'):
        return frozenset(vars(base(*([1] * (2 if base is nn.Linear else 3)))))


@cache
def kind_of(layer_class: type[nn.Module]) -> Kind:
    """Finds out what a class of layers computes.

    Args:
        layer_class: A class derived from one of :data:`STATIC_CLASSES`.
    """
    base = next(base for base in STATIC_CLASSES if issubclass(layer_class, base))
    if _computes_as(layer_class, base):
        return Kind.SAME_AS_TORCH
    try:
        with torch.random.fork_rng(devices=[]), torch.device('cpu'), torch.no_grad():
            return _tried(layer_class, base)
    except Exception:
        # A layer that cannot be made or called like that of torch.nn is of another kind.
        return Kind.OTHER


def _computes_as(layer_class: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a class has all methods that compute from its base class."""
    return all(getattr(layer_class, m, None) is getattr(base, m, None) for m in _METHODS)


def _has_its_own(layer: nn.Module, method: str) -> bool:
    """Whether a layer alone has a method, other than that of its class."""
    own = vars(layer).get(method)
    return own is not None and getattr(own, '__func__', None) is not getattr(type(layer), method)


def _is_as_tried(layer: Any, base: type[nn.Module]) -> bool:
    """Whether a layer has the attributes of one that is made with the arguments of its base alone.

    Others may change what it computes, such as an activation, and were not tried out.
    """
    if base is nn.Linear:
        arguments = [layer.in_features, layer.out_features]
    else:
        arguments = [layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride]
        arguments += [layer.padding, layer.dilation, layer.groups]
    arguments.append(layer.bias is not None)
    try:
        with torch.device('meta'):
            plain, own = base(*arguments), type(layer)(*arguments)
        known, expected = vars(plain), vars(own)
        found = {name: value for name, value in vars(layer).items() if name not in known}
        return found == {name: value for name, value in expected.items() if name not in known}
    except Exception:
        return False


def _tried(layer_class: type[nn.Module], base: type[nn.Module]) -> Kind:
    """Compares layers with those of ``torch.nn``, while training and not."""
    kinds = set(Kind)
    for arguments, shape in _CASES[base]:
        static = base(*arguments)
        layer = layer_class(*arguments)
        if layer.state_dict().keys() != static.state_dict().keys():
            return Kind.OTHER
        layer.load_state_dict(static.state_dict())
        x = torch.rand(shape)
        padded = x
        if base is not nn.Linear:
            sizes = (static.kernel_size, static.stride, static.dilation)
            padded = F.pad(x, padding_by_size(x.shape[2:], *sizes))
        for training in (True, False):
            y = layer.train(training)(x)
            if not _equal(y, static(x)):
                kinds.discard(Kind.SAME_AS_TORCH)
            if not _equal(y, _without_padding(static, padded)):
                kinds.discard(Kind.PADS_BY_SIZE)
    return next(kind for kind in Kind if kind in kinds)


def _convolutions(dims: int) -> list[tuple[tuple, tuple[int, ...]]]:
    """Arguments (channels, kernel, stride, padding, dilation, groups) and inputs."""
    sizes = (9, 12, 7)[:dims]
    return [
        ((4, 6, 3, 1, 1), (2, 4, *sizes)),
        ((4, 6, 3, 2, 0, 1, 2), (2, 4, *sizes)),
        ((4, 6, 2, 3, 0), (2, 4, *sizes)),
        ((4, 6, 3, 1, 2, 2), (2, 4, *sizes)),
    ]


_CASES = {
    nn.Conv1d: _convolutions(1),
    nn.Conv2d: _convolutions(2),
    nn.Conv3d: _convolutions(3),
    nn.Linear: [((4, 6), (2, 4)), ((4, 6), (2, 3, 4))],
}


def _without_padding(static: nn.Module, x: Tensor) -> Tensor:
    if isinstance(static, nn.Linear):
        return static(x)[:0]
    padding = static.padding
    static.padding = (0,) * len(padding)
    y = static(x)
    static.padding = padding
    return y


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-6)


def padding_by_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The padding that gives a convolution ``ceil(size / stride)`` output values.

    Args:
        size: Spatial sizes of the input.
        kernel_size: Of the convolution, as ``stride`` and ``dilation``.
        stride: See above.
        dilation: See above.

    Returns:
        For ``torch.nn.functional.pad``: (before, after), the last dimension first. After the input
        there is one more value if their number is odd.
    """
    padding = []
    for n, k, s, d in reversed(list(zip(size, kernel_size, stride, dilation))):
        last = (-(-n // s) - 1) * s
        total = torch.sym_max(last + (k - 1) * d + 1 - n, 0)
        padding += [total // 2, total - total // 2]
    return padding


def explicit_padding(convolution: Any) -> list[int]:
    """The padding that a convolution asks for with its ``padding`` and ``dilation`` of now.

    Args:
        convolution: A convolution of ``torch.nn`` or of this package.

    Returns:
        As :func:`padding_by_size`.

    Raises:
        ValueError: If the padding is another word.
    """
    size, padding = convolution.kernel_size, convolution.padding
    if padding == 'valid':
        return [0] * 2 * len(size)
    if padding == 'same':
        # As torch.nn does: for an even number the second side has one more.
        totals = [d * (k - 1) for d, k in zip(repeated(convolution.dilation, len(size)), size)]
        return [part for n in reversed(totals) for part in (n // 2, n - n // 2)]
    if isinstance(padding, str):
        raise ValueError(f"padding must be 'same', 'valid' or numbers, got {padding!r}.")
    return [n for n in reversed(repeated(padding, len(size))) for _ in range(2)]


def repeated(value: Any, dims: int) -> tuple[int, ...]:
    """One number for every dimension.

    Args:
        value: A number for all, or as many numbers as dimensions.
        dims: The number of dimensions.
    """
    numbers = (value,) if isinstance(value, Integral) else tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers

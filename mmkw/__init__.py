"""KernelWarehouse dynamic convolution for MMDetection and MMSegmentation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import autoload
from .version import __version__

if TYPE_CHECKING:
    from .layers import KWConv1d, KWConv2d, KWConv3d, KWLinear, set_temperature
    from .sharing import SharingPlan, convert

__all__ = [
    'KWConv1d',
    'KWConv2d',
    'KWConv3d',
    'KWLinear',
    'SharingPlan',
    '__version__',
    'convert',
    'set_temperature',
]

autoload.install()


def __getattr__(name: str) -> Any:
    # Late, since PyTorch imports this package at the end of its own import.
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    place = 'sharing' if name in ('SharingPlan', 'convert') else 'layers'
    value = getattr(import_module(f'.{place}', __name__), name)
    globals()[name] = value
    return value

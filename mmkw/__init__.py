"""KernelWarehouse dynamic convolution for PyTorch and OpenMMLab."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import autoload
from .version import __version__

if TYPE_CHECKING:
    from .backbones import (
        KWConvNeXt,
        KWMobileNetV2,
        KWModule,
        KWResNet,
        KWResNetV1c,
        KWResNetV1d,
    )
    from .checkpoints import read_checkpoint
    from .layers import (
        CondConv2d,
        DYConv2d,
        KWConv1d,
        KWConv2d,
        KWConv3d,
        KWLinear,
        ODConv2d,
        quantize_cells,
        set_temperature,
        temperature_at,
    )
    from .sharing import SharingPlan, convert, is_converted, to_static

_PLACES = {
    'backbones': (
        'KWConvNeXt',
        'KWMobileNetV2',
        'KWModule',
        'KWResNet',
        'KWResNetV1c',
        'KWResNetV1d',
    ),
    'checkpoints': ('read_checkpoint',),
    'layers': (
        'CondConv2d',
        'DYConv2d',
        'KWConv1d',
        'KWConv2d',
        'KWConv3d',
        'KWLinear',
        'ODConv2d',
        'quantize_cells',
        'set_temperature',
        'temperature_at',
    ),
    'sharing': ('SharingPlan', 'convert', 'is_converted', 'to_static'),
}

__all__ = [
    'CondConv2d',
    'DYConv2d',
    'KWConv1d',
    'KWConv2d',
    'KWConv3d',
    'KWConvNeXt',
    'KWLinear',
    'KWMobileNetV2',
    'KWModule',
    'KWResNet',
    'KWResNetV1c',
    'KWResNetV1d',
    'ODConv2d',
    'SharingPlan',
    '__version__',
    'convert',
    'is_converted',
    'quantize_cells',
    'read_checkpoint',
    'set_temperature',
    'temperature_at',
    'to_static',
]

# Found as attributes of the package, too.
_FOLDERS = (*_PLACES, 'deploy', 'engine', 'ops')

autoload.install()


def __getattr__(name: str) -> Any:
    # Names are imported on first use. PyTorch imports this package at the end of its own import,
    # when the modules below could not be imported yet.
    if name in _FOLDERS:
        return import_module(f'.{name}', __name__)
    place = next((place for place, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'.{place}', __name__), name)
    globals()[name] = value
    return value

"""Networks as files that need no mmkw, and as static networks."""

from .detector import Detector
from .export import ExportError, Parity, export
from .networks import DenseNetwork
from .static import LayerSpread, StaticReport, to_static

__all__ = [
    'DenseNetwork',
    'Detector',
    'ExportError',
    'LayerSpread',
    'Parity',
    'StaticReport',
    'export',
    'to_static',
]

"""Networks as files that need no mmkw: ONNX, and programs of ``torch.export``."""

from .export import ExportError, Parity, export
from .networks import DenseNetwork

__all__ = ['DenseNetwork', 'ExportError', 'Parity', 'export']

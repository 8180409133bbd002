"""Tensor functions of the operator: no modules, no plans."""

from .mixing import mix_cells
from .sample_conv import sample_conv, sample_linear

__all__ = ['mix_cells', 'sample_conv', 'sample_linear']

"""Tensor functions of the operator: no modules, no plans."""

from .dynamic import apply_mixed
from .mixing import mix_cells
from .sample_conv import SampleConv, SampleLinear

__all__ = ['SampleConv', 'SampleLinear', 'apply_mixed', 'mix_cells']

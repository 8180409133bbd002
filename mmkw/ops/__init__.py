"""Tensor functions of the operator: no modules, no plans.

``kernels`` defines it; ``backend`` chooses what computes it, ``mixing`` or ``compiled``;
``dynamic`` is the function with its gradient, which ``gradient`` sums up for a warehouse;
``sample_conv`` applies kernels; ``modes`` and ``memory`` are about PyTorch.
"""

from .backend import use_compiled, why_not_compiled
from .dynamic import apply_mixed
from .kernels import mix_cells
from .sample_conv import SampleConv, SampleLinear

__all__ = [
    'SampleConv',
    'SampleLinear',
    'apply_mixed',
    'mix_cells',
    'use_compiled',
    'why_not_compiled',
]

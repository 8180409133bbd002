"""The operator on tensors: it mixes kernels from cells and applies them.

- ``kernels`` defines mixing.
- ``backend`` chooses what computes: PyTorch, ``mixing``, ``compiled`` (CPU) or ``fused`` (GPU).
- ``dynamic`` is the whole operator with its gradient; ``at_once`` is it with all before it, on the
  CPU.
- ``averaging`` is what the attention sees. ``attending`` is an attention by kernels of our own with
  its gradient; ``compiled_attention`` has those for the CPU.
- ``gradient`` sums up the gradient of a warehouse over its layers.
- ``sample_conv`` applies kernels to images, in one of several ``ways``; ``choosing`` times them.
  On the CPU ``compiled`` applies those of constants.
- ``one_operator`` is the convolution in a compiled graph, ``exported`` that in an exported program.
- ``modes`` and ``memory`` are about PyTorch.
"""

from ..requirements import check_versions

check_versions(['torch'])

from .backend import use_compiled, why_not_compiled  # noqa: E402
from .dynamic import apply_mixed  # noqa: E402
from .kernels import mix_cells  # noqa: E402
from .sample_conv import SampleConv, SampleLinear  # noqa: E402

__all__ = [
    'SampleConv',
    'SampleLinear',
    'apply_mixed',
    'mix_cells',
    'use_compiled',
    'why_not_compiled',
]

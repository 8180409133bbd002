"""The compiled CPU kernels, where the installation has them; PyTorch serves everywhere else.

Their source is in ``csrc``. They are float32 and have no gradients of their own:
``dynamic.py`` calls them from inside its autograd function.
"""

import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from . import modes

# Set to False to have everything computed by PyTorch.
enabled = True


def _load() -> bool:
    if find_spec('mmkw.ops._native') is None:
        return False
    try:
        from . import _native  # noqa: F401  (registers torch.ops.mmkw)
    except ImportError as error:
        warnings.warn(
            f"mmkw's CPU kernels do not load ({error}). They were built for another torch; "
            'PyTorch computes instead, more slowly. Install mmkw again, with pip install '
            '--no-build-isolation.',
            stacklevel=2,
        )
        return False
    return True


built = _load()


def computes(*tensors: Tensor) -> bool:
    """Whether the compiled kernels are for tensors: of float32 on the CPU.

    An exported program shall run where mmkw is not installed, hence is made of PyTorch's operators.

    Args:
        *tensors: Of any shapes.
    """
    return (
        built
        and enabled
        and all(t.dtype == torch.float32 and t.device.type == 'cpu' for t in tensors)
        and not modes.is_exporting()
    )


def infers(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels may compute from tensors what has no gradient.

    Args:
        *tensors: Of any shapes.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    return (
        not learns and computes(*given) and not modes.is_compiling() and not modes.is_transforming()
    )


def serves(attention: Tensor, cells: Tensor, grid: Sequence[int]) -> bool:
    """Whether the compiled kernels are for a mixing.

    Cells must have one place of the kernel or all.

    Args:
        attention: Tensor[batch, mixtures, cells].
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: Cells of the kernel along ``(*spatial, out, in)``.
    """
    return computes(attention, cells) and 1 in (math.prod(grid[:-2]), cells.shape[3:].numel())

"""The compiled CPU kernels, where the installation has them; PyTorch serves everywhere else.

Their source is ``csrc/mixing.cpp``. They are float32 and have no gradients of their own:
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


def computes(cells: Tensor) -> bool:
    """Whether the compiled kernels are for a warehouse: of float32 on the CPU.

    An exported program shall run where mmkw is not installed, hence is made of PyTorch's operators.

    Args:
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
    """
    on_cpu = cells.device.type == 'cpu' and cells.dtype == torch.float32
    return built and enabled and on_cpu and not modes.is_exporting()


def serves(attention: Tensor, cells: Tensor, grid: Sequence[int]) -> bool:
    """Whether the compiled kernels are for a mixing.

    Cells must have one place of the kernel or all.

    Args:
        attention: Tensor[batch, mixtures, cells].
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: Cells of the kernel along ``(*spatial, out, in)``.
    """
    return (
        computes(cells)
        and attention.dtype == cells.dtype
        and 1 in (math.prod(grid[:-2]), cells.shape[3:].numel())
    )

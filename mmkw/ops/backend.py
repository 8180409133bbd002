"""Chooses what computes the operator.

The choice is made once per call, for the forward and the backward pass together:

- PyTorch's own operators on the whole batch, if a transformation looks inside the operator;
- :class:`~mmkw.ops.compiled.CompiledMixing`, for float32 on the CPU;
- :class:`~mmkw.ops.mixing.Mixing`, which works on blocks of images, in all other cases.

``MMKW_COMPILED=0`` in the environment, or :func:`use_compiled`, switches the compiled kernels off.
"""

import logging
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from . import modes
from .compiled import MISSING, CompiledMixing
from .mixing import Mixing

_switched_on = os.environ.get('MMKW_COMPILED', '1') != '0'


def use_compiled(on: bool) -> None:
    """Switches the compiled kernels on or off for the process.

    Args:
        on: Whether the compiled kernels compute where they can.
    """
    global _switched_on
    _switched_on = on


def why_not_compiled() -> str | None:
    """The reason why no compiled kernel is used; None if they are used."""
    if MISSING is None and not _switched_on:
        return 'they are switched off, by MMKW_COMPILED=0 or use_compiled(False)'
    return MISSING


@cache
def _tell(missing: str) -> None:
    """Writes to the log, once, that PyTorch computes what the compiled kernels could."""
    logging.getLogger('mmkw').warning('mmkw computes without its CPU kernels: %s', missing)


def is_compiled(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels can take these tensors: float32 on the CPU.

    Args:
        *tensors: Of any shapes.
    """
    return why_not_compiled() is None and _could_be_compiled(*tensors)


def _could_be_compiled(*tensors: Tensor | None) -> bool:
    return all(
        tensor.dtype == torch.float32 and tensor.device.type == 'cpu'
        for tensor in tensors
        if tensor is not None
    )


def mixing_of(x: Tensor, attention: Tensor, cells: Tensor, grid: Sequence[int]) -> Mixing | None:
    """Chooses the object that mixes the kernels of a call.

    Args:
        x: The images.
        attention: Tensor[batch, mixtures, cells].
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: Cells of the kernel along ``(*spatial, out, in)``.

    Returns:
        The object, or None if PyTorch's own operators must compute.
    """
    if x.shape[0] == 0 or modes.is_seen_through(x, attention, cells):
        return None
    if is_compiled(attention, cells) and CompiledMixing.serves(cells, grid):
        return CompiledMixing(cells, grid)
    if MISSING is not None and _switched_on and _could_be_compiled(attention, cells):
        _tell(MISSING)
    return Mixing(cells, grid)


def is_one_operator(attention: Tensor, cells: Tensor, grid: Sequence[int]) -> bool:
    """Whether mixing is one of our operators in a compiled graph: in ``torch.compile`` only.

    An exported program must also run where mmkw is not installed, so it has PyTorch's operators.

    Args:
        attention: Tensor[batch, mixtures, cells].
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: Cells of the kernel along ``(*spatial, out, in)``.
    """
    return (
        modes.is_compiling()
        and not modes.is_exporting()
        and is_compiled(attention, cells)
        and CompiledMixing.serves(cells, grid)
    )


def computes_constants(*tensors: Tensor | None) -> bool:
    """Whether a compiled kernel without gradient may take these tensors.

    Args:
        *tensors: Of any shapes.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    return not learns and is_compiled(*given) and not modes.is_seen_through(*given)

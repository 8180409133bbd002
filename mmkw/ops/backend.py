"""Chooses what computes the operator.

The choice is made once per call, for the forward and the backward pass together:

- PyTorch's own operators on the whole batch, if a transformation looks inside the operator;
- :class:`~mmkw.ops.compiled.CompiledMixing`, for float32 on the CPU, and for bfloat16 and integers
  where nothing learns;
- :class:`~mmkw.ops.fused.FusedMixing`, for half precision and TF32 on a GPU with Triton;
- :class:`~mmkw.ops.mixing.Mixing`, which works on blocks of images, in all other cases.

``MMKW_COMPILED=0`` in the environment, or :func:`use_compiled`, switches the compiled kernels and
the GPU kernels off.
"""

import logging
import os
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import compiled_attention, modes
from .compiled import (
    MISSING,
    READ,
    STORED,
    CompiledMap,
    CompiledMixing,
    multiplies_bfloat16,
)
from .kernels import assembled_shape, is_regular
from .mixing import Mixing

_HALF = (torch.float16, torch.bfloat16)
_LEARNING = (torch.float32,)

_switched_on = os.environ.get('MMKW_COMPILED', '1') != '0'


def use_compiled(on: bool) -> None:
    """Switches the compiled kernels and the GPU kernels on or off for the process.

    Args:
        on: Whether these kernels compute where they can.
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


def _could_be_compiled(*tensors: Tensor | None, learning: bool = True) -> bool:
    """Whether tensors lie on the CPU in a precision of the kernels; gradients are of float32."""
    precisions = _LEARNING if learning else READ
    return all(t is None or (t.is_cpu and t.dtype in precisions) for t in tensors)


def mixing_of(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    grid: Sequence[int],
    sample_map: Any,
    dtype: torch.dtype,
    learning: bool,
) -> 'partial[Any] | None':
    """Chooses what mixes the kernels of a call.

    Args:
        x: The images.
        attention: Tensor[batch, mixtures, cells].
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: Cells of the kernel along ``(*spatial, out, in)``.
        sample_map: The map that applies the kernels.
        dtype: Precision of the map.
        learning: Whether there will be a backward pass.

    Returns:
        What makes the object from the cells, or None if PyTorch's own operators must compute.
    """
    if modes.is_seen_through(x, attention, cells) or x.shape[0] == 0:
        return None
    if _could_be_compiled(attention, cells, learning=learning) and is_regular(cells, grid):
        if why_not_compiled() is None:
            return partial(CompiledMixing, grid=grid, dtype=dtype)
        if MISSING is not None and _switched_on:
            _tell(MISSING)
    if (
        _is_on_current_gpu(cells)
        and cells.dtype in (torch.float32, *_HALF)
        and (dtype in _HALF or torch.backends.cuda.matmul.allow_tf32)
        and cells.is_contiguous()
        and is_regular(cells, grid)
        and (kernels := gpu_kernels()) is not None
    ):
        shape = assembled_shape(cells.shape[1:], grid)
        channels_last = sample_map.wants_channels_last(x, shape)
        return partial(kernels.FusedMixing, grid=grid, dtype=dtype, channels_last=channels_last)
    return partial(Mixing, grid=grid, dtype=dtype)


def applying(sample_map: Any, *operands: Tensor) -> Any:
    """Chooses what applies kernels, or computes a gradient of that, as constants.

    Args:
        sample_map: The layer's own map.
        *operands: The images, and what else is computed from.

    Returns:
        The map itself, or one that a compiled kernel computes.
    """
    dtype, images = operands[0].dtype, operands[0].shape[0]
    if (
        dtype not in STORED
        or images == 0
        or any(t.dtype != dtype or t.shape[0] != images for t in operands)
        or not computes_constants(*operands)
    ):
        return sample_map
    return CompiledMap.of(sample_map)


def packs(mixing_of: 'partial[Any]', cells: Tensor) -> bool:
    """Whether cells that learn are packed and mixed in bfloat16, as the kernels are of it.

    Args:
        mixing_of: The choice of :func:`mixing_of`.
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
    """
    return (
        mixing_of.func is CompiledMixing
        and mixing_of.keywords['dtype'] == torch.bfloat16
        and multiplies_bfloat16(cells)
    )


def computes_by_tiles(x: Tensor) -> bool:
    """Whether the GPU kernels may convolve: in half precision, or in TF32 where it is allowed.

    Args:
        x: The images.
    """
    rounds = x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return _is_on_current_gpu(x) and (x.dtype in _HALF or rounds) and gpu_kernels() is not None


def _is_on_current_gpu(tensor: Tensor) -> bool:
    """Whether a tensor lies on the GPU on which Triton starts kernels."""
    return tensor.is_cuda and tensor.get_device() == torch.cuda.current_device()


def gpu_kernels() -> Any:
    """The module :mod:`mmkw.ops.fused`, or None where its kernels are not used."""
    return _gpu_kernels() if _switched_on else None


@cache
def _gpu_kernels() -> Any:
    missing = why_no_gpu_kernels()
    if missing is not None:
        logging.getLogger('mmkw').warning('mmkw computes without its GPU kernels: %s', missing)
        return None
    from . import fused

    return fused


def why_no_gpu_kernels() -> str | None:
    """The reason why no GPU kernel is used; None if they are used."""
    if torch.version.cuda is None:
        return 'they are for CUDA'
    devices = range(torch.cuda.device_count())
    if any(torch.cuda.get_device_capability(device) < (8, 0) for device in devices):
        return 'they need GPUs of compute capability 8.0 or more'
    try:
        from . import fused  # noqa: F401
    except ImportError as error:
        return f'Triton is missing ({error}); PyTorch for CUDA brings it on Linux'
    return None


def attention_kernels(pooled: Tensor, cells: int, *parameters: Tensor | None) -> Any:
    """The module whose kernels compute an attention that may learn, and its gradient.

    Args:
        pooled: Tensor[batch, channels].
        cells: Of the warehouse.
        *parameters: Of the attention.

    Returns:
        None if PyTorch's operators must: for tensors that are not dense, not of float32 or looked
        into, and on a GPU for large batches or warehouses.
    """
    if modes.is_observed():
        return None
    on_cpu = pooled.is_cpu
    # A loop, since small layers take hardly longer than these questions.
    for tensor in (pooled, *parameters):
        if tensor is not None and not (
            modes.is_plain(tensor)
            and tensor.dtype == torch.float32
            and tensor.is_contiguous()
            and (tensor.is_cpu if on_cpu else _is_on_current_gpu(tensor))
        ):
            return None
    if on_cpu:
        return compiled_attention if why_not_compiled() is None else None
    if (kernels := gpu_kernels()) is None:
        return None
    attention = kernels.attention
    fits = len(pooled) <= attention.MOST_IMAGES and cells <= attention.MOST_CELLS
    return attention if fits else None


def is_one_operator(attention: Tensor, cells: Tensor, grid: Sequence[int]) -> bool:
    """Whether mixing is one of our operators in a compiled graph: in ``torch.compile`` only.

    An exported program must also run where mmkw is not installed, so it has PyTorch's operators.

    Args:
        attention: Tensor[batch, mixtures, cells].
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
        grid: Cells of the kernel along ``(*spatial, out, in)``.
    """
    return modes.makes_graph() and is_compiled(attention, cells) and is_regular(cells, grid)


def mixes_integers(
    integers: Tensor, magnitudes: Tensor, grid: Sequence[int], x: Tensor, *operands: Tensor | None
) -> bool:
    """Whether the compiled kernels mix integers as they are: on the CPU, where nothing learns.

    Args:
        integers: Tensor[cells, cell_out, cell_in, *cell_kernel].
        magnitudes: Of the cells, in the precision of the network.
        grid: Cells of the kernel along ``(*spatial, out, in)``.
        x: The images.
        *operands: The attention, and all else that might learn.
    """
    return (
        computes_constants(integers, x, *operands)
        and is_regular(integers, grid)
        and x.shape[0] > 0
        and (x.dtype == magnitudes.dtype or modes.autocast_dtype(x) is not None)
    )


def computes_constants(*tensors: Tensor | None) -> bool:
    """Whether a compiled kernel without gradient may take these tensors.

    Args:
        *tensors: Of any shapes.
    """
    return not modes.is_observed() and are_constants(*tensors)


def are_constants(*tensors: Tensor | None) -> bool:
    """The same, where nothing looks at the operators inside a call.

    Args:
        *tensors: Of any shapes.
    """
    if why_not_compiled() is not None:
        return False
    # A loop, since small layers take hardly longer than these questions.
    may_learn = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and not (
            tensor.is_cpu
            and modes.is_plain(tensor)
            and tensor.dtype in READ
            and not (may_learn and tensor.requires_grad)
        ):
            return False
    return True

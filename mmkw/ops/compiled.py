"""The compiled CPU kernels, if the installation has them, as constants for autograd.

Their source is in ``csrc``. This module loads them and registers them with PyTorch: shapes without
values, the gradient, floating-point operations. :class:`CompiledMixing` is
:class:`~mmkw.ops.mixing.Mixing` with these kernels. :mod:`.backend` decides whether they are used.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gradient import CellSum
from .kernels import assembled_shape, cut, flops_of_mixing
from .memory import Scratch, recycled
from .mixing import Mixing

# Without the cache, because pip keeps there what it has built without kernels.
_REMEDY = (
    "To have them, with a C++ compiler: pip install 'setuptools>=64,<82' && pip install "
    '--no-build-isolation --no-cache-dir --no-deps --force-reinstall mmkw'
)


def _load() -> str | None:
    """Loads the library. Returns the reason if that is not possible, else None."""
    if find_spec('mmkw.ops._native') is None:
        return f'they were not built. {_REMEDY}'
    try:
        from . import _native  # type: ignore[attr-defined]
    except ImportError as error:
        return f'they do not load ({error}): they were built for another torch. {_REMEDY}'
    built_for = getattr(_native, 'TORCH', 'of long ago')
    if built_for.split('.')[:2] != torch.__version__.split('.')[:2]:
        # PyTorch's C++ classes change between releases, without an error on loading.
        return f'they were built for torch {built_for}, not {torch.__version__}. {_REMEDY}'
    return None


# What the kernels write, and the precisions of cells that they read. They sum up in float32.
STORED = (torch.float32, torch.bfloat16)
READ = (*STORED, torch.int8)

# The most columns of a panel, of what their number is a multiple, and the values of a cache line.
_PANEL, _STEP, _LINE = 1024, 64, 32

# The reason why the kernels are missing; None if they are loaded.
MISSING = _load()


def cpu_level() -> str:
    """The generation of processors that the kernels are used for, by PyTorch's names."""
    from . import _native  # type: ignore[attr-defined]

    return _native.CPU_LEVEL


@cache
def has_bfloat16() -> bool:
    """Whether this processor multiplies numbers of bfloat16 by instructions."""
    from . import _native  # type: ignore[attr-defined]

    return bool(_native.MULTIPLIES_BFLOAT16)


def multiplies_bfloat16(cells: Tensor) -> bool:
    """Whether this processor multiplies so large cells in bfloat16 faster than in float32.

    Args:
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
    """
    return has_bfloat16() and cells.shape[1:].numel() % _LINE == 0


def pack_cells(cells: Tensor) -> Tensor:
    """Rounds cells to bfloat16 and lays them as the kernels read them fastest, for many calls.

    Args:
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel] of float32, as
            :func:`multiplies_bfloat16` allows.

    Returns:
        Tensor[panels, cells, columns]. A panel has some columns of all cells, then a cache line.
    """
    size = cells[0].numel()
    # Each thread should have some.
    of_thread = size // (4 * torch.get_num_threads())
    columns = min(max(of_thread // _STEP * _STEP, _STEP), _PANEL)
    shape = (math.ceil(size / columns), len(cells), columns + _LINE)
    panels = recycled(cells, shape, torch.bfloat16)
    torch.ops.mmkw.pack_cells(cells.contiguous(), panels)
    return panels


class CompiledMap(NamedTuple):
    """Applies one kernel to each image, by compiled operators that choose how they do so.

    It has the methods of :class:`~mmkw.ops.sample_conv.SampleConv`, of constants alone. How it
    chooses is in ``csrc/convolution.cpp``.

    Args:
        settings: Stride, padding, dilation and groups of the convolution. Those of a linear map
            have no dimensions.
        channel_dim: Where the channels of the images are, 1 or -1.
    """

    settings: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
    channel_dim: int

    @staticmethod
    def of(sample_map: Any) -> 'CompiledMap':
        """What computes as a map of PyTorch's operators does."""
        return CompiledMap(sample_map.settings, sample_map.channel_dim)

    def __call__(self, x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :class:`~mmkw.ops.sample_conv.SampleConv`."""
        return torch.ops.mmkw.apply_kernels(x, kernels, bias, *self.settings)

    def backward_kernels(
        self, grad: Tensor, x: Tensor, shape: tuple[int, ...], scratch: Scratch
    ) -> Sequence[Tensor]:
        """See :class:`~mmkw.ops.sample_conv.SampleConv`."""
        parts = torch.ops.mmkw.backward_kernels(grad, x, shape, *self.settings)
        return [kernel for part in parts for kernel in part.unbind()]

    def backward_x(
        self, grad: Tensor, x: Tensor, kernels: Tensor, added: Tensor | None = None
    ) -> Tensor:
        """See :class:`~mmkw.ops.sample_conv.SampleConv`.

        Args:
            grad: As there.
            x: As there.
            kernels: As there.
            added: Tensor[batch, in_channels], added to the gradients of all pixels of an image.
        """
        return torch.ops.mmkw.backward_images(grad, x, kernels, *self.settings, added)


class CompiledMixing(Mixing):
    """Mixing by the compiled kernels. They mix and assemble in one step.

    For a map in bfloat16 kernels are stored in that.

    Args:
        cells: See :class:`~mmkw.ops.mixing.Mixing`.
        grid: See there.
        dtype: See there.
        packed: Gives the cells as :func:`pack_cells` lays them, if they are multiplied in bfloat16.
    """

    def __init__(
        self,
        cells: Tensor,
        grid: Sequence[int],
        dtype: torch.dtype,
        packed: Callable[[], Tensor] | None = None,
    ) -> None:
        super().__init__(cells, grid, dtype)
        self._panels = None if packed is None else packed()

    def parts(self, attention: Tensor) -> list[slice]:
        """All images in one part."""
        return [slice(0, attention.shape[0])]

    def applying(self, sample_map: Any) -> Any:
        """See :class:`Mixing`."""
        if self.dtype not in STORED:
            return sample_map
        return CompiledMap.of(sample_map)

    def kernels(self, attention: Tensor) -> Tensor:
        """See :class:`Mixing`."""
        memory = self.cells.new_empty(self._shape(attention), dtype=self._stored)
        return self._mix_into(memory, attention)

    def mixed(
        self, attention: Tensor, kept: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """See :class:`Mixing`."""
        if kept is None:
            kept = self._mix_into(self._memory(attention), attention)
        yield slice(0, attention.shape[0]), kept

    def backward(
        self,
        grad_kernels: Iterable[Tensor | Sequence[Tensor]],
        attention: Tensor,
        total: CellSum | None,
        kept: Tensor | None,
        again: bool,
    ) -> tuple[Tensor, Iterator[tuple[slice, Tensor]]]:
        """See :class:`Mixing`. The same pass over the warehouse mixes the kernels, if needed."""
        precision = self.cells.dtype if self._panels is None else torch.bfloat16
        place = rows = None if total is None else total.place(self, attention, precision)
        if total is not None and place is None:
            rows = self._rows(attention, 'rows', precision)
        gradients = [
            kernel if kernel.dtype in STORED else kernel.to(precision)
            for part in grad_kernels
            for kernel in part
        ]
        mixed = self._memory(attention) if again and kept is None else None
        grad_attention = torch.ops.mmkw.mix_backward(
            gradients, attention, self.cells, self.grid, mixed, rows, self._panels
        )
        if total is not None and rows is not None:
            total.add(attention, rows, waits=place is not None)
        kernels = mixed if kept is None else kept
        return grad_attention, self.mixed(attention, kernels) if again else iter(())

    @staticmethod
    def add_to_cells(weights: Tensor, rows: Tensor, total: Tensor, begin: bool) -> None:
        """See :class:`Mixing`."""
        torch.ops.mmkw.add_to_cells(weights, rows, total, begin)

    def _mix_into(self, kernels: Tensor, attention: Tensor) -> Tensor:
        weights = attention.to(torch.float32)
        torch.ops.mmkw.mix_cells_into(weights, self.cells, self.grid, kernels, self._panels)
        return kernels

    def _memory(self, attention: Tensor) -> Tensor:
        return self.scratch.take(self.cells, self._shape(attention), 'mixing', self._stored)

    def _shape(self, attention: Tensor) -> tuple[int, ...]:
        """Shape of kernels: ``(images, out, in, *kernel_size)``."""
        return (attention.shape[0], *assembled_shape(self.cells.shape[1:], self.grid))

    @property
    def _stored(self) -> torch.dtype:
        """Precision of the kernels, which are cast to that of the map."""
        return self.dtype if self.dtype in STORED else torch.float32


def _register() -> None:
    """Registers what PyTorch's transformations need to know about the operators."""
    library = torch.library

    @library.register_fake('mmkw::mix_cells')
    def _(attention: Tensor, cells: Tensor, grid: Sequence[int]) -> Tensor:
        return cells.new_empty(attention.shape[0], *assembled_shape(cells.shape[1:], grid))

    @library.register_fake('mmkw::mix_cells_into')
    def _(attention: Tensor, cells: Tensor, grid: Any, kernels: Tensor, panels: Any = None) -> None:
        return None

    @library.register_fake('mmkw::pack_cells')
    def _(cells: Tensor, panels: Tensor) -> None:
        return None

    @library.register_fake('mmkw::mix_backward')
    def _(gradients: list, attention: Tensor, cells: Tensor, grid: Any, *_: Any) -> Tensor:
        return attention.new_empty(attention.shape)

    @library.register_fake('mmkw::add_to_cells')
    def _(weights: Tensor, rows: Tensor, total: Tensor, begin: bool) -> None:
        return None

    @library.register_fake('mmkw::bmm')
    def _(a: Tensor, b: Tensor, by_tiles: bool | None = None) -> Tensor:
        return a.new_empty(*a.shape[:2], b.shape[2])

    @library.register_fake('mmkw::average')
    def _(seen: Tensor, is_tokens: bool) -> Tensor:
        channels = seen.shape[-1 if is_tokens else 1]
        return seen.new_empty(seen.shape[0], channels, dtype=torch.float32)

    @library.register_fake('mmkw::attend')
    def _(pooled: Tensor, *rest: Any) -> Tensor:
        *_, fc2_weight, _, mixtures, _, _ = rest
        return pooled.new_empty(len(pooled), mixtures, len(fc2_weight) // mixtures - 1)

    @library.register_fake('mmkw::attend_to_learn')
    def _(pooled: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        fc1_weight, _, _, _, fc2_weight, _, assigned, norm, *_ = rest
        batch, width, outputs = len(pooled), len(fc1_weight), len(fc2_weight)
        units, inverses = (batch, width), batch if norm == 'layer' else width
        alpha = (batch, len(assigned), outputs // len(assigned) - 1)
        return tuple(map(pooled.new_empty, (alpha, units, units, (inverses,), (batch, outputs))))

    @library.register_fake('mmkw::attend_backward')
    def _(grad: Tensor, pooled: Tensor, *rest: Any) -> list[Tensor]:
        fc1, norm, fc2, *_ = (tensor.shape for tensor in rest[:3])
        shapes = (pooled.shape, fc1, norm, norm, norm, fc2, fc2[:1])
        return [pooled.new_empty(shape) for shape in shapes]

    def applied(x: Tensor, kernel: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        stride, padding, dilation, groups = settings
        if not stride:
            return torch.nn.functional.linear(x, kernel.squeeze(-1), bias)
        moved = [0] * len(stride)
        return torch.convolution(x, kernel, bias, stride, padding, dilation, False, moved, groups)

    @library.register_fake('mmkw::apply_kernels')
    def _(x: Tensor, kernels: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        return applied(x, kernels[0], bias, *settings[:4])

    @library.register_fake('mmkw::backward_kernels')
    def _(grad: Tensor, x: Tensor, kernel: Sequence[int], *_: Any) -> list[Tensor]:
        # Convolved at once, they would be one result, too.
        if math.prod(kernel[2:]) == 1:
            # Multiplied, not convolved: one result for all.
            return [x.new_empty(len(x), *kernel)]
        return [x.new_empty(1, *kernel) for _ in range(len(x))]

    @library.register_fake('mmkw::backward_images')
    def _(grad: Tensor, x: Tensor, kernels: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    @library.register_fake('mmkw::apply_to_image')
    def _(x: Tensor, *rest: Any) -> Tensor:
        cells, grid, bias, *settings = rest[-7:]
        kernel = cells.new_empty(assembled_shape(cells.shape[1:], grid))
        return applied(x, kernel, bias, *settings)

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        attention, cells, ctx.grid = inputs
        ctx.save_for_backward(attention, cells)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        attention, cells = ctx.saved_tensors
        rows = cut(grad, ctx.grid, cells.shape[1:])
        rows = rows.reshape(math.prod(attention.shape[:2]), cells.shape[1:].numel())
        grad_attention = (rows @ cells.flatten(1).t()).view(attention.shape)
        return grad_attention, (attention.flatten(0, 1).t() @ rows).view(cells.shape), None

    library.register_autograd('mmkw::mix_cells', backward, setup_context=setup_context)

    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.mmkw

    @register_flop_formula([ops.mix_cells, ops.mix_cells_into])
    def _(attention: Sequence[int], cells: Sequence[int], *_: Any, **__: Any) -> int:
        return flops_of_mixing(attention, cells)

    @register_flop_formula(ops.mix_backward)
    def _(
        gradients: Any,
        attention: Sequence[int],
        cells: Sequence[int],
        grid: Any,
        kernels: Any,
        *_: Any,
        **__: Any,
    ) -> int:
        return flops_of_mixing(attention, cells) * (1 if kernels is None else 2)

    @register_flop_formula(ops.add_to_cells)
    def _(weights: Sequence[int], rows: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * weights[1] * math.prod(rows)

    @register_flop_formula(ops.bmm)
    def _(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(a) * b[2]

    @register_flop_formula(ops.attend)
    def _(pooled: Sequence[int], fc1: Sequence[int], *rest: Any, **__: Any) -> int:
        *_, fc2, _, _, _, _ = rest
        return 2 * pooled[0] * (math.prod(fc1) + math.prod(fc2))

    @register_flop_formula(ops.attend_to_learn)
    def _(pooled: Sequence[int], fc1: Sequence[int], *rest: Any, **__: Any) -> int:
        fc2 = rest[3]
        return 2 * pooled[0] * (math.prod(fc1) + math.prod(fc2))

    @register_flop_formula(ops.attend_backward)
    def _(grad: Any, pooled: Sequence[int], *rest: Any, **__: Any) -> int:
        fc1, _, fc2, *_ = rest
        return 4 * pooled[0] * (math.prod(fc1) + math.prod(fc2))


if MISSING is None:
    _register()

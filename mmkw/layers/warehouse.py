"""Warehouses: the parameters that layers share."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import modes
from .partition import WarehousePartition, is_comparator
from .warm_start import check_start_tau


class CellList(nn.ParameterList):
    """The cells of all warehouses, a list of ``Tensor[cells, cell_out, cell_in, *cell_kernel]``.

    ``torch.nn.utils.prune`` and parametrisations work on this list as on any module. The names of
    its parameters are ``'0'``, ``'1'``, ...
    """

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        """The current cells of a warehouse."""
        # Pruning computes pruned cells in a forward pre-hook. A list has no forward pass, so the
        # hooks run when the cells are read.
        for hook in modes.computing_hooks(self):
            hook(self, ())
        return super().__getitem__(index)

    def plain(self, index: int) -> nn.Parameter | None:
        """The cells of a warehouse; None if they are pruned, parametrised or quantized."""
        return self._parameters.get(str(index))

    @property
    def is_plain(self) -> bool:
        """Whether all cells are parameters: none are pruned or parametrised."""
        return all(self.plain(index) is not None for index in range(len(self)))

    def parameters_of(self, index: int) -> list[nn.Parameter]:
        """The parameters that the cells of a warehouse are computed from, or the plain cells."""
        plain = self.plain(index)
        if plain is not None:
            return [plain]
        own = re.compile(rf'(parametrizations\.)?{index}(_.*|\..*)?')
        return [parameter for name, parameter in self.named_parameters() if own.fullmatch(name)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'CellList':
        """Moves and casts the cells, but ignores a memory format.

        ``Module.to(memory_format=...)`` would change every tensor of four or five dimensions.
        """

        def apply(tensor: Tensor) -> Tensor:
            # Vectors are those of a spectral norm.
            return fn(tensor.flatten(1)).view(tensor.shape) if tensor.dim() > 2 else fn(tensor)

        return super()._apply(apply, recurse)


class WarehouseManager(nn.Module):
    """Owns the kernel cells of all warehouses of a network (paper, section 3.3).

    The manager is a submodule of the network, and only the manager registers the cells. The layers
    refer to the manager without registering it. So every cell is optimised, saved, moved and
    reduced over processes exactly once.

    Args:
        partitions: The warehouses, in the order of their index.
        start_tau: The temperature at which a static checkpoint starts the network, 0 or 1; see
            :func:`~mmkw.layers.warm_start`.

    Attributes:
        partitions: The warehouses, as a tuple.
        start_tau: The temperature of a warm start.
        keeps_start: Whether the cells keep their start when an initialiser sets a static kernel.
            True for the paper's networks, False by default.
        weights: CellList of ``Tensor[cells, cell_out, cell_in, *cell_kernel]``.
        stays_frozen: Whether the cells stay frozen, whatever their layers do: after
            ``requires_grad_(False)`` of the manager itself.
        follow_layers: Freezes and thaws the cells as their layers are now, where that is wanted.
    """

    stays_frozen = False
    follow_layers: Callable[[], None] | None = None

    def __init__(self, partitions: Sequence[WarehousePartition], start_tau: float = 0.0) -> None:
        super().__init__()
        self.start_tau = check_start_tau(start_tau)
        self.keeps_start = False
        self.partitions = tuple(partitions)
        self.weights = CellList(
            nn.Parameter(torch.empty(partition.num_cells, *partition.cell_shape))
            for partition in self.partitions
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts the cells of every layer by Kaiming normal (fan_out, relu).

        The cells of a layer are parts of one kernel. But those of a comparator are whole kernels.
        """
        for partition, weight in zip(self.partitions, self.weights):
            for share in partition.layers:
                own = weight.detach()[share.start : share.start + share.own_cells]
                kernels = own if is_comparator(partition.options.method) else [own.flatten(0, 1)]
                for kernel in kernels if own.numel() else ():
                    nn.init.kaiming_normal_(kernel, mode='fan_out', nonlinearity='relu')

    def requires_grad_(self, requires_grad: bool = True) -> 'WarehouseManager':
        """Freezes or thaws the cells, whatever their layers do.

        Args:
            requires_grad: Whether the cells learn.
        """
        self.stays_frozen = not requires_grad
        return super().requires_grad_(requires_grad)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of any module. Who looks at the parameters of a network asks for its modules first.

        So an optimizer that is given what learns has the cells of layers that have just been
        thawed.
        """
        if self.follow_layers is not None and not modes.is_compiling():
            self.follow_layers()
        return super().named_modules(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'WarehouseManager':
        """Starts cells that had no values before, as of a network made on the meta device."""
        had_none = any(cells.is_meta for cells in self.weights.parameters())
        super()._apply(fn, recurse)
        if had_none and not any(cells.is_meta for cells in self.weights.parameters()):
            self.reset_parameters()
        return self

    def forward(self, x: Any) -> Any:
        """Returns its input. In a ``torch.fx`` graph this call makes the manager a submodule."""
        return x

    def extra_repr(self) -> str:
        """One line per warehouse: name, cells, layers."""
        return '\n'.join(
            f'{p.name}: {p.num_cells} cells {p.cell_shape}, {len(p.layers)} layers'
            for p in self.partitions
        )


def fault_of(values: Any, own: Tensor, shape: Sequence[int] | None = None) -> str | None:
    """Describes what is wrong with stored cells, or with a static kernel for a warm start.

    Args:
        values: The value in the state dict.
        own: The tensor that is to be loaded. Its dtype and its device decide what is checked.
        shape: The expected shape; by default the shape of ``own``. Values of another shape are not
            checked here, because the caller reports wrong shapes.

    Returns:
        The end of a sentence that begins with the tensor's name; None if nothing is wrong.
    """
    if not isinstance(values, Tensor):
        return f'is a {type(values).__name__}, not a tensor'
    if values.is_quantized:
        return 'is quantized; dequantize() it'
    if values.layout is not torch.strided:
        return 'is sparse; to_dense() gives its values'
    if values.is_meta and not own.is_meta:
        return 'is on the meta device, where it has no values'
    if values.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f'is of {values.dtype}, not of real numbers'
    if own.is_meta or values.shape != torch.Size(own.shape if shape is None else shape):
        return None
    wrong = int((~values.to(own.dtype).isfinite()).sum())
    if wrong:
        return f'has {wrong} of {values.numel()} values that are NaN or infinite in {own.dtype}'
    return None

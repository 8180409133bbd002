"""The gradient of a warehouse, summed up over its layers before autograd gets it.

Autograd alone would make one gradient of the whole warehouse for every layer, and add them up.
Here all layers of one forward pass have the same *token* as an input. The token is an empty tensor
that is computed from the cells. In the backward pass every layer adds its part to a sum in place,
and gives the token no gradient. After the last layer, autograd calls the token's backward, which
returns the sum as the gradient of the cells.

A sum belongs to one backward pass, whose number is its key. A sum also belongs to the graph,
because only the graph holds it. A sum is made only if the backward pass will reach the token, which
takes the sum. If the pass fails, the sum is freed with the graph.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import modes
from .memory import recycled
from .mixing import Mixing

# The token of each tensor of cells, by the identity of the tensor, for as long as a layer's graph
# holds the token. Nothing refers to the cells when no graph does: PyTorch's `swap_tensors` asks.
_tokens: WeakValueDictionary[int, 'Token'] = WeakValueDictionary()


class Token:
    """The common input of all layers of a warehouse in one graph.

    Args:
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel] that needs a gradient.

    Attributes:
        tensor: The empty tensor that autograd sees as an input of every layer.
    """

    def __init__(self, cells: Tensor) -> None:
        # Held, so that no other tensor has the same identity.
        self._cells = cells
        self._sums: dict[int, CellSum] = {}
        self._packing = Packing()
        self.tensor = _HandOver.apply(cells, self._sums, self._packing)

    @staticmethod
    def of(cells: Tensor) -> 'Token':
        """The token that other layers of the graph hold, or a new token."""
        token = _tokens.get(id(cells))
        # A network that is cast keeps its parameters, with other values.
        if token is None or (token.tensor.dtype, token.tensor.device) != (
            cells.dtype,
            cells.device,
        ):
            token = Token(cells)
            _tokens[id(cells)] = token
        return token

    def is_awaited(self) -> bool:
        """Whether the current backward pass needs the gradient of the cells."""
        return modes.will_run(self.tensor.grad_fn)

    def packed(self, pack: Callable[[Tensor], Tensor], sample_map: object) -> Tensor:
        """What is made of the cells for all layers of a pass; see :class:`Packing`.

        Args:
            pack: Makes it, the same for all layers.
            sample_map: The map of the layer that asks; every layer has one for itself.
        """
        return self._packing.of(self._cells, pack, sample_map)

    def sum(self, mixing: Mixing) -> 'CellSum':
        """The sum of the current backward pass."""
        task = modes.backward_pass()
        if task not in self._sums:
            self._sums[task] = CellSum(mixing.cells)
        return self._sums[task]


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cells: Tensor, sums: dict[int, 'CellSum'], packing: 'Packing') -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.packing = sums, packing
        return cells.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        ctx.packing.clear()
        total = ctx.sums.pop(modes.backward_pass(), None)
        return (total if total is None else total.total()), None, None


class Packing:
    """What is made of cells for all layers of a forward pass and the backward pass after it.

    Fused optimizers, and what writes to ``cells.data``, change cells without a trace. So it is made
    anew where such a change may lie between: for a forward pass after a backward pass, where a
    layer comes again, since that may be the next forward pass (or a head that is used on several
    levels, which costs little beside mixing), and for every further backward pass. What is not
    seen: such a change between two forward passes, both with gradients and without a backward pass
    between them, that have no layer in common.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets what was made: the gradient of the cells is complete."""
        self._made: Tensor | None = None
        self._state: tuple[int, int] | None = None
        self._sample_maps: set[int] = set()
        self._task: int | None = None

    def of(self, cells: Tensor, pack: Callable[[Tensor], Tensor], sample_map: object) -> Tensor:
        """What was made of the cells in this pass, or is made now; see :meth:`Token.packed`."""
        state, made = (cells._version, cells.data_ptr()), self._made
        task = modes.backward_pass()
        if task < 0:
            goes_on = self._task is None and id(sample_map) not in self._sample_maps
        else:
            # An activation that is computed again asks during the backward pass, too.
            goes_on = self._task in (None, task)
        if made is None or state != self._state or not goes_on:
            self.clear()
            made = pack(cells.detach())
            self._made, self._state = made, state
        if task < 0:
            self._sample_maps.add(id(sample_map))
        else:
            self._task = task
        return made


class CellSum:
    """The gradient of the cells, as a sum over layers.

    A layer's part is the product of its attentions and the gradients of its kernels, cut into
    cells. Adding one part would be a pass over the whole warehouse for little arithmetic. So parts
    wait until there are enough, and one product adds them all.

    Args:
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel].
    """

    # The most bytes of kernel gradients that wait.
    WAITING_BYTES = 48 << 20

    def __init__(self, cells: Tensor) -> None:
        # Detached, because the graph holds this sum: the sum must not hold the graph.
        self._cells = cells.detach()
        self._add_to_cells = Mixing.add_to_cells
        self._sum: Tensor | None = None
        self._rows: Tensor | None = None
        self._weights: list[Tensor] = []
        self._waiting = 0

    def place(self, mixing: Mixing, attention: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Gives memory in which the gradients of some kernels, cut into cells, can wait.

        Args:
            mixing: What calls, and adds them to the gradient of the cells.
            attention: Tensor[images, mixtures, cells], the attentions of these kernels.
            dtype: Precision of the gradients.

        Returns:
            Tensor[images, mixtures, cell_out, cell_in, *cell_kernel]. The caller fills it and then
            calls :meth:`add`. ``None`` if the gradients are too large to wait.
        """
        if mixing.add_to_cells is not self._add_to_cells:
            self._flush()
            self._add_to_cells = mixing.add_to_cells
        cell = self._cells.shape[1:]
        count = attention.shape[:2].numel()
        fitting = self.WAITING_BYTES // (cell.numel() * dtype.itemsize)
        if count > fitting:
            return None
        if self._rows is None or self._rows.dtype != dtype:
            self._flush()
            self._rows = recycled(self._cells, (fitting, *cell), dtype)
        if self._waiting + count > fitting:
            self._flush()
        rows = self._rows[self._waiting : self._waiting + count]
        return rows.view(*attention.shape[:2], *cell)

    def add(self, attention: Tensor, rows: Tensor, waits: bool) -> None:
        """Adds the part of some images of a layer.

        Args:
            attention: Tensor[images, mixtures, cells].
            rows: Tensor[images, mixtures, cell_out, cell_in, *cell_kernel].
            waits: Whether ``rows`` is the memory that :meth:`place` has just given.
        """
        weights = attention.detach().flatten(0, 1)
        if waits:
            self._weights.append(weights)
            self._waiting += weights.shape[0]
        else:
            self._add_product(weights, rows.flatten(0, 1))

    def total(self) -> Tensor | None:
        """The sum of everything added, shaped like the cells; None if nothing was added."""
        self._flush()
        return self._sum

    def _flush(self) -> None:
        if self._rows is not None and self._waiting:
            self._add_product(torch.cat(self._weights), self._rows[: self._waiting])
            self._weights, self._waiting = [], 0

    def _add_product(self, weights: Tensor, rows: Tensor) -> None:
        begin = self._sum is None
        if self._sum is None:
            self._sum = recycled(self._cells, self._cells.shape)
        self._add_to_cells(weights, rows, self._sum, begin)

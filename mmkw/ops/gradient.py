"""The gradient of a warehouse, summed up over its layers before autograd sees it.

Autograd alone would make one gradient of the whole warehouse for each of its layers and add them
up. Here the layers of one forward pass hold the same *token*, an empty tensor made from the cells;
by it autograd knows that the cells depend on all of them. In the backward pass a layer adds its
part to a sum in place and gives its token no gradient; when the last layer is done, autograd calls
the token's backward, which hands the sum over.

A sum belongs to one backward pass and to the graph: to the first by its key, to the second because
nothing but the graph holds it. It is made only in a pass that will come to the token, hence is
handed over, unless the pass fails; then it goes with the graph.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import modes
from .mixing import Mixing

# The token of the cells that are in use, for as long as a layer's graph holds it.
_tokens: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Token:
    """What the layers of a warehouse have in common in one graph.

    Args:
        cells: Tensor[cells, cell_out, cell_in, *cell_kernel] that needs a gradient.

    Attributes:
        tensor: What autograd sees of it, an input of every layer.
    """

    def __init__(self, cells: Tensor) -> None:
        self._sums: dict[int, CellSum] = {}
        self.tensor = _HandOver.apply(cells, self._sums)

    @staticmethod
    def of(cells: Tensor) -> 'Token':
        """The token that other layers hold, or a new one."""
        reference = _tokens.get(cells)
        token = reference() if reference is not None else None
        if token is None:
            token = Token(cells)
            _tokens[cells] = weakref.ref(token)
        return token

    def is_awaited(self) -> bool:
        """Whether the backward pass that is running wants the gradient of the cells."""
        return modes.will_run(self.tensor.grad_fn)

    def sum(self, mixing: Mixing) -> 'CellSum':
        """The sum of the backward pass that is running."""
        task = modes.backward_pass()
        if task not in self._sums:
            self._sums[task] = CellSum(mixing)
        return self._sums[task]


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cells: Tensor, sums: dict[int, 'CellSum']) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sums = sums
        return cells.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        total = ctx.sums.pop(modes.backward_pass(), None)
        return (total if total is None else total.total()), None


class CellSum:
    """A sum of the parts of layers.

    A layer's part is the product of its attentions and the cut gradients of its kernels. Alone it
    would be a pass over the whole warehouse for few arithmetic operations, so parts are collected
    and added together, by one product, when there are enough of them.

    Args:
        mixing: Of the first layer, with the cells.
    """

    # Of kernel gradients that wait.
    WAITING_BYTES = 48 << 20

    def __init__(self, mixing: Mixing) -> None:
        self._add_to_cells = mixing.add_to_cells
        # Detached: what waits must not hold the graph that holds this sum.
        self._cells = mixing.cells.detach()
        self._sum: Tensor | None = None
        self._rows: Tensor | None = None
        self._weights: list[Tensor] = []
        self._waiting = 0

    def place(self, attention: Tensor) -> Tensor | None:
        """Where the gradients of some kernels, cut into cells, can wait.

        Args:
            attention: Tensor[images, mixtures, cells], that the kernels were mixed by.

        Returns:
            Tensor[images, mixtures, cell_out, cell_in, *cell_kernel], to be filled before it is
            added; ``None`` where there are enough for a product of their own.
        """
        cell = self._cells[0]
        count = attention.shape[:2].numel()
        fitting = self.WAITING_BYTES // (cell.numel() * cell.element_size())
        if count > fitting:
            return None
        if self._rows is None:
            self._rows = cell.new_empty(fitting, *cell.shape)
        if self._waiting + count > fitting:
            self._flush()
        rows = self._rows[self._waiting : self._waiting + count]
        return rows.unflatten(0, attention.shape[:2])

    def add(self, attention: Tensor, rows: Tensor, waits: bool) -> None:
        """Adds the part of some images of a layer.

        Args:
            attention: Tensor[images, mixtures, cells].
            rows: Tensor[images, mixtures, cell_out, cell_in, *cell_kernel].
            waits: Whether ``rows`` are in the place last given.
        """
        weights = attention.detach().flatten(0, 1)
        if waits:
            self._weights.append(weights)
            self._waiting += len(weights)
        else:
            self._add_product(weights, rows.flatten(0, 1))

    def total(self) -> Tensor:
        """The sum of everything added, shaped like the cells."""
        self._flush()
        return self._sum

    def _flush(self) -> None:
        if self._waiting:
            self._add_product(torch.cat(self._weights), self._rows[: self._waiting])
            self._weights, self._waiting = [], 0

    def _add_product(self, weights: Tensor, rows: Tensor) -> None:
        begin = self._sum is None
        if begin:
            self._sum = torch.empty_like(self._cells, memory_format=torch.contiguous_format)
        self._add_to_cells(weights, rows, self._sum, begin)

"""Memory that a thread keeps from call to call."""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_of_thread = threading.local()


class Scratch:
    """Memory for what a call needs for a moment, and the next call again.

    On the CPU tens of megabytes of fresh pages, layer by layer, would cost as much as mixing.
    Elsewhere PyTorch's allocator keeps what is freed. What lies in a piece may be lost when the
    same thread next takes one of the same use.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, torch.dtype], Tensor] = {}

    @staticmethod
    def of_thread() -> 'Scratch':
        """The one of the calling thread."""
        if not hasattr(_of_thread, 'scratch'):
            _of_thread.scratch = Scratch()
        return _of_thread.scratch

    def take(self, like: Tensor, shape: Sequence[int], use: str) -> Tensor:
        """A piece of memory.

        Args:
            like: Tensor of the device and the dtype that are wanted; no subclass of ``Tensor``.
            shape: Of the result.
            use: What for; memory of different uses is apart.
        """
        if like.device.type != 'cpu':
            return like.new_empty(shape)
        size = math.prod(shape)
        memory = self._pieces.get((use, like.dtype))
        if memory is None or memory.numel() < size:
            # It outlives the mode it is made in.
            with torch.inference_mode(False):
                memory = torch.empty(size, dtype=like.dtype, device='cpu')
            self._pieces[use, like.dtype] = memory
        return memory[:size].view(shape)

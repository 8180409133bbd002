"""Memory that a thread reuses from call to call."""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_of_thread = threading.local()


class Scratch:
    """Memory for temporary results, which the next call uses again.

    On the CPU fresh memory of tens of megabytes for every layer would cost as much time as mixing.
    On other devices PyTorch's allocator keeps freed memory, so this class allocates there. The
    content of a piece may be lost when the same thread takes another piece for the same use.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, torch.dtype], Tensor] = {}

    @staticmethod
    def of_thread() -> 'Scratch':
        """The memory of the calling thread."""
        if not hasattr(_of_thread, 'scratch'):
            _of_thread.scratch = Scratch()
        return _of_thread.scratch

    def take(
        self, like: Tensor, shape: Sequence[int], use: str, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Takes a piece of memory.

        Args:
            like: A tensor with the device of the result; not of a subclass.
            shape: Shape of the result.
            use: Name of the use. Pieces for different uses do not overlap.
            dtype: Of the result; by default that of ``like``.
        """
        dtype = dtype or like.dtype
        if like.device.type != 'cpu':
            return like.new_empty(shape, dtype=dtype)
        size = math.prod(shape)
        memory = self._pieces.get((use, dtype))
        if memory is None or memory.numel() < size:
            # The memory outlives an inference mode, so it must not be an inference tensor.
            with torch.inference_mode(False):
                memory = torch.empty(size, dtype=dtype, device='cpu')
            self._pieces[use, dtype] = memory
        return memory[:size].view(shape)

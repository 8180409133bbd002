"""Memory that a thread reuses from call to call."""

import math
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_of_thread = threading.local()

# Larger tensors glibc maps anew each time they are made. The first touch of a page costs as much
# as reading it many times.
_MAPPED_BYTES = 32 << 20
# A free piece that no tensor could use so many times in a row goes.
_IDLE_CALLS = 100
_CACHE_LINE = 64


class _Piece:
    """Memory for one tensor at a time.

    Args:
        size: In bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.idle = 0
        self._buffer = bytearray(size + _CACHE_LINE)
        place = torch.frombuffer(self._buffer, dtype=torch.uint8).data_ptr()
        self._offset = -place % _CACHE_LINE

    def is_free(self) -> bool:
        """Whether the last tensor is gone, and all that shared its memory."""
        # References of this object and of the call; a tensor's memory has one, too.
        return sys.getrefcount(self._buffer) <= 2

    def as_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in this memory, for as long as the tensor lives."""
        count = math.prod(shape)
        memory = torch.frombuffer(self._buffer, dtype=dtype, count=count, offset=self._offset)
        return memory.view(shape)


def recycled(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Makes an empty tensor; on the CPU a large one lies where one lay that is gone.

    Args:
        like: A tensor with the device of the result; not of a subclass.
        shape: Shape of the result.
        dtype: Of the result; by default that of ``like``.
    """
    dtype = dtype or like.dtype
    size = math.prod(shape) * dtype.itemsize
    if like.device.type != 'cpu' or size < _MAPPED_BYTES:
        return like.new_empty(shape, dtype=dtype)
    pieces: list[_Piece] = _of_thread.__dict__.setdefault('pieces', [])
    free = [piece for piece in pieces if piece.is_free()]
    fitting = [piece for piece in free if size <= piece.size <= 1.25 * size]
    if not fitting:
        fitting = [_Piece(size)]
        pieces += fitting
    chosen = min(fitting, key=lambda piece: piece.size)
    for piece in free:
        piece.idle += 1
    chosen.idle = 0
    pieces[:] = [piece for piece in pieces if piece.idle < _IDLE_CALLS]
    return chosen.as_tensor(shape, dtype)


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

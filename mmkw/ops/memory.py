"""Memory that is kept from call to call."""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_kept = threading.local()


def scratch(like: Tensor, shape: Sequence[int], use: str) -> Tensor:
    """Memory whose content may be lost when the same thread next asks for some of the same use.

    On the CPU a thread has one piece of it for every use, which it keeps: tens of megabytes of
    fresh pages, layer by layer, would cost as much as mixing. Elsewhere PyTorch's allocator keeps
    what is freed.

    Args:
        like: Tensor of the device and the dtype that are wanted.
        shape: Of the result.
        use: What for; memory of different uses is apart.
    """
    if like.device.type != 'cpu':
        return like.new_empty(shape)
    size = math.prod(shape)
    memory = getattr(_kept, use, None)
    if memory is None or memory.dtype != like.dtype or memory.numel() < size:
        memory = torch.empty(size, dtype=like.dtype)
        setattr(_kept, use, memory)
    return memory[:size].view(shape)

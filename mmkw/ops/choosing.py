"""Chooses how PyTorch convolves a batch, by measurement on a GPU and by a rule elsewhere.

As PyTorch's ``cudnn.benchmark`` does, every way is timed once for each kind of shape, and the
fastest is remembered. Sizes of images fall into few classes, since detectors see many. Where all
runs must compute the same bits (``torch.use_deterministic_algorithms``,
``torch.backends.cudnn.deterministic``), and while a CUDA graph is captured, nothing is timed.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# The kinds of devices on which ways are timed.
TIMED = {'cuda'}
_RUNS = 3

_chosen: dict[tuple, str] = {}


def forget() -> None:
    """Forgets all measurements, such as after a change of the device's settings."""
    _chosen.clear()


def measured() -> dict[tuple, str]:
    """The ways chosen so far, by what they compute and for which kind of shape."""
    return dict(_chosen)


def choose(kind: tuple, x: Tensor, rule: str, ways: Mapping[str, Callable[[], Any]]) -> str:
    """Chooses the fastest way to compute something.

    Args:
        kind: What is computed: hashable, without the size of the images.
        x: The images: Tensor[batch, channels, *size].
        rule: The way that is taken where nothing may be timed.
        ways: What computes, by the name of the way. The results are not used.

    Returns:
        The name of a way.
    """
    way = chosen(kind, x)
    if way is None:
        if not may_choose(x) or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return rule
        way = _chosen[_key(kind, x)] = _fastest(x, rule, ways)
    return way


def chosen(kind: tuple, x: Tensor) -> str | None:
    """The way that :func:`choose` has chosen for such images; None before that.

    Args:
        kind: As in :func:`choose`.
        x: The images.
    """
    return _chosen.get(_key(kind, x)) if may_choose(x) else None


def may_choose(x: Tensor) -> bool:
    """Whether there is a choice: several images, and no need to compute the same bits each run.

    Args:
        x: The images.
    """
    return (
        len(x) > 1
        and x.device.type in TIMED
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.backends.cudnn.deterministic
    )


def _key(kind: tuple, x: Tensor) -> tuple:
    sizes = map(_class_of, (len(x), x.shape[2:].numel()))
    return (*kind, x.device, x.dtype, x.is_contiguous(), *sizes)


def _class_of(size: int) -> int:
    """Classes of sizes, two for each power of two; small sizes have their own."""
    if size <= 4:
        return size
    bits = size.bit_length() - 2
    return size >> bits << bits


@torch.no_grad()
def _fastest(x: Tensor, rule: str, ways: Mapping[str, Callable[[], Any]]) -> str:
    seconds = {}
    for name, way in ways.items():
        try:
            way()
            seconds[name] = min(_time(x, way) for _ in range(_RUNS))
        except torch.OutOfMemoryError:
            # Another way may need less.
            continue
    return min(seconds, key=lambda name: seconds[name]) if seconds else rule


def _time(x: Tensor, way: Callable[[], Any]) -> float:
    """The time of a call on the device of ``x``, in a unit of the device."""
    if x.device.type == 'cpu':
        start = time.perf_counter()
        way()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    way()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)

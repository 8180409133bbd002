"""Whether checkpoints are only looked at: before a model with several parts loads any."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_only_checking: ContextVar[bool] = ContextVar('only checking', default=False)


@contextmanager
def only_checking() -> Iterator[None]:
    """Has checks of checkpoints refuse what they would refuse, and do nothing else."""
    token = _only_checking.set(True)
    try:
        yield
    finally:
        _only_checking.reset(token)


def is_only_checking() -> bool:
    """Whether nothing is to be changed, or written to the log."""
    return _only_checking.get()

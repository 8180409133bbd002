"""A mode in which checkpoints are checked but not loaded.

A model with several converted parts first checks all of them, and then loads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_only_checking: ContextVar[bool] = ContextVar('only checking', default=False)


@contextmanager
def only_checking() -> Iterator[None]:
    """Inside this context, checks of checkpoints raise their errors and do nothing else."""
    token = _only_checking.set(True)
    try:
        yield
    finally:
        _only_checking.reset(token)


def is_only_checking() -> bool:
    """Whether checks must change nothing and write nothing to the log."""
    return _only_checking.get()

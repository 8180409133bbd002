"""Reading checkpoint files, published and static ones too."""

from .errors import DamagedCheckpointError, UnsafeCheckpointError
from .guard import (
    CheckpointMismatchError,
    check_checkpoint,
    only_checking,
    stored_warehouses,
)
from .published import rewrite_published
from .reading import read_checkpoint

__all__ = [
    'CheckpointMismatchError',
    'DamagedCheckpointError',
    'UnsafeCheckpointError',
    'check_checkpoint',
    'only_checking',
    'read_checkpoint',
    'rewrite_published',
    'stored_warehouses',
]

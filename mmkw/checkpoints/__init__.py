"""Reading checkpoint files, published and static ones too."""

from .guard import CheckpointMismatchError, check_warehouses
from .loading import UnsafeCheckpointError, load_from_local

__all__ = [
    'CheckpointMismatchError',
    'UnsafeCheckpointError',
    'check_warehouses',
    'load_from_local',
]

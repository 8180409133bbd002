"""Reading checkpoint files, published and static ones too."""

from .guard import CheckpointMismatchError, check_checkpoint, stored_warehouses
from .loading import DamagedCheckpointError, UnsafeCheckpointError, load_from_local
from .published import rewrite_published

__all__ = [
    'CheckpointMismatchError',
    'DamagedCheckpointError',
    'UnsafeCheckpointError',
    'check_checkpoint',
    'load_from_local',
    'rewrite_published',
    'stored_warehouses',
]

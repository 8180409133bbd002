"""Reads checkpoint files: those of mmkw, the published ones, and those of static networks."""

from .errors import CheckpointMismatchError, DamagedCheckpointError, UnsafeCheckpointError
from .only_checking import only_checking
from .reading import read_checkpoint
from .recognising import check_checkpoint, stored_warehouses

__all__ = [
    'CheckpointMismatchError',
    'DamagedCheckpointError',
    'UnsafeCheckpointError',
    'check_checkpoint',
    'only_checking',
    'read_checkpoint',
    'stored_warehouses',
]

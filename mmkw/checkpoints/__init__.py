"""Reading checkpoint files."""

from .loading import UnsafeCheckpointError, load_from_local

__all__ = ['UnsafeCheckpointError', 'load_from_local']

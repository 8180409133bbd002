"""Reads checkpoint files as data: no code from a file runs, and errors describe the damage.

A file is parsed into records (:mod:`.pickles`). The records are checked, and tensors, arrays and
histories are built from them (:mod:`.values`). ``torch.load`` is not called.
"""

import os
import os.path as osp
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import default_restore_location

from .containers import Restore, read
from .errors import DamagedCheckpointError, UnsafeCheckpointError, shown

MapLocation = (
    str | torch.device | dict[str, str] | Callable[[torch.UntypedStorage, str], Any] | None
)


def read_checkpoint(
    source: str | os.PathLike | BinaryIO, map_location: MapLocation = None, name: str = ''
) -> dict[str, Any]:
    """Reads a checkpoint without running code from it.

    A checkpoint may hold tensors, plain containers, numbers, text, NumPy's arrays and numbers, and
    MMEngine's ``HistoryBuffer``. A command line (``argparse.Namespace``) becomes a dict, and so
    does a history where MMEngine is not installed. The formats are the old and the new one of
    ``torch.save``, and safetensors.

    Args:
        source: A path, in which ``~`` is expanded, or a seekable binary file.
        map_location: As in ``torch.load``.
        name: Name of the file for messages; by default the path.

    Returns:
        The checkpoint. A state dict under ``model`` is moved to ``state_dict``.

    Raises:
        TypeError: If ``source`` is neither a path nor a file.
        FileNotFoundError: If there is no such file.
        DamagedCheckpointError: If the file is truncated, altered, or not a checkpoint.
        UnsafeCheckpointError: If the file names other objects than the above.
        ImportError: If the file needs NumPy or safetensors, and that is not installed.

    Example:
        >>> path = f'{tempfile.mkdtemp()}/epoch_12.pth'
        >>> torch.save(dict(meta=dict(epoch=12), state_dict={}), path)
        >>> read_checkpoint(path, map_location='cpu')['meta']['epoch']
        12
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(osp.expanduser(source))
        name = name or str(source)
        if not path.exists():
            raise FileNotFoundError(f'Checkpoint {name} does not exist.')
        if not path.is_file():
            raise DamagedCheckpointError(f'Checkpoint {name} is a folder or a device, not a file.')
        with path.open('rb') as file:
            return read_checkpoint(file, map_location, name)
    if not hasattr(source, 'read'):
        raise TypeError(f'source must be a path or a binary file, got {source!r}.')
    restore = _restore(map_location)
    try:
        return _checked(read(source, restore))
    except _NotRestored as error:
        raise error.reason from error
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f'Checkpoint {name} {error}.') from error
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(
            f'Checkpoint {name} {error}, which could run code when loaded, and was refused. If you '
            'trust its source, read it once with torch.load(FILE, weights_only=False), take the '
            'dict of tensors from it, write torch.save(dict(state_dict=TENSORS), NEW_FILE) and use '
            'NEW_FILE.'
        ) from error
    except (OSError, ImportError):
        raise
    except Exception as error:
        # An error that no check expects. No code from the file has run.
        raise DamagedCheckpointError(
            f'Checkpoint {name} is damaged in an unusual way: {type(error).__name__}, '
            f'{shown(str(error))}.'
        ) from error


class _NotRestored(Exception):
    """A storage could not be moved to the caller's device. The file is not at fault."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _restore(map_location: MapLocation) -> Restore:
    """Makes the function that moves a storage as ``map_location`` asks."""
    if isinstance(map_location, dict):
        map_location = {key: str(torch.device(place)) for key, place in map_location.items()}
    elif isinstance(map_location, (str, torch.device)):
        map_location = str(torch.device(map_location))
    elif map_location is not None and not callable(map_location):
        raise TypeError(
            f'map_location must be a device, a dict of devices or a function, got {map_location!r}.'
        )

    def moved(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        if isinstance(map_location, dict):
            location = map_location.get(location, location)
        elif isinstance(map_location, str):
            location = map_location
        elif map_location is not None:
            result = map_location(storage, location)
            if result is not None:
                return result
        return default_restore_location(storage, location)

    def restore(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        try:
            return moved(storage, location)
        except Exception as error:
            raise _NotRestored(error) from error

    return restore


def _checked(checkpoint: Any) -> dict[str, Any]:
    """Checks that a checkpoint has or is a state dict, and puts it where MMEngine expects it."""
    if not isinstance(checkpoint, dict):
        raise DamagedCheckpointError(f'holds a {type(checkpoint).__name__}, not a state dict')
    # MMEngine expects ``state_dict``. The published ImageNet files have ``model``.
    named = 'model' in checkpoint and not isinstance(checkpoint['model'], torch.Tensor)
    if named and 'state_dict' not in checkpoint:
        checkpoint['state_dict'] = checkpoint.pop('model')
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, dict):
        raise DamagedCheckpointError(
            f'holds a {type(state).__name__} under state_dict, not a dict of tensors'
        )
    strange = [key for key in state if not isinstance(key, str)]
    if strange:
        raise DamagedCheckpointError(
            f'holds a state dict with a key that is no text but {shown(strange[0])}'
        )
    return checkpoint

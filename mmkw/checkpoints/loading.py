"""Loads checkpoint files safely, MMEngine's own included.

From torch 2.6 on ``torch.load`` runs no code from a file unless told to. MMEngine's files hold
its ``HistoryBuffer`` beside the tensors and cannot be resumed that way. The loader here allows just
what those files hold, and takes the place of MMEngine's for local files when mmkw is imported.
"""

import argparse
import os.path as osp
import pickle
import re
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.utils import digit_version

# Older releases read these files as MMEngine would: they have no list of allowed globals.
_SAFE = digit_version(torch.__version__) >= digit_version('2.6.0')
# Zip archives, and the pickles of torch before 1.6.
_STARTS = (b'PK', b'\x80')
_CUT_SHORT = re.compile('PytorchStreamReader|unexpected EOF')


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint that holds pickled objects beyond tensors and MMEngine's records."""


class DamagedCheckpointError(RuntimeError):
    """A file that is truncated, or no checkpoint at all."""


def _statistics_method(owner: type, name: str) -> Any:
    """Stands in for ``getattr``, by which pickle names the statistics of a HistoryBuffer."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is not allowed.')
    return getattr(owner, name)


def _allowed_globals() -> list:
    # The modules were renamed in NumPy 2; files written under either name are read under both.
    multiarray = np.zeros(0).__reduce__()[0].__module__
    renamed = {multiarray, 'numpy.core.multiarray', 'numpy._core.multiarray'}
    reconstruct, scalar = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in ('?bhilqBHILQefd' + 'U')}
    return [
        HistoryBuffer,
        # Classification checkpoints hold their command line.
        argparse.Namespace,
        (_statistics_method, 'builtins.getattr'),
        np.ndarray,
        bytes,  # an empty array
        np.dtype,
        *dtypes,
        *((reconstruct, f'{module}._reconstruct') for module in renamed),
        *((scalar, f'{module}.scalar') for module in renamed),
    ]


def load_from_local(filename: str, map_location: Any = None) -> dict:
    """Loads a local checkpoint without running code from it.

    Args:
        filename: Path; ``~`` is expanded.
        map_location: As in ``torch.load``.

    Returns:
        The checkpoint; a state dict under ``model`` is moved to ``state_dict``.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedCheckpointError: If the file is truncated or no checkpoint.
        UnsafeCheckpointError: With torch 2.6 or newer, if the file holds pickled objects other
            than tensors, plain containers, NumPy arrays and MMEngine's ``HistoryBuffer``.
    """
    path = osp.expanduser(filename)
    if not osp.isfile(path):
        raise FileNotFoundError(f'Checkpoint {filename} does not exist.')
    with open(path, 'rb') as file:
        start = file.read(16)
    if not start.startswith(_STARTS):
        raise DamagedCheckpointError(
            f'{filename} is no checkpoint: it begins with {start!r}. A web page or a Git LFS '
            'pointer saved in its place? Download the file again.'
        )
    try:
        checkpoint = _read(path, map_location)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f'Checkpoint {filename} holds {_foreign_globals(path)}, which could run code when '
            'loaded, and was refused. If you trust its source, read it once with '
            'torch.load(FILE, weights_only=False), take the dict of tensors from it, write '
            'torch.save(dict(state_dict=TENSORS), NEW_FILE) and use NEW_FILE.'
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        if isinstance(error, RuntimeError) and not _CUT_SHORT.search(str(error)):
            raise
        raise DamagedCheckpointError(
            f'Checkpoint {filename} is damaged: it ends early, after '
            f'{osp.getsize(path)} bytes. Download or copy it again.'
        ) from error
    if not isinstance(checkpoint, dict):
        raise DamagedCheckpointError(
            f'Checkpoint {filename} holds a {type(checkpoint).__name__}, not a state dict.'
        )
    # MMEngine looks for ``state_dict``; the published ImageNet files say ``model``.
    if 'model' in checkpoint and 'state_dict' not in checkpoint:
        checkpoint['state_dict'] = checkpoint.pop('model')
    return checkpoint


def _read(path: str, map_location: Any) -> Any:
    if not _SAFE:
        return torch.load(path, map_location=map_location)
    with torch.serialization.safe_globals(_allowed_globals()):
        return torch.load(path, map_location=map_location, weights_only=True)


def _foreign_globals(path: str) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # a file of torch < 1.6 does not say
        names = []
    return f'pickled objects ({", ".join(sorted(names)) or "of unknown type"})'


CheckpointLoader.register_scheme('', loader=load_from_local, force=True)

"""Writes files beside their place and renames them: a file is whole, or not there."""

import os
from contextlib import suppress
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

# What a file is called until it is whole.
UNFINISHED = '.part'


# The name for ``backend_args=dict(backend=...)``.
NAME = 'mmkw_whole_files'


@register_backend(NAME, force=True)
class WholeFileBackend(LocalBackend):
    """MMEngine's backend for local files, which an interruption cannot leave half written."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes a file; what was there before stays until the new one is on the disk.

        Args:
            obj: The content.
            filepath: Its place; the folder is made if it is missing.

        Raises:
            OSError: If there is no room, say; the unfinished file is removed.
        """
        folder = os.path.dirname(filepath)
        if folder:
            os.makedirs(folder, exist_ok=True)
        beside = f'{filepath}{UNFINISHED}'
        try:
            # Anew: what lies there may be a link to something else.
            with suppress(FileNotFoundError):
                os.remove(beside)
            with open(beside, 'xb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, filepath)
        except OSError as error:
            with suppress(OSError):
                os.remove(beside)
            raise OSError(
                error.errno,
                f'{filepath} of {len(obj) / 1e6:.1f} MB could not be written: {error.strerror}. '
                'Earlier checkpoints are untouched. Make room on the disk, and go on with resume '
                '(tools/train.py --resume)',
            ) from error

"""Writes files under another name and then renames them: a file is whole or does not exist."""

import os
from contextlib import suppress
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

# The ending of a file's name until the file is whole.
UNFINISHED = '.part'


# The name for ``backend_args=dict(backend=...)``.
NAME = 'mmkw_whole_files'


@register_backend(NAME, force=True)
class WholeFileBackend(LocalBackend):
    """MMEngine's backend for local files, but an interruption cannot leave half a file."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes a file. An older file stays until the new file is on the disk.

        Args:
            obj: The content.
            filepath: Path of the file. The folder is made if it is missing.

        Raises:
            OSError: If the file cannot be written, for example if the disk is full. The unfinished
                file is removed.
        """
        folder = os.path.dirname(filepath)
        if folder:
            os.makedirs(folder, exist_ok=True)
        beside = f'{filepath}{UNFINISHED}'
        try:
            # An old file of this name is removed, because it may be a link to another file.
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

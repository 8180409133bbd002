"""The hook that saves checkpoints so that an interrupted run can always resume."""

import os
import os.path as osp
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import isroutine
from string import Formatter
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from mmengine.config import ConfigDict
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import checkpoint_hook
from mmengine.registry import HOOKS

from .backend import NAME as WHOLE_FILES
from .backend import UNFINISHED, WholeFileBackend

_POINTER = 'last_checkpoint'


def take_place(theirs: ModuleType) -> None:
    """Replaces MMEngine's hook in its registry and in its modules.

    Args:
        theirs: The module ``mmengine.hooks.checkpoint_hook``.
    """
    HOOKS.register_module(name='CheckpointHook', module=CheckpointHook, force=True)
    theirs.CheckpointHook = CheckpointHook  # type: ignore[attr-defined]
    package = sys.modules['mmengine.hooks']
    if hasattr(package, 'CheckpointHook'):
        package.CheckpointHook = CheckpointHook  # type: ignore[attr-defined]


class CheckpointHook(checkpoint_hook.CheckpointHook):
    """MMEngine's hook with the same name and arguments, but safe to interrupt.

    Checkpoints and ``last_checkpoint`` are written under another name and then renamed. Older
    checkpoints are removed after that. So at every moment ``last_checkpoint`` names a whole
    checkpoint. ``last_checkpoint`` may still be missing or empty, or name a file that is missing or
    damaged. Then ``resume=True`` takes the newest whole checkpoint of the folder and warns.
    """

    # Steps of the checkpoints that are removed after the current save.
    _outdated: Sequence[int] = ()

    def before_run(self, runner: Any) -> None:
        """Finds the checkpoint to resume from, if MMEngine would search for one.

        Where there is none yet, the run starts with the weights that ``start_from`` of the config
        names, as it did the first time.

        Raises:
            DamagedCheckpointError: If there are checkpoints, but none of them is whole.
        """
        # MMEngine shares this default dict among runners, and writes resumed seeds into it.
        runner._randomness_cfg = dict(runner._randomness_cfg)
        if runner._load_from is not None:
            return
        if not runner._resume:
            runner._load_from = runner.cfg.get('start_from')
            return
        found: list[Any] = [None, None]
        if is_main_process():
            try:
                found[0] = self._newest(runner)
            except Exception as fault:
                # The error must not stop this process now: the other processes wait for a result.
                found[1] = fault
        broadcast_object_list(found)
        path, error = found
        if error is not None:
            raise error
        if path is None:
            runner._resume, runner._load_from = False, runner.cfg.get('start_from')
            runner.logger.info(f'No checkpoint in {runner.work_dir}: starting at the beginning.')
        else:
            runner._load_from = path

    def before_train(self, runner: Any) -> None:
        """Prepares the folder, and removes unfinished files of an interrupted run."""
        folder = self.out_dir or runner.work_dir
        local = self.file_client_args is None and self.backend_args is None
        if local and type(get_file_backend(folder)) is LocalBackend:
            self.backend_args: dict | None = dict(backend=WHOLE_FILES)
        super().before_train(runner)
        if local and is_main_process() and osp.isdir(self.out_dir):
            for name in os.listdir(self.out_dir):
                path = osp.join(self.out_dir, name)
                if name.endswith(f'.pth{UNFINISHED}') and not osp.isdir(path):
                    os.remove(path)

    @property
    def file_backend(self) -> Any:
        """MMEngine's backend, but it notes removals. :meth:`_removing_later` removes the files."""
        return self._backend

    @file_backend.setter
    def file_backend(self, backend: Any) -> None:
        self._backend = _RemovingLater(backend)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Also lists the checkpoint that is removed after this save; leaves out what is code.

        If the run is interrupted before the removal, the resumed run removes it. Some schedulers
        have a function in their state, and have it anew where they are made; it would make the
        checkpoint one that is not read.
        """
        info = checkpoint.get('message_hub', {}).get('runtime_info', {})
        if self._outdated and 'keep_ckpt_ids' in info:
            info['keep_ckpt_ids'] = [*self._outdated, *info['keep_ckpt_ids']]
        for name in ('meta', 'param_schedulers'):
            if name in checkpoint:
                checkpoint[name] = _as_data(checkpoint[name])

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        kept: Sequence[int] = getattr(self, 'keep_ckpt_ids', ())
        full = 0 < self.max_keep_ckpts == len(kept) and kept[-1] != step
        with self._removing_later():
            self._outdated = [kept[0]] if full else []
            # MMEngine does not write last_checkpoint safely. So it writes to a temporary folder,
            # and the file is written again below.
            with TemporaryDirectory() as folder:
                super()._save_checkpoint_with_step(_Elsewhere(runner, folder), step, meta)
            self._outdated = []
            if is_main_process():
                pointer = osp.join(runner.work_dir, _POINTER)
                WholeFileBackend().put(str(self.last_ckpt).encode(), pointer)

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        # Also called where nothing is trained, and so nothing is prepared or written: Runner.val().
        if self.save_best:
            with self._removing_later():
                super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _removing_later(self) -> Iterator[None]:
        """Delays removals until the new files are written. Removes only files of this hook."""
        backend = self.file_backend
        backend.depth += 1
        try:
            yield
        except BaseException:
            backend.removals.clear()
            raise
        finally:
            backend.depth -= 1
        if backend.depth == 0:
            best = getattr(self, 'best_ckpt_path_dict', {}).values()
            written = {self.last_ckpt, getattr(self, 'best_ckpt_path', None), *best}
            for remove, path in backend.removals:
                if path not in written and self._is_own(path):
                    remove(path)
            backend.removals.clear()

    def _is_own(self, path: str) -> bool:
        """Whether this hook could have written a file of this name in this place."""
        name = osp.basename(path)
        return bool(
            re.fullmatch(f'(best_.+_)?{self._numbers()}', name)
        ) and path == self.file_backend.join_path(self.out_dir, name)

    def _numbers(self) -> str:
        """A pattern of the names of checkpoints, with the group ``number``."""
        (text, field, _, _), *more = Formatter().parse(self.filename_tmpl)
        number = '' if field is None else r'(?P<number>\d+)'
        return re.escape(text) + number + ''.join(re.escape(part[0]) for part in more)

    def _newest(self, runner: Any) -> str | None:
        """The checkpoint to resume from; None if there is no checkpoint."""
        from ...checkpoints import DamagedCheckpointError, read_checkpoint

        folder = runner.work_dir
        # As MMEngine places them.
        if self.out_dir not in (None, folder):
            folder = osp.join(self.out_dir, osp.basename(runner.work_dir.rstrip(osp.sep)))
        named = _pointer(runner.work_dir)
        if named and ('://' in named or osp.isdir(named)):
            # It is in a remote store, or a folder written by DeepSpeed. MMEngine can read both.
            return named
        reason = f'{osp.join(runner.work_dir, _POINTER)} is missing or empty'
        if named:
            reason = f'{named}, which {_POINTER} names, does not exist'
        candidates = [named, osp.join(folder, osp.basename(named))] if named else []
        candidates += self._numbered(folder, named)
        damage = []
        for path in filter(osp.isfile, dict.fromkeys(candidates)):
            try:
                read_checkpoint(path, map_location='cpu')
            except DamagedCheckpointError as error:
                reason = str(error)
                damage.append(reason)
                continue
            if path != named:
                runner.logger.warning(f'Resuming from {path}, since: {reason}')
            return path
        if damage:
            raise DamagedCheckpointError(
                f'No whole checkpoint to resume from in {folder}: {" ".join(damage)} Remove these '
                'files to start at the beginning.'
            )
        return None

    def _numbered(self, folder: str, named: str) -> list[str]:
        """The checkpoints of a folder, the last one first, and none later than ``named``."""
        pattern = re.compile(self._numbers())
        numbers = {
            int(match['number']): name
            for name in (os.listdir(folder) if osp.isdir(folder) else [])
            if (match := pattern.fullmatch(name))
        }
        match = pattern.fullmatch(osp.basename(named))
        limit = int(match['number']) if match else max(numbers, default=0)
        return [osp.join(folder, numbers[n]) for n in sorted(numbers, reverse=True) if n <= limit]


def _as_data(value: Any) -> Any:
    """The same without functions, and with plain dicts for those of configs."""
    if type(value) in (dict, ConfigDict):
        return {name: _as_data(part) for name, part in value.items() if not isroutine(part)}
    if type(value) in (list, tuple):
        return type(value)(map(_as_data, value))
    return value


class _Elsewhere:
    """A runner with another work folder."""

    def __init__(self, runner: Any, work_dir: str) -> None:
        self._runner = runner
        self.work_dir = work_dir

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class _RemovingLater:
    """A file backend that notes removals instead of removing."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.depth = 0
        self.removals: list[tuple[Callable[[str], None], str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        """Notes the removal of a file."""
        self.removals.append((self._backend.remove, path))

    def rmtree(self, path: str) -> None:
        """Notes the removal of a folder."""
        self.removals.append((self._backend.rmtree, path))


def _pointer(work_dir: str) -> str:
    """The path in ``last_checkpoint``; empty if the file is missing or not text."""
    try:
        with open(osp.join(work_dir, _POINTER), encoding='utf-8') as file:
            return file.read().strip()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        return ''

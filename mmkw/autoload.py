"""Puts our reader and writer of checkpoints in the place of MMEngine's as soon as that is imported.

PyTorch calls :func:`install` at the end of ``import torch`` where mmkw is installed (the entry
point in ``setup.py``), ``import mmkw`` does it elsewhere. So a file is read as data also where
nobody has imported mmkw yet, as in an inferencer that loads its weights first. Only the standard
library is imported here.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# Modules of MMEngine: the last thing each defines, and ours that registers itself over what it
# registers. What is done is taken out.
_WAITING = {
    'mmengine.runner.checkpoint': ('find_latest_checkpoint', 'mmkw.engine.files.schemes'),
    'mmengine.hooks.checkpoint_hook': ('CheckpointHook', 'mmkw.engine.files.hook'),
}


def install() -> None:
    """Imports ours after MMEngine's modules: now where those are there, else when they are."""
    _catch_up()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _catch_up() -> None:
    for theirs, (last, ours) in list(_WAITING.items()):
        if hasattr(sys.modules.get(theirs), last) and _WAITING.pop(theirs, None):
            import_module(ours)


class _Finder(MetaPathFinder):
    """Finds MMEngine's modules as everyone does, and has ours imported after them."""

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # One of MMEngine's modules may have been the first to import PyTorch, and have ended since.
        _catch_up()
        if fullname not in _WAITING:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_both(module: ModuleType) -> None:
            execute(module)
            _catch_up()

        spec.loader.exec_module = execute_both
        return spec

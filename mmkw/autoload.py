"""Puts ours in the place of what MMEngine and mmcv have, as soon as that is imported.

These are the reader and the writer of checkpoints, the walk that fuses BatchNorms, and what asks
constructors of optimizers.

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
from operator import attrgetter
from types import ModuleType

# Modules of MMEngine and mmcv: the last thing that each defines, what in it becomes ours, and our
# module whose ``take_place`` does that.
_OURS = {
    'mmengine.runner.checkpoint': (
        'find_latest_checkpoint',
        'load_from_local',
        'mmkw.engine.files.schemes',
    ),
    'mmengine.hooks.checkpoint_hook': (
        'CheckpointHook',
        'CheckpointHook',
        'mmkw.engine.files.hook',
    ),
    'mmcv.cnn.utils.fuse_conv_bn': (
        'fuse_conv_bn',
        'fuse_conv_bn',
        'mmkw.engine.fusing',
    ),
    'mmengine.optim.optimizer.default_constructor': (
        'DefaultOptimWrapperConstructor',
        'DefaultOptimWrapperConstructor.__call__',
        'mmkw.engine.constructors',
    ),
}
# Those at which we are, since importing ours imports other things.
_busy: set[str] = set()


def install() -> None:
    """Imports ours after their modules: now where those are there, else when they are."""
    _catch_up()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _catch_up() -> None:
    for name, (last, taken, ours) in _OURS.items():
        theirs = sys.modules.get(name)
        if name in _busy or not hasattr(theirs, last):
            continue
        # Asked of the module as it is: it may have been loaded again.
        if attrgetter(taken)(theirs).__module__ != ours:
            _busy.add(name)
            try:
                import_module(ours).take_place(theirs)
            finally:
                _busy.remove(name)


class _Finder(MetaPathFinder):
    """Finds their modules as everyone does, and has ours imported after them."""

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # One of their modules may have been the first to import PyTorch, and have ended since.
        _catch_up()
        if fullname not in _OURS:
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

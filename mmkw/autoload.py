"""Replaces parts of MMEngine, mmcv and Ultralytics by ours, as soon as those are imported.

These parts are the reader and the writer of checkpoints, the function that fuses BatchNorms, the
call of constructors of optimizers, and what looks up the names of configs and models.

If mmkw is installed, PyTorch calls :func:`install` at the end of ``import torch`` (the entry point
in ``setup.py``). Otherwise ``import mmkw`` calls it. So a checkpoint is read as data even if nobody
has imported mmkw yet. An inferencer, for example, may load its weights first. This module imports
only the standard library.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from operator import attrgetter
from types import ModuleType

# For each module of another library: the last name that it defines, the name that we replace or the
# table that we add to, and our module whose ``take_place`` does this.
_OURS = {
    'mmengine.config.utils': (
        '_gather_abs_import_lazyobj',
        'MODULE2PACKAGE',
        'mmkw.engine.names',
    ),
    'mmengine.config.config': (
        'read_base',
        'Config._get_cfg_path',
        'mmkw.engine.names',
    ),
    'mmengine.infer.infer': (
        'BaseInferencer',
        'BaseInferencer._load_model_from_metafile',
        'mmkw.engine.names',
    ),
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
    'ultralytics.nn.tasks': (
        'guess_model_task',
        'fuse_conv_and_bn',
        'mmkw.engine.ultralytics',
    ),
}
# Modules whose parts are being replaced. Our modules import others, which calls _catch_up again.
_busy: set[str] = set()


def install() -> None:
    """Replaces the parts of modules that are imported now, and of the others on their import."""
    _catch_up()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _catch_up() -> None:
    for name, (last, taken, ours) in _OURS.items():
        theirs = sys.modules.get(name)
        if name in _busy or not hasattr(theirs, last):
            continue
        # The current module is checked on every call, because it may have been reloaded.
        part = attrgetter(taken)(theirs)
        is_ours = 'mmkw' in part if isinstance(part, dict) else part.__module__ == ours
        if not is_ours:
            _busy.add(name)
            try:
                import_module(ours).take_place(theirs)
            finally:
                _busy.remove(name)


class _Finder(MetaPathFinder):
    """Finds the modules as usual, and replaces their parts after they have been executed."""

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # A module that itself imported PyTorch was incomplete in install(). It may be complete now.
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

        spec.loader.exec_module = execute_both  # type: ignore[method-assign]
        return spec

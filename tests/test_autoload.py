"""Checkpoints are read as data from the moment MMEngine is imported, whoever imports it.

And batch norms are fused by mmkw.
"""

import subprocess
import sys
from importlib import metadata

import pytest
import torch
from conftest import exhaustively

HOSTILE = """
import os
class Attack:
    def __reduce__(self):
        return os.mkdir, ({made!r},)
"""
LOAD = """
from mmengine.runner import load_checkpoint
from torch import nn
try:
    load_checkpoint(nn.Linear(1, 1), {path!r})
except RuntimeError as error:
    print(type(error).__name__)
"""
# The module of every function that fuses batch norms.
FUSING = """
import mmcv.cnn, mmcv.cnn.utils
own = globals().get('fuse_conv_bn', mmcv.cnn.fuse_conv_bn)
print(*{f.__module__ for f in (own, mmcv.cnn.fuse_conv_bn, mmcv.cnn.utils.fuse_conv_bn)})
"""
needs_entry_point = pytest.mark.skipif(
    'mmkw' not in metadata.entry_points(group='torch.backends').names,
    reason='needs an installation with the entry point of setup.py',
)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=environment
    )


@pytest.fixture
def attack(tmp_path):
    made, path = tmp_path / 'made', tmp_path / 'a.pth'
    space = {}
    exec(HOSTILE.format(made=str(made)), space)
    torch.save(dict(state_dict={}, extra=space['Attack']()), path)
    yield str(path)
    assert not made.exists()


@needs_entry_point
@pytest.mark.parametrize(
    'first', exhaustively(['', 'import mmcv, mmengine.hooks'], ['import mmcv, mmengine.hooks'])
)
def test_nobody_has_to_import_mmkw(attack, first):
    result = run(f'{first}\n{LOAD.format(path=attack)}')
    assert result.stdout.splitlines()[-1:] == ['UnsafeCheckpointError'], result.stderr


FIRST = [
    'import mmkw',
    'import mmengine.runner, mmkw.layers',
    'from mmcv.cnn import fuse_conv_bn; import mmkw',
    "from mmengine.registry import MODELS; MODELS.get('mmkw.KWConv2d')",
]


@pytest.mark.parametrize('first', exhaustively(FIRST, FIRST[:2]))
def test_importing_mmkw_is_enough(attack, first):
    hook = 'from mmengine.hooks import Hook; from mmengine.registry import HOOKS\n'
    hook += 'print(HOOKS.get("CheckpointHook").__module__)'
    code = f'{first}\n{FUSING}\n{hook}\n{LOAD.format(path=attack)}'
    result = run(code, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    expected = {'mmkw.engine.fusing', 'mmkw.engine.files.hook', 'UnsafeCheckpointError'}
    assert expected <= set(result.stdout.splitlines()), result.stderr


AGAIN = {
    'reloaded': 'import importlib, mmengine.runner.checkpoint as m; importlib.reload(m)',
    'imported anew': """
import sys, mmengine.runner
for name in [name for name in sys.modules if name.split('.')[0] == 'mmengine']:
    del sys.modules[name]
""",
    'after an error': """
import sys
class Once:
    def find_spec(self, name, path=None, target=None):
        if name == 'mmkw.engine.files.schemes':
            sys.meta_path.remove(self)
            raise ImportError('once')
sys.meta_path.insert(0, Once())
try:
    import mmengine.runner
except ImportError:
    pass
""",
}


@pytest.mark.parametrize('how', exhaustively(AGAIN, ['reloaded']))
def test_a_module_that_is_loaded_again_is_ours_again(attack, how):
    code = f'import mmkw\n{AGAIN[how]}\n{LOAD.format(path=attack)}'
    result = run(code, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert result.stdout.splitlines()[-1:] == ['UnsafeCheckpointError'], result.stderr


@needs_entry_point
def test_importing_torch_stays_light():
    code = 'import torch, sys; print([n for n in sys.modules if n.split(".")[0] in {}])'
    result = run(code.format(('mmengine', 'mmcv', 'mmdet', 'mmkw')))
    assert result.returncode == 0, result.stderr
    assert sorted(eval(result.stdout)) == ['mmkw', 'mmkw.autoload', 'mmkw.version']


def test_names_of_the_package():
    import mmkw

    for name in mmkw.__all__:
        assert getattr(mmkw, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mmkw.nothing

"""The examples in docstrings run, and every public name has one."""

import copy
import doctest
import importlib
import inspect
import pkgutil
import tempfile

import mmcv
import mmengine.registry
import pytest
import torch

import mmkw
from mmkw.layers.static_classes import base_class

MODULES = [
    info.name
    for info in pkgutil.walk_packages(mmkw.__path__, 'mmkw.')
    if not info.name.endswith('_native')
]
NAMES = dict(
    base_class=base_class,
    copy=copy,
    mmkw=mmkw,
    tempfile=tempfile,
    torch=torch,
    mmcv=mmcv,
    MODELS=mmengine.registry.MODELS,
)


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
    """Of mmdet where that is installed, which has the networks of some."""
    pytest.importorskip('mmdet', reason='some examples are of its networks')
    if name.startswith(('mmkw.ops.triton', 'mmkw.ops.fused')):
        pytest.importorskip('triton', reason='the GPU kernels are written in it')
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder().find(module, name):
        runner = doctest.DocTestRunner(verbose=False)
        test.globs |= NAMES
        runner.run(test)
        assert not runner.failures, test.name


def test_public_names_have_examples():
    public = [getattr(mmkw, name) for name in mmkw.__all__ if name != '__version__']
    assert len(public) > 10
    assert not [thing.__name__ for thing in public if '>>>' not in inspect.getdoc(thing)]


@pytest.mark.parametrize('name', ['KWConv1d', 'KWConv2d', 'KWConv3d', 'KWLinear'])
def test_a_layer_shows_its_arguments(name):
    layer = getattr(mmkw, name)
    static = inspect.signature(layer.static_class)
    # The method is the class.
    options = {'attention_norm_cfg', *mmkw.layers.WarehouseOptions.__dataclass_fields__} - {
        'method'
    }
    assert set(inspect.signature(layer).parameters) == {*static.parameters, *options}

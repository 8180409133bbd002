"""Where the compiled kernels are missing, the log says so once, and how to have them."""

import importlib.util
import logging

import pytest
import torch
from torch import nn

from mmkw import KWConv2d, ops
from mmkw.ops import backend, compiled


@pytest.fixture
def told(monkeypatch, caplog):
    """The lines of the log, of an installation without kernels."""
    monkeypatch.setattr(backend, 'MISSING', 'they were not built. To have them: build them')
    monkeypatch.setattr(backend, '_switched_on', True)
    backend._tell.cache_clear()
    caplog.set_level(logging.INFO)
    yield lambda: [record.getMessage() for record in caplog.records]
    backend._tell.cache_clear()


def layers():
    torch.manual_seed(0)
    return KWConv2d(4, 4, 3), nn.Conv2d(4, 4, 3)


def test_told_once_where_they_would_compute(told):
    x = torch.ones(2, 4, 8, 8)
    for layer in layers():
        layer.double()(x.double())
    ops.use_compiled(False)
    for layer in layers():
        layer(x)
    ops.use_compiled(True)
    assert told() == []
    for _ in range(2):
        for layer in layers():
            assert layer(x).shape == (2, 4, 6, 6)
    assert told() == [
        'mmkw computes without its CPU kernels: they were not built. To have them: build them'
    ]


def test_why_they_are_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(compiled, 'find_spec', lambda _: None)
    assert compiled._load().startswith('they were not built. To have them, with a C++ compiler')
    assert '--no-build-isolation' in compiled._load()
    monkeypatch.setattr(compiled, 'find_spec', find)


@pytest.mark.skipif(compiled.MISSING is not None, reason=f'{compiled.MISSING}')
def test_kernels_of_another_torch_are_left_aside(monkeypatch):
    from mmkw.ops import _native

    assert torch.__version__ == _native.TORCH
    monkeypatch.setattr(_native, 'TORCH', '1.9.0+cpu')
    assert compiled._load().startswith(
        f'they were built for torch 1.9.0+cpu, not {torch.__version__}'
    )
    # Another patch, and another build of the same release, has the same classes.
    release = '.'.join(torch.__version__.split('.')[:2])
    monkeypatch.setattr(_native, 'TORCH', f'{release}.9+cu999')
    assert compiled._load() is None

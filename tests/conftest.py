"""Shared by all tests: determinism and the helpers that several folders need."""

import gc
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import command_util  # noqa: E402

if not torch.cuda.is_available():
    # Triton reads this when it is imported. Its interpreter then runs GPU kernels on the CPU.
    os.environ.setdefault('TRITON_INTERPRET', '1')


def pytest_addoption(parser):
    """``--exhaustive``, as before a release."""
    text = 'run also the tests that repeat others on more networks, budgets or files'
    parser.addoption('--exhaustive', action='store_true', help=text)


def pytest_collection_modifyitems(config, items):
    """Those that take longest start first: at the end no process waits for one of them."""
    if not config.getoption('exhaustive'):
        left = [item for item in items if item.get_closest_marker('exhaustive')]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]
    items.sort(key=lambda item: item.get_closest_marker('slow') is None)


def pytest_collection_finish(session):
    """What was imported stays: looking through it for garbage took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    """At the end libraries report what was not freed."""
    gc.unfreeze()


def exhaustively(names, others):
    """Parameters of a test, of which some are for ``--exhaustive`` alone.

    Args:
        names: All of them.
        others: Those.
    """
    mark = pytest.mark.exhaustive
    return [
        pytest.param(*(name if isinstance(name, tuple) else [name]), marks=mark)
        if name in others
        else name
        for name in names
    ]


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _scope():
    """Configs set the library in which MMEngine looks for types; the next test starts without."""
    yield
    if registry := sys.modules.get('mmengine.registry'):
        registry.DefaultScope._instance_dict.clear()


@pytest.fixture(scope='session')
def root() -> Path:
    """The top of the source tree."""
    return ROOT


@pytest.fixture(scope='session')
def mini_coco(tmp_path_factory) -> Path:
    """A data set of the converter with four training and two validation images."""
    pytest.importorskip('skimage', reason='the photographs are scikit-image data')
    pytest.importorskip('sklearn', reason='the digits are scikit-learn data')
    out = tmp_path_factory.mktemp('data') / 'mini_coco'
    script = ROOT / 'tools/dataset_converters/make_mini_coco.py'
    arguments = [out, '--train', '4', '--val', '2', '--seed', '1']
    result, output = command_util.run(ROOT, sys.executable, script, *arguments)
    assert result.returncode == 0, output
    return out


@pytest.fixture
def full_disk():
    """A context in which no file may grow beyond 100 kB: a write that would raises."""
    resource = pytest.importorskip('resource', reason='limits the size of files, on Unix')

    @contextmanager
    def full():
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)

    return full


@pytest.fixture
def tree(root, tmp_path, monkeypatch) -> Path:
    """A source tree with the project's tools and configs, and folders of its own beside them."""
    for name in ('tools', 'configs'):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.syspath_prepend(str(tmp_path / 'tools/benchmarks'))
    return tmp_path


@pytest.fixture
def few_images(tree) -> Path:
    """A tree whose digits are a few images."""
    pytest.importorskip('skimage', reason='the photographs are scikit-image data')
    pytest.importorskip('sklearn', reason='the digits are scikit-learn data')
    script = tree / 'tools/dataset_converters/make_mini_coco.py'
    counts = ['--train', '8', '--val', '2', '--test', '9']
    subprocess.run([sys.executable, script, tree / 'data/mini_coco', *counts], check=True)
    return tree

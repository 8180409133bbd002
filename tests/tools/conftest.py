"""A tree for tools that write beside themselves."""

import subprocess
import sys
from pathlib import Path

import pytest


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

"""The site builds without a warning; what the pages name exists, and what they show runs."""

import importlib
import re
import subprocess
import sys

import pytest
import torch

import mmkw

PAGES = ('README.md', 'CHANGELOG.md', 'SECURITY.md', 'mmkw/ops/csrc/README.md', 'docs/*.md')
ROOMS = (
    'backbones',
    'checkpoints',
    'engine.hooks',
    'engine.optimizers',
    'layers',
    'ops',
    'sharing',
)
# A file or folder of this repository, in prose or in a command.
PATH = re.compile(r'(?<![\w./:-])(?:configs|docs|mmkw|tests|tools)/[\w./-]*\w')
MADE_BY_SETUP = re.compile(r'.*\.(so|part)')


def pages(root):
    return {page: page.read_text() for pattern in PAGES for page in sorted(root.glob(pattern))}


def slug(heading):
    """The anchor of a heading on GitHub."""
    return re.sub(r'[^\w -]', '', heading.replace('`', '').lower()).replace(' ', '-')


def test_the_site_builds_without_a_warning(root, tmp_path):
    for package in ('sphinx', 'myst_parser', 'furo'):
        pytest.importorskip(package, reason="the site is built by the extra 'docs'")
    command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'dummy']
    result = subprocess.run(
        [*command, 'docs', tmp_path], cwd=root, capture_output=True, text=True, check=False
    )
    # Libraries warn when they are imported; Sphinx names a document or a docstring.
    assert result.returncode == 0, result.stderr


def test_links_lead_somewhere(root):
    found = 0
    for page, text in pages(root).items():
        for link in re.findall(r'\]\(([^)\s]+)\)', text):
            if '://' in link or link.startswith('mailto:'):
                continue
            name, _, anchor = link.partition('#')
            target = (page.parent / name).resolve() if name else page
            if page.name == 'index.md' and page.parent.name == 'docs':
                # Pages that include a file are on the site alone; GitHub shows their directive.
                assert target.is_relative_to(root / 'docs'), link
            assert target.exists(), f'{page}: {link}'
            if anchor:
                headings = re.findall(r'^#+ (.*)$', target.read_text(), re.MULTILINE)
                assert anchor in map(slug, headings), f'{page}: {link}'
            found += 1
    assert found > 50


def test_files_that_are_named_exist(root):
    named = {
        (page.name, path)
        for page, text in pages(root).items()
        for path in PATH.findall(text)
        if not MADE_BY_SETUP.fullmatch(path)
    }
    assert len(named) > 50
    missing = [
        (page, path)
        for page, path in sorted(named)
        if not (root / path).exists() and not list(root.glob(f'{path}*'))
    ]
    assert not missing


def test_every_public_name_is_documented(root):
    text = (root / 'docs/api.md').read_text()
    names = {f'mmkw.{name}' for name in mmkw.__all__ if name != '__version__'}
    for room in ROOMS:
        module = importlib.import_module(f'mmkw.{room}')
        names |= {f'mmkw.{room}.{name}' for name in module.__all__ if name not in mmkw.__all__}
    documented = set(re.findall(r'^\.\. (?:auto\w+|py:data):: (\S+)$', text, re.MULTILINE))
    assert len(names) > 50
    assert not names - documented


@pytest.mark.parametrize('page', ['start', 'fine_tune', 'warm_start', 'faq', 'index'])
def test_examples_run(root, page, tmp_path, monkeypatch):
    """Configs are read, code is run, block after block; those that assert nothing must not fail."""
    pytest.importorskip('mmdet', reason='the examples are of its networks')
    from mmengine.config import Config

    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    names = {}
    text = (root / 'docs' / f'{page}.md').read_text()
    blocks = re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        if '_base_' in block:
            file = tmp_path / 'config.py'
            file.write_text(block)
            if "'mmseg::" in block:
                pytest.importorskip('mmseg', reason='an example is of its networks')
            assert 'mmkw.' in str(Config.fromfile(file).model)
        else:
            exec(block, names)

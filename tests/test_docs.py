"""The site builds without a warning; what the pages name exists, and what they show runs."""

import importlib
import re
import subprocess
import sys

import pytest

import mmkw

PAGES = ('README.md', 'CHANGELOG.md', 'SECURITY.md', 'mmkw/ops/csrc/README.md', 'docs/*.md')
ROOMS = 'backbones checkpoints engine.hooks engine.optimizers layers ops sharing deploy'
# A file or folder of this repository, in prose or in a command.
PATH = re.compile(r'(?<![\w./:-])(?:configs|docs|mmkw|tests|tools)/[\w./-]*\w')


def pages(root):
    return {page: page.read_text() for pattern in PAGES for page in sorted(root.glob(pattern))}


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


def test_the_site_builds_without_a_warning(root, tmp_path):
    for package in ('sphinx', 'myst_parser', 'furo'):
        pytest.importorskip(package, reason="the site is built by the extra 'docs'")
    command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'dummy', 'docs']
    result = subprocess.run([*command, tmp_path], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_links_lead_somewhere(root):
    found = 0
    for page, text in pages(root).items():
        for link in re.findall(r'\]\(([^)\s]+)\)', text):
            if '://' in link:
                continue
            name, _, anchor = link.partition('#')
            target = page.parent / name if name else page
            assert target.exists(), f'{page}: {link}'
            if target.suffix == '.md':
                # GitHub does not include files; docs/conf.py turns links to them into links to
                # pages of the site.
                assert '{include}' not in target.read_text(), f'{page}: {link}'
                assert not anchor or anchor in anchors(target.read_text()), f'{page}: {link}'
            found += 1
    assert found > 50


def test_files_that_are_named_exist(root):
    named = {(page.name, path) for page, text in pages(root).items() for path in PATH.findall(text)}
    assert len(named) > 50
    # Commands also name reports, without the ends of their files.
    assert not [(page, path) for page, path in sorted(named) if not list(root.glob(f'{path}*'))]


def test_every_public_name_is_documented(root):
    names = {f'mmkw.{name}' for name in mmkw.__all__ if name != '__version__'}
    for room in ROOMS.split():
        module = importlib.import_module(f'mmkw.{room}')
        names |= {f'mmkw.{room}.{name}' for name in module.__all__ if name not in mmkw.__all__}
    assert len(names) > 50
    text = (root / 'docs/api.md').read_text()
    assert not names - set(re.findall(r'^\.\. (?:auto\w+|py:data):: (\S+)$', text, re.MULTILINE))


@pytest.mark.parametrize('page', ['index', 'start', 'fine_tune', 'warm_start', 'faq'])
def test_examples_run(root, page, tmp_path, monkeypatch):
    """Configs are read, and other code is run, block after block; it asserts what it shows."""
    pytest.importorskip('mmdet', reason='the examples are of its networks')
    from mmengine.config import Config

    monkeypatch.chdir(tmp_path)
    text = (root / 'docs' / f'{page}.md').read_text()
    blocks = re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        if '_base_' not in block:
            exec(block, names)
            continue
        if "'mmseg::" in block:
            pytest.importorskip('mmseg', reason='an example is of its networks')
        (tmp_path / 'config.py').write_text(block)
        assert 'mmkw.' in str(Config.fromfile('config.py').model)

"""What ``mmkw info`` says is so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmkw
from mmkw import requirements
from mmkw.ops.compiled import MISSING


def lines_of(root, **environment):
    result = subprocess.run(
        [sys.executable, '-m', 'mmkw', 'info'],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env=os.environ | environment,
    )
    return dict(line.split('  ', 1) for line in result.stdout.splitlines())


def test_versions_and_what_computes(root):
    lines = {name: text.strip() for name, text in lines_of(root).items()}
    assert lines['mmkw'].startswith(mmkw.__version__)
    for name in requirements.SUPPORTED:
        assert lines[name] == (requirements.version_of(name) or 'not installed')
    # Wheels of PyPI do not name the CUDA that they were built for.
    assert lines['torch'].split('+')[0] == torch.__version__.split('+')[0]
    if MISSING is None:
        level = torch.backends.cpu.get_cpu_capability()
        level = level if level in ('AVX512', 'AVX2') else 'DEFAULT'
        begin, found, end = lines['compiled kernels'].partition(f'used on the CPU, for {level}')
        assert (begin, bool(found)) == ('', True)
        # Old compilers do not know the instructions.
        known = Path('/proc/cpuinfo')
        has_bfloat16 = level == 'AVX512' and (
            not known.exists() or 'avx512_bf16' in known.read_text()
        )
        assert end in ('', ' and its products of bfloat16' * has_bfloat16)
    else:
        assert lines['compiled kernels'] == f'not used: {MISSING}'


@pytest.mark.skipif(MISSING is not None, reason=f'compiled kernels: {MISSING}')
def test_the_environment_is_heard(root):
    assert 'MMKW_COMPILED=0' in lines_of(root, MMKW_COMPILED='0')['compiled kernels']
    assert lines_of(root, ATEN_CPU_CAPABILITY='default')['compiled kernels'].endswith('for DEFAULT')


def test_who_reads_may_have_enough(root):
    # `true` ends at once and reads nothing.
    line = f'{sys.executable} -m mmkw info | true'
    result = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=root)
    assert result.stderr == ''


def test_versions_that_do_not_fit_are_named(monkeypatch):
    from mmkw import info

    monkeypatch.setattr(torch, '__version__', '1.0')
    assert "but torch 1.0 is installed. Run: pip install 'torch==" in info.report()


@pytest.mark.parametrize(
    'name, text, remedy',
    [
        ('mmpretrain.models', '', "Run: pip install 'mmkw[cls]'"),
        ('mmcv.ops', '', "Run: pip install 'mmkw[det]' or pip install 'mmkw[seg]'"),
        ('onnxruntime', "ONNX needs it. Run: pip install 'mmkw[deploy]'", ''),
        ('mine', '', ''),
    ],
)
def test_what_is_missing_is_named_with_what_brings_it(monkeypatch, capsys, name, text, remedy):
    from mmkw import cli

    def fail(argv):
        raise ModuleNotFoundError(text or f'No module named {name!r}', name=name)

    monkeypatch.setattr('mmkw.cli.info.main', fail)
    with pytest.raises(SystemExit) as stop:
        cli.main(['info'])
    assert stop.value.code == 2
    expected = text or f'mmkw info needs {name.split(".")[0]}, which is not installed. {remedy}'
    assert capsys.readouterr().err.endswith(f'error: {expected.strip()}\n')

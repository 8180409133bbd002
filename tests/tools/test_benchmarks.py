"""The benchmarks run, report what they say, and their baseline computes what mmkw does."""

import json
import sys
from pathlib import Path

import command_util
import pytest
import torch

from mmkw.layers import KWConv2d, KWLinear


def run(root, script, *arguments):
    script = f'tools/benchmarks/{script}'
    result, output = command_util.run(root, sys.executable, script, *arguments)
    assert result.returncode == 0, output
    return result.stdout


@pytest.fixture
def published_form(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'tools/benchmarks'))
    from published_form import published_form

    return published_form


@pytest.mark.parametrize(
    'layer, shape',
    [
        (KWConv2d(8, 8, 3, stride=2, padding=1, cell_num_ratio=2), (2, 8, 7, 6)),
        (KWConv2d(8, 8, 3, groups=8), (3, 8, 5, 5)),
        (KWConv2d(8, 16, 1, cell_inplane_ratio=0.5, bias=False), (2, 8, 5, 5)),
        (KWLinear(6, 4), (3, 5, 6)),
    ],
)
def test_the_published_form_computes_the_same(published_form, layer, shape):
    layer.eval()
    x = torch.randn(shape)
    with published_form():
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_a_layer_is_timed_against_the_static_one(root, tmp_path):
    arguments = ['--channels', '8', '8', '--layers', '2', '--budgets', '2']
    arguments += ['--shapes', '2x8x8', '--repeats', '2', '--published', '--memory']
    out = run(root, 'layer.py', *arguments, '--mode', 'train', '--out', str(tmp_path / 'layer'))
    report = json.loads((tmp_path / 'layer.json').read_text())
    assert report['bandwidth'] > 1e9 and report['peak'] > 1e9
    names = ['static', 'kw 2x', 'published kw 2x']
    assert [row['name'] for row in report['rows']] == names
    for row in report['rows']:
        assert 0 < row['low'] <= row['median'] <= row['high']
        assert f'| {row["setting"]} | {row["name"]} | {row["median"]:.1f} |' in out
        assert row['memory'] > 50
        assert (row['limit'] is None) == (row['name'] == 'static')
    assert (tmp_path / 'layer.png').read_bytes().startswith(b'\x89PNG')


def test_a_backbone_is_timed(root):
    pytest.importorskip('mmdet', reason='the static ResNet is its')
    out = run(root, 'backbone.py', 'R18', '--shapes', '2x64x64', '--repeats', '1')
    assert '| 2x64x64 | kw 1x |' in out


@pytest.mark.parametrize(
    'library, config, mode',
    [
        ('mmdet', 'demo/mask-rcnn_kw1x-r18_fpn_mini-coco', 'train'),
        ('mmseg', 'demo/fpn_kw1x-r18_mini-coco-semantic', 'inference'),
    ],
)
def test_whole_models_are_timed(root, library, config, mode):
    pytest.importorskip(library, reason='the config is for it')
    path = str(root / f'configs/{config}.py')
    out = run(root, 'model.py', path, '--shapes', '1x64x64', '--repeats', '1', '--mode', mode)
    assert f'| 1x64x64 | {config.split("/")[1]} |' in out


def test_reading(root):
    pytest.importorskip('mmdet', reason="the file holds MMDetection's ResNet")
    output = run(root, 'reading.py', '--copies', '1', '--repeats', '1')
    assert 'MB, 954 tensors' in output and 'ratio: ' in output


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='counts the pages of Linux')
def test_memory_is_watched_over_many_steps(root):
    rows = run(root, 'long_run.py', '--steps', '1').splitlines()[2:]
    names = [tuple(cell.strip() for cell in row.split('|')[1:3]) for row in rows]
    kinds = ('train', 'saliency')
    assert names == [(network, kind) for network in ('static', 'kw 1x') for kind in kinds]

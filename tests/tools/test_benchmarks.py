"""The benchmarks run, report what they say, and their baseline computes what mmkw does."""

import argparse
import copy
import importlib
import json
import sys
from pathlib import Path

import command_util
import pytest
import torch
from conftest import exhaustively
from mmengine.utils import is_installed

import mmkw
from mmkw.layers import KWConv2d, KWLinear
from mmkw.ops.compiled import MISSING, has_bfloat16


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


def test_the_command_for_gpus_checks_and_measures(root, tmp_path, monkeypatch):
    """As on a machine without GPU; no network is measured, since they are large."""
    out = tmp_path / 'report'
    arguments = ['--device', 'cpu', '--precisions', 'float32', 'bfloat16', '--minutes', '0']
    printed = run(root, 'gpu.py', *arguments, '--out', str(out))
    report = json.loads(out.with_suffix('.json').read_text())
    assert report['R50'] == report['ConvNeXt-T'] == []
    assert 0 < max(report['errors']['float32'].values()) < 1e-5
    assert 1e-4 < max(report['errors']['bfloat16'].values()) < 2e-2
    assert all(f'| {layer} |' in printed for layer in report['errors']['float32'])

    monkeypatch.syspath_prepend(str(root / 'tools/benchmarks'))
    gpu = importlib.import_module('gpu')

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(*(torch.nn.Conv2d(c, 32, 3) for c in (3, 32, 32)))

        def forward(self, x):
            return self.layers(x)

    static = Network()
    networks = {'static': static, 'kw 1x': mmkw.convert(copy.deepcopy(static), cell_num_ratio=1)}
    speed = report['speeds']['bfloat16']
    rows = gpu.measure(networks, 'train', (2, 16, 16), 'bfloat16', 'cpu', speed)
    assert [row.name for row in rows] == ['static', 'kw 1x', 'published kw 1x']
    for row in rows:
        assert row.setting == 'train 2x16x16 bfloat16'
        assert 0 < row.low <= row.median <= row.high
        assert (row.limit is None) == (row.name == 'static')
    gpu.draw(rows, 'A network', tmp_path / 'picture.png')
    assert (tmp_path / 'picture.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    'layer, shape',
    [
        (KWConv2d(8, 8, 3, stride=2, padding=1, cell_num_ratio=2), (2, 8, 7, 6)),
        (KWConv2d(8, 8, 3, groups=8), (3, 8, 5, 5)),
        (KWConv2d(8, 16, 1, cell_inplane_ratio=0.5, bias=False), (2, 8, 5, 5)),
        (KWLinear(6, 4), (3, 5, 6)),
    ],
)
def test_the_published_form_computes_the_same(published_form, layer, shape, monkeypatch):
    """And nothing else does then: of one image where nothing learns, too."""
    module, calls = sys.modules[published_form.__module__], []
    real = module.published_operator
    spy = lambda *args: calls.append(len(args[0])) or real(*args)  # noqa: E731
    monkeypatch.setattr(module, 'published_operator', spy)
    layer.eval()
    for x, learns in ((torch.randn(shape), True), (torch.randn(1, *shape[1:]), False)):
        with torch.set_grad_enabled(learns):
            with published_form():
                expected = layer(x)
            torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    assert calls == [shape[0], 1]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=f'compiled kernels: {MISSING}')
def test_mixing_is_timed(root):
    precisions = ('float32', 'bfloat16', 'int8') + ('panels',) * has_bfloat16()
    options = ['--cells', '3x64x32', '5x8x8', '--mixtures', '1', '9', '--repeats', '2']
    lines = run(root, 'mixing.py', *options, '--precisions', *precisions).splitlines()
    assert 'GB/s' in lines[0]
    assert [tuple(line.split(' | ')[:3]) for line in lines[4:]] == [
        (f'| {cells}', mixtures, precision)
        for cells in ('3x64x32', '5x8x8')
        for mixtures in '19'
        for precision in precisions
    ]


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=f'compiled kernels: {MISSING}')
def test_products_are_timed(root):
    sizes = '--sizes', '8x4x40', '3x5x9'
    lines = run(root, 'products.py', *sizes, '--part', 'x', '--repeats', '2').splitlines()
    assert 'GFLOP/s' in lines[0]
    assert all(lines[2].count(name) == 2 for name in ('by tiles', 'torch.bmm', 'convolution'))
    assert [line.split(' | ')[0] for line in lines[4:]] == ['| 8x4x40', '| 3x5x9']


@pytest.mark.parametrize('part', ['forward', 'x', 'kernels'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_timed_products_and_convolutions_compute_the_same(tool, part, memory_format):
    products, kernel = tool('products'), torch.randn(1, 8, 5)
    x, grad = (
        torch.randn(1, channels, 7, 7).contiguous(memory_format=memory_format)
        for channels in (5, 8)
    )
    left, right = products.factors(part, kernel, x, grad)
    found = left @ right
    expected = products.convolved(part, kernel.view(8, 5, 1, 1), x, grad)
    if part != 'kernels' and memory_format == torch.channels_last:
        expected = expected.movedim(1, -1)
    torch.testing.assert_close(found, expected.reshape(found.shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    'precision', exhaustively(['float32', 'autocast', 'bfloat16'], ['float32', 'autocast'])
)
def test_a_backbone_is_timed(root, precision):
    pytest.importorskip('mmdet', reason='the static ResNet is its')
    options = ['--shapes', '2x32x32', '--repeats', '1', '--precision', precision]
    out = run(root, 'backbone.py', 'R18', *options, '--methods', 'odconv:2', 'dyconv:4')
    for name in ('static', 'kw 1x', 'odconv 2x', 'dyconv 4x'):
        assert f'| 2x32x32 | {name} |' in out


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


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='counts the pages of Linux')
def test_memory_is_watched_over_many_steps(root):
    rows = run(root, 'long_run.py', '--steps', '2').splitlines()[2:]
    names = [tuple(cell.strip() for cell in row.split('|')[1:3]) for row in rows]
    kinds = ('train', 'saliency')
    assert names == [(network, kind) for network in ('static', 'kw 1x') for kind in kinds]


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_exported_files_are_timed(root, monkeypatch, capsys):
    for package in ('onnx', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(package, reason='writes and runs ONNX')
    pytest.importorskip('mmdet', reason='the static ResNet is its')
    monkeypatch.syspath_prepend(str(root / 'tools/benchmarks'))
    deployment = importlib.import_module('deployment')
    one = dict(num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
    thin = dict(depth=18, base_channels=8, stem_channels=8, **one)
    monkeypatch.setitem(deployment.BACKBONES, 'thin', ('mmkw.ResNet', 'mmkw.KWResNet', thin))
    # What is compiled takes a minute.
    runtimes = ['eager', 'ONNX Runtime', 'OpenVINO']
    arguments = [
        'thin',
        '--shapes',
        '2x64x64',
        '--repeats',
        '1',
        '--parts',
        '--runtimes',
        *runtimes,
    ]
    monkeypatch.setattr(sys, 'argv', ['deployment.py', *arguments])
    deployment.main()
    output = capsys.readouterr().out
    if not is_installed('openvino'):
        runtimes.remove('OpenVINO')
    header, _, *rows = output.splitlines()[3:]
    assert [row.split(' | ')[1] for row in rows] == runtimes
    # The parts are of one runtime.
    lengths = [len(row.split(' | ')) for row in (header, *rows)]
    assert lengths == [9] + [9 if name == 'ONNX Runtime' else 5 for name in runtimes]


@pytest.fixture
def tool(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'tools/benchmarks'))
    return importlib.import_module


def drawn(tool, rows):
    keys = ('setting', 'name', 'ratio', 'limit')
    about = dict(title='R50, inference', processor='a CPU', instructions='AVX2', threads=1)
    report = dict(about, rows=[dict(zip(keys, row)) for row in rows])
    return tool('drawing').draw(report).axes[0]


def test_settings_without_an_order_are_bars(tool):
    rows = [
        (setting, name, ratio * (1 + hard), limit)
        for setting, hard in (('1x64x64', 1), ('8x32x48', 0))
        for name, ratio, limit in (
            ('static', 1, None),
            ('kw 1x', 2, 1.5),
            ('published kw 1x', 3, 1.5),
            ('kw 4x', 2.5, 2),
        )
    ]
    axes = drawn(tool, rows)
    heights = [patch.get_height() for patch in axes.patches]
    assert heights == [4, 2, 6, 3, 5, 2.5] and axes.get_yscale() == 'linear'
    ours, published, larger = (axes.patches[i] for i in (0, 2, 4))
    assert ours.get_edgecolor() == published.get_edgecolor() != larger.get_edgecolor()
    assert published.get_hatch() and not ours.get_hatch() and not larger.get_hatch()
    # The static network, and the limit's sample in the legend.
    assert [list(line.get_ydata()) for line in axes.lines] == [[1, 1], []]
    limits = [segment[0][1] for lines in axes.collections for segment in lines.get_segments()]
    assert limits == [1.5] * 4 + [2] * 2


def test_a_value_that_dwarfs_the_others_makes_the_axis_logarithmic(tool):
    rows = [('1x64x64', name, ratio, None) for name, ratio in (('static', 1), ('kw 1x', 2))]
    rows += [('1x64x64', 'kw 2x', 2.5, 2), ('1x64x64', 'published kw 2x', 20, 2)]
    axes = drawn(tool, rows)
    assert axes.get_yscale() == 'log'
    # Bars begin at the static network.
    assert [(p.get_y(), p.get_y() + p.get_height()) for p in axes.patches] == [
        (1, 2),
        (1, 2.5),
        (1, 20),
    ]


@pytest.mark.parametrize(
    'settings, names, lines, places',
    [
        (['1x8x8', '2x8x8', '4x8x8'], ['kw 1x', 'published kw 1x'], 3, [1, 2, 4]),
        (['1x8x8', '1x64x64', '1x16x16'], ['kw 1x', 'kw 4x'], 4, [8, 16, 64]),
        (['1x8x8'], ['kw 0.5x', 'kw 1x', 'kw 2x', 'kw 4x'], 2, [0.5, 1, 2, 4]),
    ],
)
def test_what_grows_is_a_line(tool, settings, names, lines, places):
    rows = [(setting, 'static', 1, None) for setting in settings]
    # The reports have a second static network, where products are measured.
    rows += [(setting, 'static by products', 0.9, None) for setting in settings]
    rows += [(setting, name, 2, 1.5) for setting in settings for name in names]
    axes = drawn(tool, rows)
    by_products = [line for line in axes.lines if set(line.get_ydata()) == {0.9}]
    assert len(by_products) == 1 and 'static by products' in by_products[0].get_label()
    own = [line for line in axes.lines if set(line.get_ydata()) <= {2, 1.5}]
    assert len(own) == lines and not axes.patches
    assert all(list(line.get_xdata()) == places for line in own)


def test_reports_of_the_documentation_can_be_drawn_again(tool, root, monkeypatch, tmp_path):
    (tmp_path / 'r.json').write_text((root / 'docs/performance/r50_inference.json').read_text())
    monkeypatch.setattr(sys, 'argv', ['drawing.py', str(tmp_path / 'r.json')])
    tool('drawing').main()
    assert (tmp_path / 'r.png').read_bytes().startswith(b'\x89PNG')


def test_products_compute_what_convolutions_do(tool):
    products = tool('harness').products
    convolutions = torch.nn.Sequential(
        torch.nn.Conv2d(8, 8, 1, stride=2, groups=2), torch.nn.Conv2d(8, 4, 3), torch.nn.ReLU()
    )
    x = torch.randn(3, 8, 9, 10)
    expected = convolutions(x)
    with products():
        torch.testing.assert_close(convolutions(x), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(convolutions(x), expected)


def test_the_limit_takes_the_shorter_way_to_convolve(tool):
    harness = tool('harness')
    args = argparse.Namespace(mode='inference', repeats=3, processor_time=True, published=False)
    x = torch.randn(2, 8, 9, 9)

    def network(dynamic):
        model = KWConv2d(8, 8, 1) if dynamic else torch.nn.Conv2d(8, 8, 1)
        return torch.nn.Sequential(model)

    variants = {'static': lambda: network(False), 'kw 1x': lambda: network(True)}
    cases = harness.make_cases(args, variants, lambda model: model(x))
    speed = dict(bandwidth=1e9, peak=1e9, bytes=4)
    static, products, dynamic = harness.measure('2x9x9', cases, 2, args, speed)
    assert [static.name, products.name, dynamic.name] == ['static', 'static by products', 'kw 1x']
    assert static.limit is None and products.limit is None
    # One cell of 8 x 8 and one mixture: 256 bytes to read, 128 operations an image.
    mixing = 1e3 * max(256 / 1e9, 2 * 128 / 1e9)
    expected = (min(static.median, products.median) + mixing) / static.median
    assert dynamic.limit == pytest.approx(expected)

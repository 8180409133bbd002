"""Exported files compute what their networks do, for any batch and any size of image."""

import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_util import run
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import nn
from twin_networks import thin_retinanet

import mmkw
from mmkw import cli
from mmkw.deploy import DenseNetwork, ExportError, export
from mmkw.engine.building import build_model, load_trained
from mmkw.engine.images import test_pipeline as build_test_pipeline
from mmkw.ops import exported

CONV = dict(kernel_size=3, padding=1)
LAYERS = {
    'plain': (lambda: mmkw.KWConv2d(8, 16, **CONV), (8, 9, 11)),
    '4x': (lambda: mmkw.KWConv2d(8, 16, 3, stride=2, cell_num_ratio=4), (8, 9, 11)),
    'dilated': (
        lambda: mmkw.KWConv2d(8, 16, 3, stride=2, padding=2, dilation=2, bias=False),
        (8, 12, 11),
    ),
    'same': (lambda: mmkw.KWConv2d(8, 16, 3, padding='same'), (8, 9, 11)),
    'circular': (lambda: mmkw.KWConv2d(8, 8, padding_mode='circular', **CONV), (8, 9, 11)),
    'grouped': (lambda: mmkw.KWConv2d(8, 8, groups=2, cell_inplane_ratio=0.5, **CONV), (8, 9, 11)),
    'depthwise': (lambda: mmkw.KWConv2d(8, 8, groups=8, **CONV), (8, 9, 11)),
    'matrix': (lambda: mmkw.KWConv2d(8, 16, 1, 2, cell_inplane_ratio=0.5), (8, 9, 11)),
    'padded matrix': (lambda: mmkw.KWConv2d(8, 16, 1, padding=1), (8, 9, 11)),
    'whole cells': (
        lambda: mmkw.KWConv2d(
            8, 16, (3, 5), padding=(1, 2), spatial_partition=False, cell_outplane_ratio=0.5
        ),
        (8, 9, 11),
    ),
    '1d': (lambda: mmkw.KWConv1d(8, 16, **CONV), (8, 20)),
    '3d': (lambda: mmkw.KWConv3d(8, 8, **CONV), (8, 5, 6, 7)),
    'linear': (lambda: mmkw.KWLinear(8, 16), (7, 8)),
}


def needs(suffix):
    for package in ('onnx', 'onnxruntime', 'onnxscript') if suffix == '.onnx' else ():
        pytest.importorskip(package, reason='writes and runs ONNX')


# Both kinds of files hold the same operators. A program is written in less time.
CASES = [
    *((name, 'scan', '.pt2') for name in LAYERS),
    *((name, 'matmul', '.pt2') for name in ('dilated', 'grouped', 'depthwise', 'whole cells')),
    ('matrix', 'large', '.pt2'),
    *((name, 'scan', '.onnx') for name in ('plain', 'linear')),
    ('depthwise', 'matmul', '.onnx'),
    ('4x', 'large', '.onnx'),
]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name, form, suffix', CASES)
def test_every_layer_from_one_image(name, form, suffix, tmp_path, monkeypatch):
    needs(suffix)
    if form == 'large':
        monkeypatch.setattr(exported, 'LARGE', 1)
    make, shape = LAYERS[name]
    layer, file = make(), tmp_path / f'layer{suffix}'
    dynamic = ('batch',) if name == 'linear' else ('batch', 'size')
    form = 'scan' if form == 'large' else form
    parity = export(layer, torch.randn(1, *shape), file, dynamic=dynamic, form=form)
    assert {found.shape[0] for found in parity} == {1, 2, 3, 5, 8}
    assert len({found.shape[1:] for found in parity}) == (1 if name == 'linear' else 3)
    assert max(found.difference for found in parity) < 1e-5
    assert layer.training and list(tmp_path.iterdir()) == [file]


STRIDED = {
    '1x1': (mmkw.KWConv2d, nn.Conv2d, (8, 16, 1), dict(stride=(1, 2)), (9, 11)),
    '3x3': (mmkw.KWConv2d, nn.Conv2d, (8, 16, 3), dict(stride=2, padding=1), (9, 11)),
    '3x3 dilated': (mmkw.KWConv2d, nn.Conv2d, (8, 16, 3), dict(stride=2, dilation=2), (9, 11)),
    'even': (mmkw.KWConv2d, nn.Conv2d, (8, 16, 2), dict(stride=3, padding=1), (9, 11)),
    '1d': (mmkw.KWConv1d, nn.Conv1d, (8, 16, 1), dict(stride=2), (11,)),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('large', [False, True])
@pytest.mark.parametrize('kind', STRIDED)
def test_sizes_that_a_stride_does_not_divide(kind, large, monkeypatch):
    """A program is bound neither to odd nor to even sizes, also if the user names their range."""
    dynamic, static, arguments, options, size = STRIDED[kind]
    if large:
        monkeypatch.setattr(exported, 'LARGE', 1)
    sides = {2 + i: torch.export.Dim(f'side{i}', min=9, max=512) for i in range(len(size))}
    for layer in (static, dynamic):
        network = layer(*arguments, **options).eval()
        shapes = ({0: torch.export.Dim('batch', min=1, max=64), **sides},)
        program = torch.export.export(
            network, (torch.rand(2, 8, *size),), dynamic_shapes=shapes
        ).module()
        for more in (0, 1, 2, 3):
            x = torch.rand(3, 8, *(side + more for side in size))
            torch.testing.assert_close(program(x), network(x), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make', [lambda: nn.Linear(8, 16), LAYERS['linear'][0]])
def test_half_precision_is_the_file_s_alone(make, tmp_path):
    layer, file = make(), tmp_path / 'a.pt2'
    parity = export(layer, torch.randn(1, 7, 8), file, dynamic=('batch',), half=True)
    assert 1e-5 < max(found.difference for found in parity) < 0.01
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    stored = torch.export.load(file).state_dict.values()
    assert {value.dtype for value in stored if value.is_floating_point()} == {torch.float16}


class Several(nn.Module):
    """With outputs that are no floating-point numbers."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        return y, None, y.argmax(-1)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make', [lambda: nn.Linear(8, 16), LAYERS['linear'][0]])
def test_half_precision_leaves_other_outputs(make, tmp_path):
    file, x = tmp_path / 'a.pt2', torch.randn(1, 7, 8)
    network = Several(make()).eval()
    export(network, x, file, dynamic=('batch',), half=True, tolerance=1)
    found, nothing, best = torch.export.load(file).module()(x)
    assert nothing is None and best.dtype == torch.int64 and found.dtype == torch.float32
    torch.testing.assert_close(found, network(x)[0], atol=0.01, rtol=0.01)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make', [lambda: nn.Linear(8, 16), LAYERS['linear'][0]])
def test_a_network_of_half_precision_is_held_to_that(make, tmp_path, monkeypatch):
    module = sys.modules['mmkw.deploy.export']
    compared = module._compared

    def a_little_apart(*arguments):
        return (parity._replace(difference=0.01) for parity in compared(*arguments))

    monkeypatch.setattr(module, '_compared', a_little_apart)
    export(make().half(), torch.randn(1, 7, 8).half(), tmp_path / 'a.pt2', dynamic=())
    with pytest.raises(ExportError, match=r'more than tolerance=0\.0001'):
        export(make(), torch.randn(1, 7, 8), tmp_path / 'b.pt2', dynamic=())


@pytest.mark.filterwarnings('ignore')
def test_none_among_outputs_is_left_out(tmp_path):
    class Some(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x), None

    for make in (lambda: nn.Linear(8, 16), LAYERS['linear'][0]):
        export(Some(make()), torch.randn(1, 7, 8), tmp_path / 'a.pt2', dynamic=())


@pytest.fixture
def detector():
    registry = pytest.importorskip('mmdet.registry', reason='has the detector')
    init_default_scope('mmdet')
    return registry.MODELS.build(thin_retinanet('mmkw.KWResNet'))


@pytest.mark.filterwarnings('ignore')
def test_a_detector_s_dense_outputs(detector, tmp_path):
    needs('.onnx')
    file = tmp_path / 'detector.onnx'
    network = DenseNetwork(detector)
    parity = export(network, torch.randn(1, 3, 64, 64), file)
    assert max(found.difference for found in parity) < 1e-4
    # Named as the library computes them: scores and boxes of both levels.
    x = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        scores, boxes = detector.eval()(x, mode='tensor')
    results = onnxruntime().InferenceSession(file).run(None, {'images': x.numpy()})
    for found, expected in zip(results, [*scores, *boxes], strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


def onnxruntime():
    return pytest.importorskip('onnxruntime', reason='runs the files')


def test_the_command(root, detector, tmp_path):
    from mmengine.config import Config

    config, checkpoint, out = (str(tmp_path / name) for name in ('a.py', 'a.pth', 'a.pt2'))
    model = thin_retinanet('mmkw.KWResNet')
    Config(dict(default_scope='mmdet', model=model)).dump(config)
    torch.save(dict(state_dict=detector.state_dict()), checkpoint)
    command = [sys.executable, '-m', 'mmkw', 'export', config, checkpoint]
    options = ['--backbone', '--shape', '64', '96', '--fixed', 'size']
    result, output = run(root, *command, out, *options)
    assert result.returncode == 0, output
    assert '| 8x3x64x96 |' in output and f'Written: {out}' in output
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        (found,), (expected,) = torch.export.load(out).module()(x), detector.eval().backbone(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.save(dict(state_dict=detector.state_dict()), checkpoint)
    result, output = run(root, *command, tmp_path / 'a.txt', *options)
    assert result.returncode == 2 and 'path must end in .onnx or .pt2' in output


LOAD = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64))]
PACK = [dict(type='PackDetInputs', meta_keys=('ori_shape', 'img_shape', 'scale_factor'))]


def test_a_pipeline_may_name_classes():
    """As configs of the new style do."""
    from mmcv.transforms import LoadImageFromFile
    from mmengine.config import Config

    dataset = dict(pipeline=[dict(type=LoadImageFromFile)])
    config = Config(dict(test_dataloader=dict(dataset=dataset)))
    assert [type(step) for step in build_test_pipeline(config).transforms] == [LoadImageFromFile]


def test_the_command_keeps_layers_by_name(detector, tmp_path, capsys):
    """Of a checkpoint with the names of several devices; a config must say how images are read."""
    import cv2
    from mmengine.config import Config

    config, file, out, image = (str(tmp_path / f'a.{end}') for end in ('py', 'pth', 'pt2', 'png'))
    cv2.imwrite(image, np.random.default_rng(0).integers(0, 255, (64, 64, 3)))
    state = {f'module.{name}': value for name, value in detector.state_dict().items()}
    torch.save(dict(state_dict=state), file)
    model = dict(
        thin_retinanet('mmkw.KWResNet'), data_preprocessor=dict(type='DetDataPreprocessor')
    )
    command = ['export', config, file, out, '--backbone', '--shape', '64', '64', '--form', 'static']
    command += ['--images', image, '--keep', 'backbone.layer1.0.conv2', 'backbone.layer1.1.conv1']
    for pipeline, message in (
        (None, 'no test_dataloader'),
        (PACK, 'reads no files'),
        ([*LOAD, *PACK], None),
    ):
        loader = {} if pipeline is None else dict(dataset=dict(type='a', pipeline=pipeline))
        content = dict(default_scope='mmdet', model=model)
        Config(dict(content, test_dataloader=loader) if loader else content).dump(config)
        if message:
            with pytest.raises(SystemExit):
                cli.main(command)
            assert message in capsys.readouterr().err
    cli.main(command)
    report = capsys.readouterr().out
    assert f'Written: {out}' in report
    rows = [line.split(' | ') for line in report.splitlines() if line.endswith('| dynamic |')]
    assert [row[0].removeprefix('| ') for row in rows] == command[-2:]
    cli.main([*command[:-2], 'top50%'])
    assert ', 2 of 4 layers stay dynamic.' in capsys.readouterr().out


@pytest.mark.parametrize('kind', ['mmkw.KWResNet', 'mmkw.ResNet'])
def test_the_command_refuses_checkpoints_that_lack_what_it_exports(kind, tmp_path, capsys):
    """It would write random weights."""
    from mmengine.config import Config

    config, file, out = (str(tmp_path / name) for name in ('a.py', 'a.pth', 'a.pt2'))
    model = thin_retinanet(kind)
    Config(dict(default_scope='mmdet', model=model)).dump(config)
    state = build_model(Config.fromfile(config)).state_dict()
    backbone = {k: v for k, v in state.items() if k.startswith('backbone.')}
    bare = {k.removeprefix('backbone.'): v for k, v in backbone.items()}
    heads = {k: v for k, v in state.items() if k not in backbone}
    for stored, options in (
        (heads, []),
        (heads, ['--backbone']),
        (backbone, []),
        (bare, ['--backbone']),
        ({'layer1.0.conv9.weight': torch.ones(1)}, ['--backbone']),
    ):
        torch.save(dict(state_dict=stored), file)
        with pytest.raises(SystemExit) as stop:
            cli.main(['export', config, file, out, '--shape', '64', '64', *options])
        assert stop.value.code == 2
        assert f'checkpoint {file}: ' in capsys.readouterr().err
        assert not Path(out).exists()


def test_what_a_model_does_not_use_of_a_checkpoint_is_told(tmp_path):
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    MMLogger.get_current_instance().addHandler(handler)
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    for more in ({}, {'other': torch.ones(1)}):
        assert not lines
        torch.save(dict(**model.state_dict(), **more), tmp_path / 'a.pth')
        load_trained(model, str(tmp_path / 'a.pth'))
    MMLogger.get_current_instance().removeHandler(handler)
    (line,) = lines
    assert 'has 1 tensors that the model lacks, such as other: they are not used' in line


def test_a_model_without_a_dense_head_is_named():
    with pytest.raises(ValueError, match=r'Sequential has no head that .* of the images alone'):
        DenseNetwork(nn.Sequential())


@pytest.mark.filterwarnings('ignore')
def test_no_exporter_makes_a_wrong_file_from_one_image(tmp_path):
    """Other images get their own kernels, or the file refuses them; the same of the static twin.

    Traces, and the older exporter, which traces, are right for any batch.
    """
    needs('.onnx')
    for make in (nn.Conv2d, mmkw.KWConv2d):
        layer = make(8, 8, 3).eval()
        image, images = torch.randn(1, 8, 6, 6), torch.randn(3, 8, 6, 6)
        with torch.no_grad():
            expected = layer(images)
        batch = ({0: torch.export.Dim.DYNAMIC},)
        with torch.no_grad():
            for name, options in {
                'dynamo': dict(dynamo=True, dynamic_shapes=batch),
                'old': dict(dynamo=False, dynamic_axes={'x': [0]}, input_names=['x']),
            }.items():
                path = tmp_path / f'{make.__name__}-{name}.onnx'
                try:
                    torch.onnx.export(layer, (image,), path, verbose=False, **options)
                    session = onnxruntime().InferenceSession(path)
                    (results,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
                except Exception as error:
                    # The exporter or the file refuses, not this test.
                    assert not isinstance(error, (TypeError, NameError)), (name, error)
                    assert name == 'dynamo'
                else:
                    torch.testing.assert_close(torch.from_numpy(results), expected)
            traced = torch.jit.trace(layer, image)
            torch.testing.assert_close(traced(images), expected)
            with pytest.raises(Exception, match='specialized'):
                torch.export.export(layer, (image,), dynamic_shapes=batch)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(path='a.txt'), r"path must end in .onnx or .pt2, got 'a.txt'"),
        (dict(path='no/a.pt2'), r"path: the folder 'no' does not exist"),
        (dict(dynamic='batch'), r"dynamic must be some of \('batch', 'size'\), got 'batch'"),
        (dict(dynamic=('time',)), r'dynamic must be some of'),
        (dict(form='loop'), r"form must be 'scan', 'matmul' or 'static', got 'loop'"),
        (dict(model=torch.relu), r'model must be a torch.nn.Module, got a builtin_function'),
        (dict(example=[1]), r'example must be a tensor of images, got list'),
        (dict(example=torch.rand(1, 8)), r"dynamic has 'size', but example is of \(1, 8\)"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = dict(model=mmkw.KWConv2d(8, 8, 3), example=torch.rand(1, 8, 6, 6), path='a.pt2')
    with pytest.raises(ValueError, match=message):
        export(**{**arguments, **change})


def test_what_cannot_be_written_is_named_before_anything_is_computed(tmp_path):
    layer, x = mmkw.KWConv2d(8, 8, 3), torch.rand(1, 8, 6, 6)
    (tmp_path / 'folder.pt2').mkdir()
    with pytest.raises(ValueError, match=r"folder.pt2' is a folder; name a file"):
        export(layer, x, tmp_path / 'folder.pt2')
    needs('.onnx')
    for make in (nn.Conv2d, mmkw.KWConv2d):
        with pytest.raises(ValueError, match=r'parameters of torch.float64, .* take model.float'):
            export(make(8, 8, 3).double(), x.double(), tmp_path / 'a.onnx')
    # What someone else has named so stays.
    other = tmp_path / 'a.part.pt2'
    other.write_text('mine')
    export(layer, x, tmp_path / 'a.pt2')
    assert other.read_text() == 'mine'
    assert {path.name for path in tmp_path.iterdir()} == {'folder.pt2', 'a.part.pt2', 'a.pt2'}


class NeedsMore(nn.Module):
    """As heads that need the sizes of images."""

    def forward(self, x, sizes=None):
        if sizes is None:
            raise AssertionError
        return x


class Wrong(nn.Module):
    """Computes something else in a file."""

    def forward(self, x):
        return x + torch.compiler.is_exporting()


class Nothing(nn.Module):
    """Has a second output that is no number in a file; `max` alone would lose it."""

    def forward(self, x):
        return x, x + (torch.nan if torch.compiler.is_exporting() else 0)


class Fixed(nn.Module):
    """Takes one size only."""

    def forward(self, x):
        return x.view(-1, 36)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    'model, message',
    [
        (Wrong(), 'would differ from the network by'),
        (Nothing(), 'would differ from the network by inf'),
        (NeedsMore(), 'images of .2, 1, 6, 6. alone: AssertionError: it says no more'),
        (Fixed(), r'not take images of \(2, 1, 70, 6\)'),
    ],
)
def test_no_file_is_left_that_computes_something_else(model, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export(model, torch.rand(2, 1, 6, 6), tmp_path / 'a.pt2')
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('layer', [nn.Linear, mmkw.KWLinear], ids=['static', 'dynamic'])
def test_a_comparison_of_zeros_is_said_to_say_nothing(layer, tmp_path, caplog):
    network = layer(4, 4)
    export(network, torch.rand(2, 4), tmp_path / 'a.pt2', dynamic=('batch',))
    assert not [r for r in caplog.records if r.name == 'mmkw']
    network = nn.Sequential(network, nn.Threshold(1e9, 0))
    export(network, torch.rand(2, 4), tmp_path / 'a.pt2', dynamic=('batch',))
    (record,) = (r for r in caplog.records if r.name == 'mmkw')
    assert 'an output of zeros alone' in record.getMessage()


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.skipif(shutil.which('g++') is None, reason='AOTInductor needs a C++ compiler')
def test_aotinductor_compiles_for_any_batch_and_size(tmp_path):
    """As the documentation shows."""
    layer, file = mmkw.KWConv2d(8, 16, **CONV).eval(), tmp_path / 'layer.pt2'
    export(layer, torch.randn(1, 8, 9, 11), file, form='matmul')
    package = torch._inductor.aoti_compile_and_package(
        torch.export.load(file), package_path=str(tmp_path / 'compiled.pt2')
    )
    compiled = torch._inductor.aoti_load_package(package)
    for shape in ((1, 8, 9, 11), (2, 8, 20, 11), (5, 8, 9, 30)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)

"""Whole networks, dynamic and static, in files made from one image: any batch and any size."""

import re
from pathlib import Path

import pytest
import torch
from conftest import exhaustively
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from thin_models import segmentor

from mmkw import is_converted
from mmkw.cli import export as command
from mmkw.deploy import DenseNetwork, ExportError, export


def needs(*packages):
    for package in packages:
        pytest.importorskip(package, reason='writes, runs or has the network')


pytestmark = pytest.mark.slow

ONNX = ('onnx', 'onnxruntime', 'onnxscript')


def resnet(depth, stages, **options):
    """The types of the static and the dynamic network, the options of both, of the dynamic one."""
    size = dict(num_stages=stages, strides=(1, 2)[:stages], dilations=(1, 1)[:stages])
    thin = dict(depth=depth, base_channels=8, stem_channels=8, out_indices=(stages - 1,), **size)
    return 'mmkw.ResNet', 'mmkw.KWResNet', thin, options


NETWORKS = {
    'ResNet18 1x': resnet(18, 1),
    'ResNet18 4x': resnet(18, 1, cell_num_ratio=4),
    'ResNet50 1x': resnet(50, 1),
    'ResNet50 4x': resnet(50, 1, cell_num_ratio=4),
    'ConvNeXt': (
        'mmkw.ConvNeXt',
        'mmkw.KWConvNeXt',
        dict(arch=dict(depths=[1], channels=[8]), out_indices=(0,)),
        {},
    ),
    'MobileNetV2': (
        'mmkw.MobileNetV2',
        'mmkw.KWMobileNetV2',
        dict(widen_factor=0.1),
        {},
    ),
}
# Their kinds of layers are those of the others.
REPEATED = ['ResNet18 4x', 'ResNet50 1x', 'MobileNetV2']
THIN = dict(depths=[2], num_heads=[2])
SWINS = {
    'mmdet': dict(type='mmdet.SwinTransformer', embed_dims=8, strides=(4,), window_size=4, **THIN),
    'mmpretrain': dict(
        type='mmpretrain.SwinTransformer', arch=dict(embed_dims=8, **THIN), window_size=4
    ),
}


def build(name, dynamic):
    init_default_scope('mmdet')
    if name in SWINS:
        swin = dict(SWINS[name], out_indices=(0,))
        return MODELS.build(dict(type='mmkw.KWModule', module=swin) if dynamic else swin)
    static_type, dynamic_type, options, more = NETWORKS[name]
    config = dict(type=dynamic_type, **more) if dynamic else dict(type=static_type)
    network = MODELS.build(dict(config, **options))
    # The first blocks compute. All would take long.
    if name == 'MobileNetV2':
        network.layers, network.out_indices = network.layers[:2], (1,)
    elif 'ResNet50' in name:
        del network.layer1[1:]
    return network


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dynamic', [False, True], ids=['static', 'dynamic'])
@pytest.mark.parametrize(
    'name', exhaustively(NETWORKS, ['ResNet18 4x', 'ResNet50 1x', 'MobileNetV2'])
)
def test_a_backbone(name, dynamic, tmp_path):
    needs('mmdet')
    parity = export(build(name, dynamic), torch.randn(1, 3, 64, 64), tmp_path / 'a.pt2')
    check(parity, sizes=3)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dynamic', [False, True], ids=['static', 'dynamic'])
@pytest.mark.parametrize('name', exhaustively(['ResNet18 1x', 'MobileNetV2'], ['MobileNetV2']))
def test_a_trace_of_one_image(name, dynamic, tmp_path):
    """TorchScript, which C++ programs read: for any batch and any size of image."""
    needs('mmdet')
    network = build(name, dynamic)
    network.eval()
    torch.jit.trace(network, torch.randn(1, 3, 64, 64)).save(tmp_path / 'a.pt')
    traced = torch.jit.load(tmp_path / 'a.pt')
    for shape in ((1, 3, 64, 64), (3, 3, 64, 64), (2, 3, 96, 80)):
        images = torch.randn(shape)
        with torch.no_grad():
            found, expected = (tuple(run(images)) for run in (traced, network))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def check(parity, sizes):
    assert {found.shape[0] for found in parity} == {1, 2, 3, 5, 8}
    assert len({found.shape[1:] for found in parity}) == sizes
    assert max(found.difference for found in parity) < 1e-4


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dynamic', [False, True], ids=['static', 'dynamic'])
@pytest.mark.parametrize('library', exhaustively(SWINS, ['mmpretrain']))
def test_a_swin_for_any_batch(library, dynamic, tmp_path):
    """The libraries' count images in Python; of any size they are refused."""
    needs('mmdet', library)
    network, image, file = build(library, dynamic), torch.randn(1, 3, 64, 64), tmp_path / 'a.pt2'
    check(export(network, image, file, dynamic=('batch',)), sizes=1)
    assert not [m for m in network.modules() if 'window_reverse' in m.__dict__]
    with pytest.raises(ExportError, match=r"into windows.* Try dynamic=\('batch',\)\.$"):
        export(network, image, file)


@pytest.fixture(params=[False, True], ids=['static', 'dynamic'])
def logits(request):
    """A segmentor's network."""
    needs('mmdet', 'mmseg', *ONNX)
    init_default_scope('mmseg')
    return DenseNetwork(MODELS.build(segmentor(request.param))).eval()


@pytest.mark.filterwarnings('ignore')
def test_a_segmentor_in_both_runtimes_and_in_half_precision(logits, tmp_path, capsys):
    image, file = torch.randn(1, 3, 64, 64), tmp_path / 'a.onnx'
    check(export(logits, image, file), sizes=3)
    images = torch.randn(3, 3, 96, 64)
    with torch.no_grad():
        expected = logits.model(images, mode='tensor')
    import onnxruntime

    (found,) = onnxruntime.InferenceSession(file).run(None, {'images': images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)

    # By the command, from a config and a checkpoint.
    half, config, checkpoint = (str(tmp_path / name) for name in ('a.half.onnx', 'a.py', 'a.pth'))
    model = segmentor(is_converted(logits.model.backbone))
    Config(dict(default_scope='mmseg', model=model)).dump(config)
    torch.save(dict(state_dict=logits.model.state_dict()), checkpoint)
    command.main([config, checkpoint, half, '--half', '--shape', '64', '64'])
    table = dict(re.findall(r'^\| (\dx3x\S+) \| (\S+) ', capsys.readouterr().out, re.M))
    assert {'1x3x64x64', '8x3x64x64'} < set(table)
    assert 1e-5 < max(map(float, table.values())) < 0.02
    assert Path(half).stat().st_size < file.stat().st_size

    openvino = pytest.importorskip('openvino', reason='runs the same file')
    # By default it computes in less than float32 where a processor can.
    exact = {'INFERENCE_PRECISION_HINT': 'f32'}
    network = openvino.Core().compile_model(file, 'CPU', exact)
    for shape in ((1, 3, 64, 64), (3, 3, 64, 64), (2, 3, 96, 128)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected = logits(images)
        found = torch.from_numpy(network(images.numpy())[0])
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()

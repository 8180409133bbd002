"""The authors' files in the tools and interfaces of MMDetection, and rewritten offline."""

import sys

import numpy as np
import pytest
import torch
from command_util import run
from configs_util import build_model
from conftest import exhaustively
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import load_state_dict
from test_published import CASES, oracle, unused_listed

from mmkw.backbones import rewrite_published
from mmkw.checkpoints import CheckpointMismatchError, read_checkpoint

pytest.importorskip('mmdet', reason='runs MMDetection')
CONFIG = """
_base_ = '{root}/configs/demo/mask-rcnn_kw1x-r18_fpn_mini-coco.py'
model = dict(
    backbone=dict(_delete_=True, type='mmkw.KWMobileNetV2', out_indices=(1, 2, 4)),
    neck=dict(in_channels=[24, 32, 96]),
)
data = '{data}/'
test_dataloader = dict(dataset=dict(data_root=data))
test_evaluator = dict(ann_file=data + 'annotations/instances_val.json')
"""
CLASSES = tuple(f'digit {i}' for i in range(10))


@pytest.fixture(scope='module')
def detector(root, mini_coco, tmp_path_factory):
    """A config, and a file for it as MMDetection 2 wrote them, under the published names."""
    folder = tmp_path_factory.mktemp('published')
    (folder / 'config.py').write_text(CONFIG.format(root=root, data=mini_coco))
    model = build_model(Config.fromfile(folder / 'config.py'))
    state, _ = oracle('mobilenet-1x', torch.randn(1, 3, 32, 32), 0)
    file = {f'backbone.{k}': v for k, v in state.items() if not k.startswith('classifier')}
    file |= {k: v for k, v in model.state_dict().items() if not k.startswith('backbone.')}
    meta = dict(mmdet_version='2.28.2', CLASSES=CLASSES, config='model = dict()', epoch=12, iter=9)
    optimizer = dict(state={0: dict(step=9, exp_avg=torch.ones(2))}, param_groups=[dict(lr=1e-4)])
    torch.save(dict(meta=meta, state_dict=file, optimizer=optimizer), folder / 'published.pth')
    return folder / 'config.py', folder / 'published.pth', file


def assert_loaded(model, file):
    """Every tensor of the file is in the model, under mmdet's names."""
    ours, _ = rewrite_published(file)
    found = model.state_dict()
    assert set(found) == set(ours)
    assert all(torch.equal(found[name], ours[name]) for name in ours)


def test_init_detector_takes_the_detection_file(detector):
    from mmdet.apis import inference_detector, init_detector

    config, path, file = detector
    model = init_detector(str(config), str(path), device='cpu')
    assert_loaded(model, file)
    assert model.dataset_meta['classes'] == CLASSES
    result = inference_detector(model, np.full((90, 110, 3), 128, np.uint8))
    assert result.pred_instances.masks.shape[1:] == (90, 110)


def test_the_inferencer_takes_the_detection_file(detector, mini_coco):
    from mmdet.apis import DetInferencer

    config, path, file = detector
    inferencer = DetInferencer(str(config), str(path), device='cpu', show_progress=False)
    assert_loaded(inferencer.model, file)
    image = next((mini_coco / 'val').iterdir())
    (prediction,) = inferencer(str(image), no_save_vis=True)['predictions']
    assert set(prediction) == {'labels', 'scores', 'bboxes', 'masks'}


@pytest.mark.parametrize('rewritten', [False, True])
def test_the_tools_take_the_detection_file(detector, root, tmp_path, rewritten):
    config, path, _ = detector
    if rewritten:
        path = rewrite(root, path, tmp_path / 'rewritten.pth')[0]
    command = [sys.executable, 'tools/test.py', config, path, '--work-dir', tmp_path]
    result, output = run(root, *command)
    assert result.returncode == 0, output
    assert 'coco/segm_mAP' in output
    # MMEngine's words for tensors that are missing, left over or of another shape.
    assert 'do not match exactly' not in output and 'size mismatch' not in output


def rewrite(root, source, target, *options):
    command = [sys.executable, '-m', 'mmkw', 'convert']
    return target, run(root, *command, source, target, *options)[0]


def test_rewritten_detection_file(detector, root, tmp_path):
    config, path, file = detector
    target, result = rewrite(root, path, tmp_path / 'rewritten.pth')
    assert f'{len(file)} tensors written' in result.stdout, result.stderr
    assert 'Left out, beyond the backbone: nothing' in result.stdout
    checkpoint = read_checkpoint(str(target))
    assert checkpoint['meta'] == dict(source='published.pth', dataset_meta=dict(classes=CLASSES))
    model = build_model(Config.fromfile(config))
    load_state_dict(model, checkpoint['state_dict'], strict=True)
    assert_loaded(model, file)


@pytest.mark.parametrize(
    'name',
    exhaustively(
        ['r18-1d2x', 'r50-1d2x', 'convnext-tiny-1x', 'mobilenet-4x'],
        ['r50-1d2x', 'convnext-tiny-1x'],
    ),
)
def test_rewritten_imagenet_file_holds_what_the_network_loads(name, root, tmp_path):
    state, _ = oracle(name, torch.randn(1, 3, 32, 32), 0)
    torch.save(dict(model=state, epoch=300), tmp_path / 'published.pth')
    target, result = rewrite(root, tmp_path / 'published.pth', tmp_path / 'rewritten.pth')
    assert result.returncode == 0, result.stderr
    network, twin = CASES[name][0](), CASES[name][0]()
    left_out = set(result.stdout.strip().split('backbone: ')[1].rstrip('.').split(', '))
    assert {key.split('.')[0] for key in left_out} == set(CASES[name][-1].split())
    load_state_dict(network, read_checkpoint(str(target))['state_dict'])
    twin.load_state_dict(dict(state), strict=False)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in twin.state_dict().items())
    assert set(read_checkpoint(str(target))['state_dict']) == set(network.state_dict())


@pytest.mark.parametrize('name', ['mobilenet-1x', 'mobilenet-4x', 'mobilenet-1d2x'])
def test_a_segmentor_s_mobilenet_takes_the_published_file(name):
    """It ends before the last convolution, whose cells its warehouse keeps."""
    pytest.importorskip('mmseg')
    x = torch.randn(2, 3, 32, 32)
    state, expected = oracle(name, x, 0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        arguments = dict(out_indices=(1, 2, 4, 6))
        network, twin = (CASES[name][0](**arguments) for _ in range(2))
    with unused_listed() as unused:
        missing, unexpected = network.load_state_dict(dict(state), strict=False)
    assert not missing and not unexpected
    assert {key.split('.')[0] for key in unused} >= {'classifier', 'conv2'}
    network.eval()
    with torch.no_grad():
        outputs = network(x)
    for ours, theirs in zip(outputs[:3], expected):
        assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-4
    # Rewritten offline it is the same.
    rewritten, left_out = rewrite_published(dict(state_dict=state), 'mmseg')
    assert unused == set(left_out)
    load_state_dict(twin, rewritten, strict=True)
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in network.state_dict().items())


def test_what_cannot_be_rewritten_is_named(root, tmp_path):
    torch.save(dict(model={'conv1.weight': torch.ones(1)}), tmp_path / 'static.pth')
    target, result = rewrite(root, tmp_path / 'static.pth', tmp_path / 'out.pth')
    assert result.returncode == 2 and not target.exists()
    assert 'static.pth is no KernelWarehouse checkpoint' in result.stderr
    _, result = rewrite(root, tmp_path / 'nowhere.pth', target)
    assert 'nowhere.pth does not exist' in result.stderr and 'Traceback' not in result.stderr
    _, result = rewrite(root, tmp_path / 'static.pth', tmp_path / 'static.pth')
    assert 'exists; remove it or give another name' in result.stderr
    foreign = {'warehouse_manager.weights.0': torch.ones(1), 'blocks.0.qkv': torch.ones(1)}
    with pytest.raises(CheckpointMismatchError, match=r'1 of the tensors, such as blocks\.0\.qkv'):
        rewrite_published(foreign)

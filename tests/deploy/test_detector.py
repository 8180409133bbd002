"""Whole detectors with their network in a file find what the detectors find."""

import numpy as np
import pytest
import torch
from conftest import exhaustively
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope
from thin_models import DETECTORS, mask_rcnn, retinanet, segmentor
from torch import nn

import mmkw
from mmkw.deploy import DenseNetwork, Detector, export, to_static

for package in ('onnx', 'onnxruntime', 'onnxscript'):
    pytest.importorskip(package, reason='writes and runs ONNX')
registry = pytest.importorskip('mmdet.registry', reason='has the detectors')

PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 64), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor')),
]


def make(config):
    """A detector with weights that tell images and places apart."""
    init_default_scope('mmdet')
    model = registry.MODELS.build(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if name.endswith(('_cls', '_reg')):
                nn.init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()
        DenseNetwork(model)(torch.randn(4, 3, 64, 64))
    loader = dict(dataset=dict(pipeline=PIPELINE))
    model.cfg = Config(dict(default_scope='mmdet', test_dataloader=loader, model=config))
    return model.eval()


def images():
    rng = np.random.default_rng(0)
    shapes = [(60, 90, 3), (90, 60, 3)]
    return [rng.integers(0, 255, shape, dtype=np.uint8) for shape in shapes]


def check_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        found, expected = one.pred_instances, other.pred_instances
        assert len(expected) == 5 and set(found.keys()) == set(expected.keys())
        assert one.metainfo == other.metainfo
        assert found.labels.tolist() == expected.labels.tolist()
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.bboxes, expected.bboxes, atol=1e-2, rtol=1e-4)
        if 'masks' in expected:
            assert torch.equal(found.masks, expected.masks) and expected.masks.any()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    'name, kind',
    exhaustively(
        [
            *((name, kind) for name in DETECTORS for kind in ('static', 'dynamic')),
            ('mask_rcnn', 'static twin'),
        ],
        [('retinanet', 'static'), ('retinanet', 'dynamic'), ('rtmdet', 'static')],
    ),
)
def test_a_detector_finds_the_same(name, kind, tmp_path):
    from mmdet.apis import inference_detector

    model, file = make(DETECTORS[name](kind != 'static')), tmp_path / 'network.onnx'
    if kind == 'static twin':
        samples = [dict(img=image, img_id=0) for image in images()]
        pipeline = Compose([dict(type='LoadImageFromNDArray'), *PIPELINE[1:]])
        loader = [pseudo_collate([pipeline(sample)]) for sample in samples]
        model, report = to_static(model, loader)
        assert not mmkw.is_converted(model.backbone) and report.distance > 0
    parity = export(DenseNetwork(model), torch.randn(1, 3, 64, 64), file)
    assert max(found.difference for found in parity) < 1e-4
    detector = Detector(model, file)
    assert detector.model.backbone is None and model.backbone is not None
    check_same(detector(images()), inference_detector(model, images()))
    check_same([detector(images()[0])], [inference_detector(model, images()[0])])


@pytest.mark.filterwarnings('ignore')
def test_what_does_not_fit_is_named(tmp_path):
    model, file = make(retinanet(False)), tmp_path / 'network.onnx'
    export(DenseNetwork(model), torch.randn(1, 3, 64, 96), file, dynamic=())
    with pytest.raises(
        ValueError, match=r'takes images of \(1, 3, 64, 96\), .* gives \(1, 3, 96, 64\)'
    ):
        Detector(model, file)(images())
    with pytest.raises(ValueError, match='does not compute what the RetinaNet does'):
        Detector(make(retinanet(False)), file)
    with pytest.raises(ValueError, match='does not compute what the MaskRCNN does'):
        Detector(make(mask_rcnn(False)), file)
    registry = pytest.importorskip('mmseg.registry', reason='has the segmentor')
    init_default_scope('mmseg')
    with pytest.raises(ValueError, match='must be a detector of MMDetection, got a EncoderDecoder'):
        Detector(registry.MODELS.build(segmentor(False)), file)

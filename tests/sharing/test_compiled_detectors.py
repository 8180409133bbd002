"""Detectors under ``torch.compile``: in as many graphs as their static twins."""

import copy

import pytest
import torch
from mmengine import ConfigDict
from mmengine.registry import init_default_scope
from torch._dynamo.utils import counters

from mmkw import backbones  # noqa: F401  (registers them)

detection = pytest.importorskip('mmdet.registry', reason='needs MMDetection')


def retinanet(kind):
    """A thin detector of one stage; its heads are small, too."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    return detection.MODELS.build(
        ConfigDict(
            type='RetinaNet',
            data_preprocessor=dict(type='DetDataPreprocessor'),
            backbone=dict(
                type=kind,
                depth=18,
                base_channels=8,
                stem_channels=8,
                num_stages=1,
                strides=(1,),
                dilations=(1,),
                out_indices=(0,),
            ),
            neck=dict(type='FPN', in_channels=[8], out_channels=8, num_outs=2),
            bbox_head=dict(
                type='RetinaHead',
                num_classes=3,
                in_channels=8,
                stacked_convs=1,
                feat_channels=8,
                anchor_generator=dict(
                    type='AnchorGenerator',
                    octave_base_scale=4,
                    scales_per_octave=1,
                    ratios=[1.0],
                    strides=[4, 8],
                ),
            ),
            test_cfg=dict(nms_pre=10, min_bbox_size=0, score_thr=0.0, max_per_img=5),
        )
    )


def learned(model, x):
    model.zero_grad()
    outputs = [y for level in model(x, mode='tensor') for y in level]
    sum(y.square().mean() for y in outputs).backward()
    return [y.detach() for y in outputs], [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_a_detector_is_compiled_as_its_static_twin(backend):
    found = {}
    for kind in ('mmkw.ResNet', 'mmkw.KWResNet'):
        torch._dynamo.reset()
        counters.clear()
        model = retinanet(kind)
        plain, compiled = copy.deepcopy(model), torch.compile(model, backend=backend, dynamic=True)
        for size in ((64, 64), (64, 96), (96, 64))[: 3 if backend == 'eager' else 2]:
            x = torch.randn(2, 3, *size)
            results = learned(compiled, x)
            for values, expected in zip(results, learned(plain, x)):
                torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-4)
        assert not counters['graph_break']
        found[kind] = counters['stats']['unique_graphs'], dict(counters['frames'])
    assert found['mmkw.KWResNet'] == found['mmkw.ResNet']

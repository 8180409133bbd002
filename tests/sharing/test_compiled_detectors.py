"""Detectors under ``torch.compile``: in as many graphs as their static twins."""

import copy

import pytest
import torch
from mmengine.registry import init_default_scope
from torch._dynamo.utils import counters
from twin_networks import thin_retinanet

from mmkw import backbones  # noqa: F401  (registers them)

detection = pytest.importorskip('mmdet.registry', reason='needs MMDetection')


def retinanet(kind):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    return detection.MODELS.build(thin_retinanet(kind))


def learned(model, x):
    model.zero_grad()
    outputs = [y for level in model(x, mode='tensor') for y in level]
    sum(y.square().mean() for y in outputs).backward()
    return [y.detach() for y in outputs], [p.grad.clone() for p in model.parameters()]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_detector_is_compiled_as_its_static_twin():
    found = {}
    for kind in ('mmkw.ResNet', 'mmkw.KWResNet'):
        torch._dynamo.reset()
        counters.clear()
        model = retinanet(kind)
        plain = copy.deepcopy(model)
        compiled = torch.compile(model, backend='aot_eager', dynamic=True)
        # With sides that differ: where they are equal PyTorch makes a graph for that.
        for size in ((64, 96), (128, 64)):
            x = torch.randn(2, 3, *size)
            results = learned(compiled, x)
            for values, expected in zip(results, learned(plain, x)):
                torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-4)
        assert not counters['graph_break']
        found[kind] = counters['stats']['unique_graphs'], dict(counters['frames'])
    assert found['mmkw.KWResNet'] == found['mmkw.ResNet']

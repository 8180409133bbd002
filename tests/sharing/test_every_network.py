"""What is done to every network of the list, static and dynamic: the same in both."""

import copy

import pytest
import torch
from conftest import exhaustively
from mmcv.cnn.utils import fuse_conv_bn
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from twin_networks import BACKBONES, HEADS, build, outputs

from mmkw.checkpoints import CheckpointMismatchError
from mmkw.sharing import SharingPlan, convert

# They are much like one of the others.
SIMILAR = [
    'mmdet.ResNeXt',
    'mmdet.RegNet',
    'mmseg.ResNetV1c',
    'mmseg.SwinTransformer',
    'mmseg.MobileNetV2',
    'mmseg.MAE',
    'mmdet.FCOSHead',
]
NETWORKS = [*BACKBONES, *HEADS]
GAUGE = dict(rtol=1e-3, atol=1e-4)
# mmcv fuses a convolution that several norms follow once for each, also in the static head.
SEVERAL_NORMS = {'mmdet.RTMDetSepBNHead'}
# The static ones look at values, or keep code from being traced.
UNTRACED = {
    'mmdet.EfficientNet',
    'mmdet.FCOSHead',
    'mmdet.RTMDetSepBNHead',
    'mmdet.RetinaHead',
    'mmdet.Shared2FCBBoxHead',
    'mmdet.SwinTransformer',
    'mmseg.MixVisionTransformer',
    'mmseg.MobileNetV3',
    'mmseg.SwinTransformer',
    'mmseg.VisionTransformer',
}


def networks(but=()):
    """All that a test takes."""
    return exhaustively([kind for kind in NETWORKS if kind not in but], SIMILAR)


def twins(kind):
    """A static network, and a dynamic one that computes the same."""
    torch.manual_seed(0)
    static, dynamic = build(kind, False), build(kind, True)
    dynamic.load_state_dict(static.state_dict())
    static.eval()
    dynamic.eval()
    return static, dynamic


@torch.no_grad()
def same(kind, first, second):
    for one, other in zip(outputs(kind, first), outputs(kind, second)):
        torch.testing.assert_close(one, other, **GAUGE)


@pytest.mark.parametrize('kind', networks(SEVERAL_NORMS))
def test_fusing_batch_norms(kind):
    """The results stay; norms after static convolutions go, those after dynamic ones stay."""
    left = []
    for network in twins(kind):
        fused = fuse_conv_bn(copy.deepcopy(network))
        same(kind, network, fused)
        left.append(sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules()))
    assert left[0] <= left[1]


@pytest.mark.parametrize('kind', networks())
def test_averages(kind):
    """Of two networks, by an average of all their parameters."""
    for network in twins(kind):
        average = AveragedModel(network)
        average.update_parameters(network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.02
        average.update_parameters(network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.01
        average.module.eval()
        same(kind, network, average.module)


@pytest.mark.parametrize('kind', networks())
def test_estimating_batch_norms_anew(kind):
    """With a static checkpoint both have the same maps, hence the same statistics."""
    found = []
    for network in twins(kind):

        class Images(nn.Module):
            def __init__(self, network):
                super().__init__()
                self.network = network

            def forward(self, seed):
                return outputs(kind, self.network, seed=int(seed))

        torch.manual_seed(0)
        update_bn([torch.tensor(seed) for seed in range(2)], Images(network))
        network.eval()
        found.append({k: v for k, v in network.state_dict().items() if 'running' in k})
    static, dynamic = found
    for name, value in static.items():
        torch.testing.assert_close(dynamic[name], value, **GAUGE)


@pytest.mark.parametrize('kind', networks(UNTRACED))
def test_tracing(kind):
    static, dynamic = twins(kind)
    same(kind, torch.fx.symbolic_trace(static), static)
    same(kind, torch.fx.symbolic_trace(dynamic), static)


class Model(nn.Module):
    def __init__(self, kind, dynamic):
        super().__init__()
        self.first = build(kind, dynamic)
        self.last = nn.Module()
        self.last.layer = nn.Conv2d(8, 8, 3)
        if dynamic:
            convert(self.last, SharingPlan.make([('layer', 'one')]))


@pytest.mark.parametrize('kind', networks())
def test_a_file_is_taken_whole_or_not_at_all(kind):
    state = Model(kind, False).state_dict()
    model = Model(kind, True)
    before = copy.deepcopy(model.state_dict())
    wrong = dict(state, **{'last.layer.weight': torch.randn(8, 4, 3, 3)})
    with pytest.raises(CheckpointMismatchError, match='layer'):
        model.load_state_dict(wrong, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.load_state_dict(state)
    after = model.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())

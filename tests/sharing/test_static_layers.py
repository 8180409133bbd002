"""Which layers a rule leaves static, and that it says so."""

import logging

import pytest
import torch
from mmengine.logging import MMLogger
from torch import nn
from twin_networks import BACKBONES, HEADS, build, outputs

from mmkw.layers import PlanError, StandsForStatic
from mmkw.layers.static_layers import predictions, read_by_others
from mmkw.sharing import SharingPlan, convert, family_rule, pattern_plan

PREDICTIONS = {
    'mmdet.Shared2FCBBoxHead': {'fc_cls', 'fc_reg'},
    'mmdet.RetinaHead': {'retina_cls', 'retina_reg'},
    'mmdet.FCOSHead': {'conv_cls', 'conv_reg', 'conv_centerness'},
    'mmdet.RTMDetSepBNHead': {f'rtm_{part}.{i}' for part in ('cls', 'reg') for i in range(5)},
    # Its transposed convolution has no norm or activation of its own.
    'mmdet.FCNMaskHead': {'conv_logits', 'upsample'},
    'mmseg.FCNHead': {'conv_seg'},
    'mmseg.SegformerHead': {'conv_seg'},
}


@pytest.fixture
def log():
    """The warnings in MMEngine's log."""
    lines, handler = [], logging.Handler()
    handler.setLevel(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.mark.parametrize('kind', HEADS)
def test_predictions_stay_static(kind):
    dynamic = build(kind, True, num_classes=80)
    assert predictions(build(kind, False)) == predictions(dynamic) == PREDICTIONS[kind]
    for name in PREDICTIONS[kind]:
        assert not isinstance(dynamic.get_submodule(name), StandsForStatic)


def test_hidden_layers_without_a_name_of_their_own():
    """As in CenterNet's head, DETR's branches and the RPN's."""

    class OtherHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.heatmap = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1))
            self.branch = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32))
            self.rpn_conv = nn.Conv2d(32, 32, 3)
            self.rpn_cls = nn.Conv2d(32, 32, 1)

    assert predictions(OtherHead()) == {'heatmap.2', 'branch.2', 'rpn_cls'}
    assert {name for name, _ in family_rule(OtherHead())} == {'heatmap.0', 'branch.0', 'rpn_conv'}


@pytest.mark.parametrize('kind', BACKBONES)
def test_backbones_predict_nothing(kind):
    assert not predictions(build(kind, False))


@pytest.mark.parametrize('kind', [*BACKBONES, *HEADS])
def test_every_network_computes(kind):
    """A layer whose weight is read by another module would fail here."""
    static, dynamic = build(kind, False), build(kind, True)
    static.eval()
    dynamic.eval()
    with torch.no_grad():
        shapes = [[y.shape for y in outputs(kind, network)] for network in (static, dynamic)]
    assert shapes[0] == shapes[1]
    dynamic.train()
    sum(y.square().mean() for y in outputs(kind, dynamic)).backward()
    # What sees nothing but one token of zeros may have a gradient of zero; none is no choice.
    assert all(cells.grad is not None for cells in dynamic.warehouse_manager.weights)


@pytest.mark.parametrize('kind', [k for k in ('mmseg.BEiT', 'mmseg.MAE') if k in BACKBONES])
def test_weights_that_others_read(kind):
    network = build(kind, False)
    reader = type(network.layers[0].attn).__name__
    assert read_by_others(network) == {f'layers.{i}.attn.qkv': reader for i in range(4)}
    assert {name for name, _ in family_rule(network)} == {
        f'layers.{i}.ffn.layers.{part}' for i in range(4) for part in ('0.0', '1')
    }
    with pytest.raises(PlanError, match=f'attn.qkv.*{reader} computes with its weight'):
        pattern_plan(network, [dict(match=r'.*qkv')])
    with pytest.raises(PlanError, match=f'cannot be dynamic: {reader} computes with its weight'):
        convert(network, SharingPlan.make([('layers.0.attn.qkv', 'one')]))


def test_readers_are_found_where_forward_calls_them():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.called, self.set = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.called(self.compute(x))

        def compute(self, x):
            return nn.functional.linear(x, self.read.weight) + self.helper()

        def helper(self):
            return self.compute if False else 0

        def init_weights(self):
            nn.init.zeros_(self.set.weight)

    assert set(read_by_others(nn.Sequential(Reader()))) == {'0.read'}
    torch_layer = nn.TransformerEncoderLayer(16, 2, 32)
    assert {'linear1', 'linear2'} <= set(read_by_others(torch_layer))


def test_a_rule_that_covers_little_says_so(log):
    class ConvNeXt(nn.Module):
        """Of that name, but of other names of layers."""

        def __init__(self):
            super().__init__()
            self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 32, 4))])
            self.blocks = nn.ModuleList([nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3)])

    assert family_rule(ConvNeXt()) == [('downsample_layers.0.0', 'stem')]
    (line,) = log
    assert '1 of 3 layers' in line and 'blocks.1' in line
    log.clear()
    family_rule(build('mmkw.ConvNeXt', False))
    family_rule(build('testConvNeXt', False))
    assert not log


def test_convnext_of_mmpretrain():
    pairs = family_rule(build('testConvNeXt', False))
    names = {name for name, _ in pairs}
    static = build('testConvNeXt', False)
    kinds = (nn.Conv2d, nn.Linear)
    assert names == {name for name, m in static.named_modules() if isinstance(m, kinds)}
    homes = dict(pairs)
    assert homes['downsample_layers.0.0'] == 'stem'
    assert homes['stages.2.0.depthwise_conv'].startswith('stage3_depthwise')
    assert homes['stages.2.1.pointwise_conv2'].startswith('stage3_pointwise')
    torch.manual_seed(0)
    dynamic = build('testConvNeXt', True)
    dynamic.load_state_dict(static.state_dict())
    expected, found = (outputs('testConvNeXt', n.eval())[0] for n in (static, dynamic))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

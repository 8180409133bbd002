"""Which layers a rule leaves static, and that it says so."""

import copy
import logging
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from mmcv.cnn.bricks.transformer import BaseTransformerLayer
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from twin_networks import BACKBONES, HEADS, build, outputs

from mmkw.layers import KWLinear, LayerAttention, PlanError, StandsForStatic, set_temperature
from mmkw.layers.static_layers import predictions, used_by_others
from mmkw.sharing import SharingPlan, convert, family_rule, pattern_plan, to_static

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
    assert used_by_others(network) == {
        f'layers.{i}.attn.qkv': f'{reader} computes with its weight' for i in range(4)
    }
    assert {name for name, _ in family_rule(network)} == {
        f'layers.{i}.ffn.layers.{part}' for i in range(4) for part in ('0.0', '1')
    }
    with pytest.raises(PlanError, match=f'attn.qkv.*{reader} computes with its weight'):
        pattern_plan(network, [dict(match=r'.*qkv')])
    with pytest.raises(PlanError, match=f'cannot be dynamic: {reader} computes with its weight'):
        convert(network, SharingPlan.make([('layers.0.attn.qkv', 'one')]))


CHANNELS = ((256, 4), (512, 8), (1024, 16), (2048, 32))
DETR = dict(
    type='mmdet.DETRHead',
    num_classes=5,
    embed_dims=32,
    loss_cls=dict(type='mmdet.CrossEntropyLoss', use_sigmoid=False, class_weight=1.0),
)


def test_layers_of_a_decoder_are_no_images():
    """Their results come at once, as Tensor[layers, images, queries, channels]."""
    head = MODELS.build(copy.deepcopy(DETR))
    assert set(used_by_others(head)) >= {'reg_ffn.layers.0.0', 'reg_ffn.layers.1'}
    with pytest.raises(PlanError, match='no layer that could be dynamic'):
        list(family_rule(head))
    with pytest.raises(
        PlanError, match=r'reg_ffn.*DETRHead gives it the layers of a decoder first'
    ):
        pattern_plan(head, [dict(match=r'reg_ffn\..*')])


def test_heads_that_compute_otherwise_keep_their_layers():
    """One that inherits the method has the same layers, one with another method has not."""
    kinds = [MODELS.get(f'mmdet.{name}') for name in ('DETRHead', 'ConditionalDETRHead')]
    inheriting, own = type('Inheriting', (kinds[0],), {}), kinds[1]
    options = {key: value for key, value in DETR.items() if key != 'type'}
    assert 'reg_ffn.layers.1' in used_by_others(inheriting(**copy.deepcopy(options)))
    focal = dict(type='mmdet.FocalLoss', use_sigmoid=True)
    assert not used_by_others(own(**{**copy.deepcopy(options), 'loss_cls': focal}))


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_masks_of_a_decoder_are_no_images(scope):
    from mmengine.config import Config

    place = Path(import_module(scope).__file__).parent / '.mim' / 'configs'
    path = 'maskformer/maskformer_r50_ms-16xb1-75e_coco.py'
    if scope == 'mmseg':
        path = 'maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py'
    model = Config.fromfile(place / path).model
    head = model.panoptic_head if scope == 'mmdet' else model.decode_head
    # Of less size, that the test is fast.
    head.num_queries, head.transformer_decoder.num_layers = 10, 1
    kind = dict(mmdet='DetDataSample', mmseg='SegDataSample')[scope]
    sample = getattr(import_module(f'{scope}.structures'), kind)
    shape = dict(img_shape=(64, 64), batch_input_shape=(64, 64), pad_shape=(64, 64))
    x = [torch.randn(2, channels, 64 // s, 64 // s) for channels, s in CHANNELS]
    with DefaultScope.overwrite_default_scope(scope):
        static = MODELS.build(copy.deepcopy(head))
        dynamic = MODELS.build(dict(type='mmkw.KWModule', module=head))
    assert {'mask_embed.0', 'mask_embed.2'} <= set(used_by_others(static))
    assert not isinstance(dynamic.mask_embed[0], KWLinear)
    for attention in (m for m in dynamic.modules() if isinstance(m, LayerAttention)):
        for parameter in attention.parameters():
            nn.init.normal_(parameter, std=0.3)
    for network in (static, dynamic):
        network.eval()
        with torch.no_grad():
            both = network(x, [sample(metainfo=shape)] * 2)
            for i in range(2):
                alone = network([y[i : i + 1] for y in x], [sample(metainfo=shape)])
                for one, two in zip(alone, both, strict=True):
                    torch.testing.assert_close(two[:, i : i + 1], one, rtol=1e-4, atol=1e-4)


def test_weights_that_a_method_reads_within_a_part():
    """As TOOD's decomposition does, of the convolution in its ``ConvModule``."""
    config = dict(
        type='mmdet.TOODHead',
        num_classes=4,
        in_channels=32,
        feat_channels=32,
        stacked_convs=2,
        num_dcn=0,
        anchor_type='anchor_free',
        anchor_generator=dict(
            type='mmdet.AnchorGenerator',
            ratios=[1.0],
            octave_base_scale=8,
            scales_per_octave=1,
            strides=[8, 16],
        ),
        initial_loss_cls=dict(type='mmdet.FocalLoss'),
    )
    images = [torch.rand(2, 32, size, size) for size in (8, 4)]
    for network in (config, dict(type='mmkw.KWModule', module=config)):
        head = MODELS.build(copy.deepcopy(network)).eval()
        assert [x.shape for x in head(images)[0]] == [(2, 4, 8, 8), (2, 4, 4, 4)]
    names = {f'{part}_decomp.reduction_conv.conv' for part in ('cls', 'reg')}
    assert names <= set(used_by_others(MODELS.build(copy.deepcopy(config))))


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

    assert set(used_by_others(nn.Sequential(Reader()))) == {'0.read'}
    torch_layer = nn.TransformerEncoderLayer(16, 2, 32)
    assert {'linear1', 'linear2'} <= set(used_by_others(torch_layer))


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


class Optional2d(nn.Conv2d):
    """As Detectron2's: with a norm and an activation that few layers have."""

    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = self._conv_forward(x, self.weight, self.bias)
        x = self.norm(x) if self.norm else x
        return self.activation(x) if self.activation else x


class LowRank(nn.Linear):
    """With factors of low rank beside its kernel, as layers that are adapted have."""

    def __init__(self, *args, rank=0):
        super().__init__(*args)
        self.rank = rank
        if rank:
            self.down = nn.Parameter(torch.randn(rank, self.in_features))
            self.up = nn.Parameter(torch.randn(self.out_features, rank))

    def forward(self, x):
        x, y = super().forward(x), x
        return x + y @ self.down.T @ self.up.T if self.rank else x


def of_layers(**layers):
    """A network that calls its layers in turn; the last one is plain."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            for name, layer in layers.items():
                self.add_module(name, layer)

        def forward(self, x):
            for name in layers:
                x = getattr(self, name)(x)
            return x

    return Network()


def conv(**options):
    return Optional2d(32, 32, 3, padding=1, **options)


@pytest.mark.parametrize(
    'layer',
    [conv(norm=nn.GroupNorm(4, 32)), conv(activation=nn.functional.relu), LowRank(32, 32, rank=4)],
    ids=['norm', 'activation', 'low rank'],
)
def test_layers_with_options_of_their_own_stay_static(layer):
    """Others of their classes, without options, are dynamic."""
    image = isinstance(layer, nn.Conv2d)
    usual = conv() if image else LowRank(32, 32)
    plain = nn.Conv2d(32, 32, 1) if image else nn.Linear(32, 32)
    network = of_layers(first=usual, second=layer, third=plain)
    x = torch.randn(2, 32, 5, 5) if image else torch.randn(2, 5, 32)
    expected = network(x)
    names = set(network.state_dict())
    convert(network)
    assert network.second is layer
    assert all(isinstance(each, StandsForStatic) for each in (network.first, network.third))
    assert {name for name in names if name.startswith('second')} <= set(network.state_dict())
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(PlanError, match=r"layer 'first' is a .*no dynamic twin"):
        convert(of_layers(first=layer), SharingPlan.make([('first', 'one')]))


def with_its_own(method):
    layer = nn.Conv2d(32, 32, 3, padding=1)
    own = getattr(layer, method)
    setattr(layer, method, lambda *inputs: 2 * own(*inputs))
    return layer


def patched_and_back():
    layer = nn.Conv2d(32, 32, 3)
    own = layer.forward
    layer.forward = lambda x: own(x) + 1
    layer.forward = own
    return layer


def changed(padding_mode):
    """After that PyTorch pads by what was the padding before, unless with zeros."""
    layer = nn.Conv2d(32, 32, 3, padding=1, padding_mode=padding_mode)
    layer.stride, layer.padding, layer.dilation = (2, 1), (2, 2), (2, 2)
    return layer


@pytest.mark.parametrize(
    ('layer', 'is_dynamic'),
    [
        (with_its_own('forward'), False),
        (with_its_own('_conv_forward'), False),
        (patched_and_back(), True),
        (changed('reflect'), True),
        (changed('zeros'), True),
        (nn.Conv2d(32, 32, 3, padding=1, padding_mode='reflect'), True),
    ],
    ids=['forward', '_conv_forward', 'restored', 'reflect', 'zeros', 'as made'],
)
def test_layers_that_were_changed_after_they_were_made(layer, is_dynamic):
    network, x = of_layers(first=layer, second=nn.Conv2d(32, 32, 1)), torch.randn(2, 32, 7, 6)
    expected = network(x)
    convert(network, start_tau=1)
    assert isinstance(network.first, StandsForStatic) is is_dynamic
    assert isinstance(network.second, StandsForStatic)
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(to_static(network)(x), expected, atol=1e-5, rtol=1e-5)


class Laterals(nn.Module):
    """As Detectron2's FPN: it calls its layers from a list beside its modules."""

    name = 'steps'

    def __init__(self):
        super().__init__()
        setattr(self, self.name, [])
        for index in range(2):
            layer = nn.Conv2d(32, 32, 3, padding=1)
            self.add_module(f'lateral{index}', layer)
            getattr(self, self.name).append([layer, {}])
        self.output = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x):
        for layer, options in getattr(self, self.name):
            x = layer(x, **options)
        return self.output(x)


class PrivateLaterals(Laterals):
    name = '_steps'


class Held(nn.Module):
    """Holds its first layer once more, as a subclass says, and computes with that."""

    def __init__(self):
        super().__init__()
        self.lateral0 = nn.Conv2d(32, 32, 3, padding=1)
        self.output = nn.Conv2d(32, 32, 3, padding=1)
        object.__setattr__(self, 'held', self.hold(self.lateral0))

    def forward(self, x):
        return self.output(self.call(x))


class HeldItself(Held):
    def hold(self, layer):
        return layer

    def call(self, x):
        return self.held(x)


class HeldInASet(Held):
    def hold(self, layer):
        return {layer}

    def call(self, x):
        return next(iter(self.held))(x)


class HeldByItsMethod(HeldItself):
    def hold(self, layer):
        return layer.forward


class HeldInAPartial(HeldItself):
    def hold(self, layer):
        return partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)


class HeldInAPartialMethod(HeldItself):
    def hold(self, layer):
        return partial(layer.forward)


class Tied(nn.Module):
    """A decoder with the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 32)
        self.hidden, self.decoder = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x):
        return self.decoder(self.hidden(self.embedding(x)))


@pytest.mark.parametrize(
    ('kind', 'layer', 'reason'),
    [
        (Laterals, 'lateral0', 'steps holds it, too'),
        (PrivateLaterals, 'lateral0', '_steps holds it, too'),
        *(
            (kind, 'lateral0', 'held holds it, too')
            for kind in (
                HeldItself,
                HeldInASet,
                HeldByItsMethod,
                HeldInAPartial,
                HeldInAPartialMethod,
            )
        ),
        (Tied, 'decoder', 'also that of embedding'),
    ],
)
def test_layers_that_others_hold_or_share_stay_static(kind, layer, reason):
    static = kind()
    network = convert(kind())
    network.load_state_dict(static.state_dict())
    x = torch.arange(6).view(2, 3) if kind is Tied else torch.randn(2, 32, 5, 5)
    torch.testing.assert_close(network(x), static(x), atol=1e-5, rtol=1e-5)
    network(x).square().sum().backward()
    assert type(network.get_submodule(layer)) in (nn.Conv2d, nn.Linear)
    assert all(p.grad is not None for p in network.parameters())
    with pytest.raises(PlanError, match=f'cannot be dynamic: .*{reason}'):
        convert(kind(), SharingPlan.make([(layer, 'one')]))
    with pytest.raises(PlanError, match=f'catches {layer}.*{reason}'):
        pattern_plan(kind(), [dict(match=layer)])


@pytest.mark.parametrize('batch_first', [False, True])
def test_sequences_before_images_stay_static(batch_first):
    """A dynamic layer would take positions for images, and mix what stands in a batch."""
    torch.manual_seed(0)
    options = dict(dim_feedforward=64, dropout=0.0, batch_first=batch_first)
    static = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, **options), 2).eval()
    dynamic = of_layers(decoder=copy.deepcopy(static), conv=nn.Conv2d(32, 32, 3))
    convert(dynamic)
    found = {n for n, m in dynamic.named_modules() if isinstance(m, StandsForStatic)}
    assert any('linear1' in name for name in found) == batch_first and 'conv' in found
    for name, parameter in dynamic.named_parameters():
        if 'attention.fc2' in name:
            nn.init.normal_(parameter)
    both = torch.randn(2, 5, 32)

    def decoded(network, images):
        x = images if batch_first else images.transpose(0, 1)
        with torch.no_grad():
            y = network(x, x)
        return y if batch_first else y.transpose(0, 1)

    for network in (static, dynamic.decoder):
        alone, beside = decoded(network, both[:1]), decoded(network, both)
        torch.testing.assert_close(alone, beside[:1], atol=1e-5, rtol=1e-5)
    if not batch_first:
        with pytest.raises(PlanError, match='sequences before images'):
            convert(copy.deepcopy(static), SharingPlan.make([('layers.0.linear1', 'one')]))


class Residual(nn.Module):
    """As CLIP's: an attention and, in a container, linear layers."""

    def __init__(self, batch_first):
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        return x + self.mlp(x + self.attn(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('kind', ['Residual', 'mmcv'])
def test_images_see_each_other_in_no_order(kind, batch_first):
    """Linear layers beside an attention with sequences first stay static; its values need not."""
    torch.manual_seed(0)
    block = Residual(batch_first)
    if kind == 'mmcv':
        attention = dict(type='MultiheadAttention', embed_dims=32, num_heads=4)
        ffn = dict(type='FFN', embed_dims=32, feedforward_channels=64)
        order = ('self_attn', 'norm', 'ffn', 'norm')
        block = BaseTransformerLayer(attention, ffn, order, batch_first=batch_first)
    network = convert(of_layers(block=block, conv=nn.Conv2d(32, 32, 3)))
    found = {n for n, m in network.named_modules() if isinstance(m, KWLinear)}
    assert any('mlp' in name or 'ffn' in name for name in found) == batch_first
    assert any(name.endswith('value') for name in found)
    for name, parameter in network.named_parameters():
        if 'attention.fc2' in name:
            nn.init.normal_(parameter)
    both = torch.randn(2, 5, 32)
    dim = 0 if batch_first else 1
    alone, beside = (
        network.eval().block(x if batch_first else x.transpose(0, 1)) for x in (both[:1], both)
    )
    torch.testing.assert_close(alone, beside.narrow(dim, 0, 1), atol=1e-5, rtol=1e-5)


class SelfAttention(nn.Module):
    """With projections of its own, for sequences first."""

    batch_first = False

    def __init__(self):
        super().__init__()
        self.value, self.proj = nn.Linear(32, 32), nn.Linear(32, 32)


def test_an_attention_with_sequences_first_leaves_what_is_far_from_it_dynamic():
    pooled = of_layers(
        trunk=of_layers(attn=nn.MultiheadAttention(32, 4, batch_first=True), fc=nn.Linear(32, 32)),
        stem=of_layers(conv=nn.Conv2d(3, 32, 3), fc=nn.Linear(32, 32)),
        pool=nn.MultiheadAttention(32, 4),
        last=nn.Sequential(nn.Linear(32, 32)),
        own=SelfAttention(),
    )
    found = {name for name, why in used_by_others(pooled).items() if 'sequences before' in why}
    assert found == {'last.0', 'own.value', 'own.proj'}


def test_what_is_in_dynamic_layers_is_not_planned():
    """Where a part of a network is converted before the whole."""
    part = of_layers(a=nn.Conv2d(64, 64, 3), b=nn.Conv2d(64, 64, 3))
    network = of_layers(part=part, neck=nn.Conv2d(64, 64, 3))
    convert(network.part, method='dyconv')
    inside = {name: type(m) for name, m in network.part.named_modules()}
    convert(network)
    assert {name: type(m) for name, m in network.part.named_modules()} == inside
    assert isinstance(network.neck, StandsForStatic)


class ByMode(nn.Module):
    """As timm's, whose initialiser has a mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3)

    def init_weights(self, mode='', scale=1.0):
        nn.init.constant_(self.conv.weight, scale if mode == 'jax' else 0.0)


def test_an_initialiser_keeps_its_arguments():
    static = ByMode()
    dynamic = convert(ByMode())
    set_temperature(dynamic, 1)
    for network in (static, dynamic):
        network.init_weights('jax', scale=0.5)
    x = torch.randn(2, 32, 5, 5)
    torch.testing.assert_close(dynamic.conv(x), static.conv(x) - bias_of(static, dynamic))


def bias_of(static, dynamic):
    """The initialiser leaves the biases, which differ."""
    return (static.conv.bias - dynamic.conv.bias).view(-1, 1, 1)


def test_hooks_stay_with_their_layers():
    """There and back; their handles still remove them."""
    network = of_layers(first=nn.Conv2d(32, 32, 3), second=nn.Conv2d(32, 32, 1))
    seen = []
    handles = [
        network.first.register_forward_pre_hook(lambda layer, x: seen.append('before')),
        network.first.register_forward_hook(
            lambda layer, x, options, y: seen.append('after'), with_kwargs=True
        ),
        network.first.register_full_backward_hook(lambda layer, x, y: seen.append('backward')),
    ]

    def calls():
        seen.clear()
        network(torch.randn(1, 32, 5, 5)).sum().backward()
        return list(seen)

    expected = calls()
    assert expected == ['before', 'after', 'backward']
    convert(network)
    assert calls() == expected
    handles[0].remove()
    assert calls() == expected[1:]
    set_temperature(network, 1)
    to_static(network)
    assert type(network.first) is nn.Conv2d and calls() == expected[1:]
    for handle in handles[1:]:
        handle.remove()
    assert calls() == []


class Gained(nn.Conv2d):
    gain = 2.0


class ReadsItsLayers(nn.Module):
    """Reads what it has put on its layers, and what their class has."""

    def __init__(self):
        super().__init__()
        self.first = Gained(32, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.second.post_scale, self.second._shift = 3.0, [0.5]
        self.last = nn.Linear(32, 32)
        self.last.is_residual = True

    def forward(self, x):
        for layer in (self.first, self.second):
            x = layer(x) * getattr(layer, 'gain', 1) * getattr(layer, 'post_scale', 1)
            x = x + getattr(layer, '_shift', [0])[0]
        x = x.movedim(1, -1)
        return self.last(x) + (x if getattr(self.last, 'is_residual', False) else 0)


def test_what_a_network_has_put_on_its_layers_stays_there():
    """As nanoGPT marks layers, which an initialiser reads; there and back, and in copies."""
    static, x = ReadsItsLayers(), torch.randn(2, 32, 5, 5)
    network = convert(copy.deepcopy(static), cell_num_ratio=1, start_tau=1)
    assert all(isinstance(layer, StandsForStatic) for layer in (network.first, network.last))

    def close(other):
        torch.testing.assert_close(other(x), static(x), atol=1e-4, rtol=1e-4)

    def initialise(module):
        if hasattr(module, 'weight'):
            marked = hasattr(module, 'post_scale') or getattr(module, 'gain', 1) > 1
            nn.init.constant_(module.weight, 0.01 if marked else 0.02)

    close(network)
    close(copy.deepcopy(network))
    for each in (static, network):
        each.apply(initialise)
    close(network)
    close(to_static(network))
    assert type(network.first) is Gained and network.first.gain == 2
    assert (network.second.post_scale, network.second._shift) == (3, [0.5])


def test_a_private_name_of_the_dynamic_layer_is_refused():
    layer = nn.Conv2d(32, 32, 3)
    layer._position = 1
    network = of_layers(first=layer, second=nn.Conv2d(32, 32, 3))
    with pytest.raises(PlanError, match=r'first.* has the attribute _position.*Rename it'):
        convert(network)
    assert network.first is layer and not hasattr(network, 'warehouse_manager')


@pytest.mark.parametrize('name', ['cells', 'attention', 'method', 'place'])
def test_what_means_something_else_in_a_dynamic_layer_keeps_it_static(name):
    layer = nn.Conv2d(32, 32, 3)
    setattr(layer, name, 1)
    network = convert(of_layers(first=layer, second=nn.Conv2d(32, 32, 3)))
    assert network.first is layer and isinstance(network.second, StandsForStatic)


def test_lazy_layers_stay_static_beside_others():
    network = of_layers(first=nn.Conv2d(32, 32, 3), second=nn.LazyConv2d(32, 3))
    first, x = network.first, torch.randn(2, 32, 7, 7)
    assert set(pattern_plan(network, [dict(match='first')]).warehouses) == {'first'}
    network = convert(network)
    assert isinstance(network.first, StandsForStatic)
    y = network(x)
    assert y.shape == (2, 32, 3, 3)
    torch.testing.assert_close(y, network.second(first(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('layers', ['abc', [('first',)], [1], [('first', 'one', 'two')]])
def test_layers_of_a_plan_are_pairs(layers):
    with pytest.raises(PlanError, match='must be pairs of the names'):
        SharingPlan.make(layers)


def test_layers_take_their_input_by_its_name():
    for layer, x in ((nn.Conv2d(32, 32, 3), (2, 32, 5, 5)), (nn.Linear(32, 32), (2, 4, 32))):
        network = convert(of_layers(first=layer, second=nn.Conv2d(32, 32, 3)))
        x = torch.randn(x)
        assert isinstance(network.first, StandsForStatic)
        torch.testing.assert_close(network.first(input=x), layer(input=x), atol=1e-5, rtol=1e-5)


def managing():
    network = of_layers(a=nn.Conv2d(32, 32, 3))
    network.warehouse_manager = nn.Linear(4, 4)
    return network


REFUSED = {
    'lazy': (lambda: of_layers(a=nn.LazyConv2d(32, 3)), 'size of a, a LazyConv2d, is not known'),
    'manager': (managing, 'warehouse_manager of its own.*Rename it'),
    'list': (lambda: nn.ModuleList([nn.Conv2d(32, 32, 3)]), 'is a ModuleList'),
    'dict': (lambda: nn.ModuleDict({'a': nn.Conv2d(32, 32, 3)}), 'is a ModuleDict'),
    'compiled': (lambda: torch.compile(of_layers(a=nn.Conv2d(32, 32, 3))), 'Convert it first'),
    'dtypes': (
        lambda: of_layers(a=nn.Conv2d(32, 32, 3), b=nn.Conv2d(32, 32, 3, dtype=torch.float64)),
        r'torch\.float32 on cpu and of torch\.float64',
    ),
    'complex': (lambda: of_layers(a=nn.Conv2d(32, 32, 3, dtype=torch.complex64)), 'no layer that'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_converted_is_refused_at_once(case):
    make, message = REFUSED[case]
    network = make()
    kinds = [type(module) for module in network.modules()]
    with pytest.raises(PlanError, match=message):
        convert(network)
    assert [type(module) for module in network.modules()] == kinds

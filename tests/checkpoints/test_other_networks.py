"""Files of networks with other classes, or with more stages, as static networks take them."""

import logging

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_state_dict
from torch import nn
from twin_networks import BACKBONES, HEADS, LIBRARIES, build, config_of, outputs

from mmkw.checkpoints import CheckpointMismatchError
from mmkw.layers import KWConv2d
from mmkw.layers.static_layers import predictions

GAUGE = dict(rtol=1e-4, atol=1e-5)
# Parameters that a split projection has in two layers.
FUSED = dict(
    WindowProjection=('weight', 'bias'),
    SplitMultiheadAttention=('in_proj_weight', 'in_proj_bias'),
)


@pytest.fixture
def log():
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def of_other_classes(kind, dynamic, **more):
    """A head of 5 classes that has loaded a static one of 9, and this."""
    torch.manual_seed(0)
    source = build(kind, False, num_classes=9)
    if dynamic:
        config = dict(type='mmkw.KWModule', module=config_of(kind), **more)
        head = MODELS.build(config)
    else:
        head = build(kind, False)
    load_state_dict(head, source.state_dict(), strict=False)
    return source, head


@pytest.mark.parametrize('kind', HEADS)
def test_a_head_of_other_classes(kind):
    """All but the predictions is loaded: hidden layers give what they give in the other head."""
    source, static = of_other_classes(kind, False)
    _, dynamic = of_other_classes(kind, True)
    found = []
    names = predictions(static)
    for network in (source, static, dynamic):
        seen = []
        for name, module in network.named_modules():
            if name in names:
                module.register_forward_pre_hook(
                    lambda _, inputs, seen=seen: seen.append(inputs[0])
                )
        with torch.no_grad():
            network.eval()
            outputs(kind, network)
        found.append(seen)
    assert found[0]
    for first, second, third in zip(*found):
        torch.testing.assert_close(second, first, **GAUGE)
        torch.testing.assert_close(third, first, **GAUGE)


@pytest.mark.skipif('mmdet' not in LIBRARIES, reason='the heads are its')
@pytest.mark.parametrize('tau', [0, 1])
def test_dynamic_predictions_of_other_classes(log, tau):
    """By patterns they may be dynamic, too; then they are left out as static ones are."""
    patterns = [dict(match=r'retina_cls'), dict(match=r'.*convs\.\d\.conv', warehouse='towers')]
    source, dynamic = of_other_classes('mmdet.RetinaHead', True, patterns=patterns, start_tau=tau)
    assert isinstance(dynamic.retina_cls, KWConv2d)
    assert any('retina_cls predicts 45 channels, the checkpoint 81' in line for line in log)
    x = torch.randn(2, 32, 6, 6)
    with torch.no_grad():
        for tower in ('cls_convs', 'reg_convs'):
            expected, found = x, x
            for one, other in zip(getattr(source, tower), getattr(dynamic, tower)):
                expected, found = one(expected), other(found)
            torch.testing.assert_close(found, expected, **GAUGE)
    torch.testing.assert_close(dynamic.retina_reg.weight, source.retina_reg.weight)
    # Other channels within the head are another architecture.
    wrong = source.state_dict()
    wrong['cls_convs.1.conv.weight'] = wrong['cls_convs.1.conv.weight'][:16]
    with pytest.raises(CheckpointMismatchError, match=r'cls_convs\.1\.conv'):
        load_state_dict(dynamic, wrong, strict=False)


def test_a_layer_alone_of_another_shape(capsys):
    """MMEngine goes on with a line in the log, PyTorch raises: as with a static layer."""
    state = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 3)).state_dict()
    for conv in (nn.Conv2d, KWConv2d):
        network = nn.Sequential(conv(4, 6, 3), conv(6, 10, 3))
        load_state_dict(network, state, strict=False)
        assert torch.equal(network[0].bias, state['0.bias'])
        assert '1.weight' in capsys.readouterr().out
        with pytest.raises(RuntimeError, match=r'1\.weight'):
            network.load_state_dict(state, strict=False)


def evaluating(config):
    # MMSegmentation's networks return nothing from eval().
    network = MODELS.build(config)
    network.eval()
    return network


# Blocks of two convolutions have no groups.
STAGES = [
    (kind, library, depth)
    for library, depth in (('mmdet', 18), ('mmdet', 50), ('mmseg', 18))
    for kind in ('mmkw.KWResNet', 'mmkw.KWModule', 'groups')
    if kind != 'groups' or depth == 50
]


@pytest.mark.parametrize('kind, library, depth', STAGES)
@pytest.mark.parametrize('stages', [3, 2, 1])
def test_fewer_stages(kind, library, depth, stages):
    """They take the files of the whole network, static and of KernelWarehouse (C4 detectors)."""
    pytest.importorskip(library, reason='the networks are its')
    options = dict(depth=depth, base_channels=8)
    if kind == 'groups':
        options |= dict(groups=2, base_width=32, base_channels=16)
    few = dict(
        num_stages=stages,
        out_indices=(stages - 1,),
        strides=(1, 2, 2, 2)[:stages],
        dilations=(1,) * stages,
    )
    with DefaultScope.overwrite_default_scope(library):

        def dynamic(**more):
            torch.manual_seed(1)
            if kind == 'mmkw.KWModule':
                return evaluating(dict(type=kind, module=dict(type='ResNet', **options, **more)))
            return evaluating(dict(type='mmkw.KWResNet', **options, **more))

        static = dict(type='mmkw.ResNet', **options)
        torch.manual_seed(0)
        whole = evaluating(dict(static, out_indices=(stages - 1,)))
        small = evaluating(dict(static, **few))
        x = torch.randn(1, 3, 64, 64)
        load_state_dict(small, whole.state_dict(), strict=False)
        warm = dynamic(**few)
        load_state_dict(warm, whole.state_dict(), strict=False)
        source = dynamic(out_indices=(stages - 1,))
        loaded = dynamic(**few)
        # Of random numbers unlike those that the smaller one starts from.
        state = source.state_dict()
        state = {k: v + 0.01 if v.is_floating_point() else v for k, v in state.items()}
        source.load_state_dict(state)
        load_state_dict(loaded, state, strict=False)
    with torch.no_grad():
        expected = whole(x)[0]
        torch.testing.assert_close(small(x)[0], expected)
        torch.testing.assert_close(warm(x)[0], expected, **GAUGE)
        torch.testing.assert_close(loaded(x)[0], source(x)[0])


def test_a_deeper_network_is_still_refused():
    """One with more blocks in a stage, not with more stages."""
    pytest.importorskip('mmdet', reason='the networks are its')
    with DefaultScope.overwrite_default_scope('mmdet'):
        deeper = MODELS.build(dict(type='mmkw.ResNet', depth=34, base_channels=8))
        network = MODELS.build(dict(type='mmkw.KWResNet', depth=18, base_channels=8))
        with pytest.raises(CheckpointMismatchError, match='of layers that this ResNet lacks'):
            load_state_dict(network, deeper.state_dict(), strict=False)


@pytest.mark.parametrize('kind', [*BACKBONES, *HEADS])
def test_every_network_starts_from_its_static_file(kind):
    torch.manual_seed(0)
    static, dynamic = build(kind, False), build(kind, True)
    load_state_dict(dynamic, static.state_dict(), strict=True)
    static.eval()
    dynamic.eval()
    with torch.no_grad():
        for expected, found in zip(outputs(kind, static), outputs(kind, dynamic)):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert set(static.state_dict()) - set(dynamic.state_dict()) == {
        f'{name}.{part}'
        for name, module in dynamic.named_modules(remove_duplicate=False)
        for part in FUSED.get(type(module).__name__, ())
    } | {
        f'{name}.weight'
        for name, module in dynamic.named_modules(remove_duplicate=False)
        if hasattr(module, 'cells') and not name.endswith('.value')
    }


@pytest.mark.skipif('mmseg' not in LIBRARIES, reason='ResNetV1c is its')
@pytest.mark.parametrize('file', ['static', 'dynamic'])
@pytest.mark.parametrize(
    'kind, other', [('ResNet', 'KWResNetV1c'), ('ResNetV1c', 'KWResNet'), ('ResNetV1d', 'KWResNet')]
)
def test_a_resnet_with_another_stem_is_refused(kind, other, file):
    """All its blocks would fit, and the stem would stay random."""
    tiny = dict(depth=18, base_channels=16, stem_channels=16)
    with DefaultScope.overwrite_default_scope('mmseg'):
        own, network = (MODELS.build(dict(type=f'mmkw.{k}', **tiny)) for k in (f'KW{kind}', other))
        static = MODELS.build(dict(type=kind, **tiny))
    state = (static if file == 'static' else own).state_dict()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    remedy = 'mmkw.KWResNetV1c' if 'V1' in kind else "'mmkw.KWResNet', without"
    with pytest.raises(CheckpointMismatchError, match=remedy):
        load_state_dict(
            nn.ModuleDict(dict(backbone=network)), {f'backbone.{k}': v for k, v in state.items()}
        )
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    load_state_dict(own, state)
    if file == 'static':
        x = torch.randn(1, 3, 64, 64)
        own.eval(), static.eval()
        with torch.no_grad():
            for ours, theirs in zip(own(x), static(x), strict=True):
                torch.testing.assert_close(ours, theirs, **GAUGE)

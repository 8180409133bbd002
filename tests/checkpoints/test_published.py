"""Published checkpoints load whole and compute what the published networks compute."""

import itertools
import logging
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import exhaustively
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner.checkpoint import load_state_dict
from published_oracle import Network, convnext_tiny, mobilenet_v2, resnet

from mmkw.backbones import (
    ConvNeXt,
    KWConvNeXt,
    KWMobileNetV2,
    KWResNet,
    MobileNetV2,
    rewrite_published,
)
from mmkw.checkpoints import CheckpointMismatchError
from mmkw.engine.building import build_model
from mmkw.layers import set_temperature

pytest.importorskip('mmdet', reason="needs MMDetection's static networks")

CONFIGS = Path(__file__).parents[2] / 'configs'
HALF = dict(cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)
LAST = [1] * 6 + [0.5, 1, 0.5]
R18, R50 = resnet(18), resnet(50)
# name: ours, cells of the reference, budget, attention of the oracle, its forward pass, unused
CASES = {
    'r18-1d4x': (
        lambda: KWResNet(18, cell_num_ratio=0.25, **HALF),
        '56x(32,32) 47x(64,64) 47x(128,128) 27x(256,256)',
        0.25,
        {},
        R18,
        'fc',
    ),
    'r18-1d2x': (
        lambda: KWResNet(18, cell_num_ratio=0.5, **HALF),
        '112x(32,32) 94x(64,64) 94x(128,128) 54x(256,256)',
        0.5,
        {},
        R18,
        'fc',
    ),
    'r18-1x': (
        lambda: KWResNet(18),
        '56x(64,64) 47x(128,128) 47x(256,256) 27x(512,512)',
        1,
        {},
        R18,
        'fc',
    ),
    'r18-2x': (
        lambda: KWResNet(18, cell_num_ratio=2),
        '112x(64,64) 94x(128,128) 94x(256,256) 54x(512,512)',
        2,
        {},
        R18,
        'fc',
    ),
    'r18-4x': (
        lambda: KWResNet(18, cell_num_ratio=4),
        '224x(64,64) 188x(128,128) 188x(256,256) 108x(512,512)',
        4,
        {},
        R18,
        'fc',
    ),
    'r50-1d2x': (
        lambda: KWResNet(50, cell_num_ratio=0.5, nonlocal_basis_ratio=1 / 16, **HALF),
        '174x(32,32) 208x(64,64) 276x(128,128) 94x(256,256)',
        0.5,
        dict(basis_ratio=1 / 16),
        R50,
        'fc',
    ),
    'r50-1x': (
        lambda: KWResNet(50),
        '87x(64,64) 104x(128,128) 138x(256,256) 47x(512,512)',
        1,
        {},
        R50,
        'fc',
    ),
    'r50-4x': (
        lambda: KWResNet(50, cell_num_ratio=4),
        '348x(64,64) 416x(128,128) 552x(256,256) 188x(512,512)',
        4,
        {},
        R50,
        'fc',
    ),
    'convnext-tiny-1x': (
        lambda: KWConvNeXt('tiny'),
        '16x(96,3) 4x(192,96) 4x(384,192) 4x(768,384) 147x(96,1) 24x(96,96) 147x(192,1) '
        '24x(192,192) 441x(384,1) 72x(384,384) 147x(768,1) 24x(768,768)',
        1,
        dict(norm='LN'),
        convnext_tiny,
        'head norm',
    ),
    'mobilenet-1x': (
        lambda **a: KWMobileNetV2(**a),
        '9x(32,3) 36x(32,1) 34x(8,16) 78x(8,24) 18x(144,1) 42x(32,32) 27x(192,1) 102x(32,64) '
        '36x(384,1) 120x(32,96) 27x(576,1) 58x(160,160) 27x(960,1)',
        1,
        {},
        mobilenet_v2(1, 'joint'),
        'classifier',
    ),
    'mobilenet-4x': (
        lambda **a: KWMobileNetV2(pointwise='separate', cell_num_ratio=4, **a),
        '36x(32,3) 144x(32,1) 44x(8,32) 4x(96,16) 8x(144,24) 72x(144,1) 28x(8,144) 12x(192,32) '
        '108x(192,1) 16x(32,192) 16x(384,64) 144x(384,1) 36x(32,384) 12x(576,96) 108x(576,1) '
        '44x(32,576) 12x(960,160) 108x(960,1) 80x(160,320)',
        4,
        {},
        mobilenet_v2(1, 'separate'),
        'classifier',
    ),
    'mobilenet-1d2x': (
        lambda **a: KWMobileNetV2(
            **a,
            pointwise='last_stage',
            reduction=1 / 32,
            cell_num_ratio=LAST,
            cell_inplane_ratio=LAST,
            cell_outplane_ratio=LAST,
        ),
        '9x(32,3) 36x(32,1) 18x(144,1) 27x(192,1) 36x(384,1) 27x(576,1) 6x(480,80) 27x(960,1) '
        '40x(80,160) 20x(1000,32)',
        [*LAST, 0.5],
        dict(reduction=1 / 32),
        mobilenet_v2(1, 'last'),
        'classifier warehouse_manager',
    ),
}
# Configs with a classifier, one of every kind.
CLASSIFIERS = {
    'r18-1x': 'resnet/kw1x-resnet18_32xb128-300e_in1k.py',
    'r50-1d2x': 'resnet/kw1d2x-resnet50_32xb128-300e_in1k.py',
    'convnext-tiny-1x': 'convnext/kw1x-convnext-tiny_32xb128-300e_in1k.py',
    'mobilenet-4x': 'mobilenet_v2/kw4x-mobilenet-v2_8xb32-150e_in1k.py',
    'mobilenet-1d2x': 'mobilenet_v2/kw1d2x-mobilenet-v2_8xb32-150e_in1k.py',
}


@contextmanager
def unused_listed():
    """The names that the log lists as deliberately not loaded."""
    names, handler = set(), logging.Handler()

    def collect(record):
        if 'deliberately not loaded' in record.getMessage():
            names.update(record.getMessage().split(': ')[-1].split(', '))

    handler.emit = collect
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield names
    logger.removeHandler(handler)


def run_oracle(name, x, tau, state=None):
    _, cells, budget, options, forward, _ = CASES[name]
    net = Network(cells, budget, state=state, **options)
    with torch.no_grad():
        return net, net.run(forward, x, tau)


def oracle(name, x, tau, state=None):
    net, outputs = run_oracle(name, x, tau, state)
    return net.state, outputs


@pytest.fixture(
    scope='module', params=exhaustively(CASES, ['r18-2x', 'r18-4x', 'r50-1d2x', 'r50-1x', 'r50-4x'])
)
def published(request, tmp_path_factory):
    """A published file, and what its network gives for some images at every temperature.

    The largest is looked at in between only: it takes as long as all others.
    """
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    state, expected = None, {}
    for tau in (0.5,) if request.param == 'r50-4x' else (0.5, 0, 1):
        net, features = run_oracle(request.param, x, tau, state)
        state, expected[tau] = net.state, (features, net.logits)
    file = tmp_path_factory.mktemp('published') / 'published.pth'
    torch.save(dict(model=state), file)
    yield SimpleNamespace(
        name=request.param, file=str(file), state=state, images=x, expected=expected
    )
    file.unlink()


def difference(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_published_state_dict_loads_whole_and_gives_the_published_outputs(published):
    network = CASES[published.name][0]()
    network.init_cfg = dict(type='Pretrained', checkpoint=published.file)
    with unused_listed() as listed_as_unused:
        network.init_weights()
    network.eval()

    # Every tensor is there: loaded, or listed as of the classifier.
    missing, unexpected = network.load_state_dict(dict(published.state), strict=False)
    assert not missing and not unexpected
    assert {key.split('.')[0] for key in listed_as_unused} == set(CASES[published.name][-1].split())
    assert listed_as_unused <= set(published.state)
    for tau, (expected, _) in published.expected.items():
        set_temperature(network, tau)
        with torch.no_grad():
            outputs = network(published.images)
        for ours, theirs in zip(outputs, expected):
            assert difference(ours, theirs) < 1e-4, tau


@pytest.mark.parametrize('published', exhaustively(CLASSIFIERS, ['r50-1d2x']), indirect=True)
def test_published_file_gives_the_published_logits(published):
    pytest.importorskip('mmpretrain', reason='has the classifiers')
    config = Config.fromfile(CONFIGS / CLASSIFIERS[published.name])
    model = build_model(config).eval()
    # The authors' file has no norms of the detectors' outputs.
    file = {k: v for k, v in published.state.items() if not re.match(r'norm\d', k)}
    missing, unexpected = model.load_state_dict(dict(file), strict=False)
    assert not missing and not unexpected
    # Rewritten offline it is the same.
    rewritten, left_out = rewrite_published(dict(state_dict=file), 'mmpretrain')
    assert not left_out
    own = model.state_dict()
    assert set(rewritten) == set(own)
    assert all(torch.equal(value, own[key]) for key, value in rewritten.items())
    for tau, (_, expected) in published.expected.items():
        set_temperature(model, tau)
        with torch.no_grad():
            logits = model(published.images)
        assert difference(logits, expected) < 1e-5, tau


@pytest.mark.parametrize('name', ['mobilenet-1x', 'mobilenet-4x', 'mobilenet-1d2x'])
def test_half_the_width(name):
    build, _, budget, options, _, _ = CASES[name]
    network = build(widen_factor=0.5)
    network.eval()
    shapes = [tuple(weight.shape[:3]) for weight in network.warehouse_manager.weights]
    sharing = dict(zip(('1x', '4x', '1d2x'), ('joint', 'separate', 'last')))[name.split('-')[1]]
    if sharing == 'last':
        shapes.append((20, 1000, 32))
    net = Network(' '.join(f'{n}x({out},{inner})' for n, out, inner in shapes), budget, **options)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net.run(mobilenet_v2(0.5, sharing), x, 0)
        missing, unexpected = network.load_state_dict(dict(net.state), strict=False)
        assert not missing and not unexpected
        for ours, theirs in zip(network(x), expected, strict=True):
            assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-4


def test_an_imagenet_convnext_has_no_norms_of_the_outputs():
    state, _ = oracle('convnext-tiny-1x', torch.randn(1, 3, 32, 32), 0)
    norms = {key for key in state if key.startswith(('norm0', 'norm1', 'norm2', 'norm3'))}
    file = {key: value for key, value in state.items() if key not in norms}
    missing, unexpected = KWConvNeXt('tiny').load_state_dict(file, strict=False)
    assert set(missing) == norms and not unexpected


def test_static_mobilenet_reads_torchvision_s_names():
    net = Network(CASES['mobilenet-1x'][1], 1)
    with torch.no_grad():
        net.run(mobilenet_v2(1, 'joint'), torch.randn(1, 3, 32, 32), 0)
    file = {k: v for k, v in net.state.items() if k.startswith('features') and 'attention' not in k}
    network = MobileNetV2()
    dynamic = set(KWMobileNetV2().state_dict())
    missing, unexpected = network.load_state_dict(file, strict=False)
    # All but the kernels, which only the warehouses have.
    assert not unexpected
    assert set(missing) == set(network.state_dict()) - dynamic


def test_detection_file_loads_under_its_prefix():
    state, _ = oracle('mobilenet-1x', torch.randn(1, 3, 32, 32), 0)
    detector = torch.nn.ModuleDict(dict(backbone=KWMobileNetV2(), neck=torch.nn.Linear(2, 2)))
    file = {f'backbone.{k}': v for k, v in state.items() if not k.startswith('classifier')}
    file |= {'neck.weight': torch.ones(2, 2), 'neck.bias': torch.zeros(2)}
    missing, unexpected = detector.load_state_dict(dict(file), strict=False)
    assert not missing and not unexpected
    load_state_dict(detector, dict(file), strict=True)


SMALL_CONVNEXT = dict(depths=[1, 1], channels=[8, 16])
MISMATCHES = [
    (
        lambda: KWResNet(18, base_channels=8, cell_num_ratio=4),
        lambda: KWResNet(18, base_channels=8),
        r"Warehouse 0 \('stage1'\) of this ResNet has 56 cells of \(8, 8, 1, 1\), the checkpoint "
        r'has 224 of \(8, 8, 1, 1\). With cell_num_ratio=4 it would fit',
    ),
    (
        lambda: KWResNet(18, base_channels=8, cell_num_ratio=0.5, **HALF),
        lambda: KWResNet(18, base_channels=8),
        'With cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5 it would fit',
    ),
    (
        lambda: KWResNet(50, base_channels=8),
        lambda: KWResNet(18, base_channels=8),
        r"Warehouse 0 \('stage1'\).*made for another architecture or sharing plan: check depth",
    ),
    (
        lambda: KWResNet(101, base_channels=8),
        lambda: KWResNet(50, base_channels=8),
        r"Warehouse 2 \('stage3'\).*made for another architecture",
    ),
    (
        lambda: KWResNet(
            18, base_channels=32, cell_num_ratio=0.5, nonlocal_basis_ratio=1 / 16, **HALF
        ),
        lambda: KWResNet(18, base_channels=32),
        r'With cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5, '
        r'nonlocal_basis_ratio=0.\d+ it would fit',
    ),
    (
        lambda: KWResNet(18, base_channels=8, cell_num_ratio=[1, 2, 1, 4]),
        lambda: KWResNet(18, base_channels=8),
        r'With cell_num_ratio=\[1, 2, 1, 4\] it would fit',
    ),
    (
        lambda: KWConvNeXt(SMALL_CONVNEXT, out_indices=(1,), spatial_partition=False),
        lambda: KWConvNeXt(SMALL_CONVNEXT, out_indices=(1,)),
        'With spatial_partition=False it would fit',
    ),
    (
        lambda: KWMobileNetV2(0.5, pointwise='separate', cell_num_ratio=4),
        lambda: KWMobileNetV2(0.5),
        "shares pointwise='joint', the checkpoint 'separate': it has 19 warehouses",
    ),
    (
        lambda: CASES['mobilenet-1d2x'][0](widen_factor=0.5),
        lambda: KWMobileNetV2(0.5, pointwise='separate', cell_num_ratio=4),
        "the checkpoint 'last_stage': it has 9 warehouses",
    ),
    (
        lambda: CASES['mobilenet-1d2x'][0](widen_factor=0.5),
        lambda: KWMobileNetV2(0.5, pointwise='last_stage'),
        r'With cell_num_ratio=\[1, 1, 1, 1, 1, 1, 0.5, 1, 0.5\], cell_inplane_ratio=.*would fit',
    ),
    (
        lambda: KWResNet(18, base_channels=8),
        lambda: KWResNet(18, base_channels=16),
        r"Warehouse 0 \('stage1'\)",
    ),
    (
        lambda: KWResNet(18, base_channels=8),
        lambda: KWMobileNetV2(),
        r"Warehouse 0 \('stem'\) of this MobileNetV2.*another architecture",
    ),
]


@pytest.mark.parametrize('source, target, message', MISMATCHES)
def test_files_of_other_networks_are_refused_and_nothing_is_loaded(source, target, message):
    network, file = target(), source().state_dict()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match=message):
        load_state_dict(network, file)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_file_without_the_last_warehouse_is_refused():
    network = KWResNet(18, base_channels=8)
    file = network.state_dict()
    del file['warehouse_manager.weights.3']
    with pytest.raises(
        CheckpointMismatchError, match=r"3 warehouses and lacks number 3 \('stage4'\)"
    ):
        network.load_state_dict(file)


@pytest.mark.parametrize('release', ['original', 'mmpretrain'])
def test_static_convnext_reads_both_releases(release):
    network = ConvNeXt(dict(depths=[1, 1], channels=[8, 16]), out_indices=(0, 1))
    state = {k: torch.randn_like(v) for k, v in network.state_dict().items()}
    file = {}
    for key, value in state.items():
        if 'pwconv' in key and key.endswith('weight'):
            value = value[..., 0, 0]
        if key.endswith('gamma'):
            value = value.flatten()
        if release == 'mmpretrain':
            key = key.replace('dwconv', 'depthwise_conv').replace('pwconv', 'pointwise_conv')
        file[f'backbone.{key}'] = value
    model = torch.nn.ModuleDict(dict(backbone=network))
    assert not any(itertools.chain(*model.load_state_dict(file, strict=False)))
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def small_file():
    return KWResNet(18, base_channels=8).state_dict()


def test_a_dynamic_classifier_is_listed_with_its_warehouse():
    file = small_file()
    file |= {'warehouse_manager.weights.4': torch.ones(5, 8, 8, 1)}
    file |= {'classifier.1.attention.fc1.weight': torch.ones(2), 'classifier.1.bias': torch.ones(2)}
    with unused_listed() as names:
        KWResNet(18, base_channels=8).load_state_dict(file)
    assert names == {
        'warehouse_manager.weights.4',
        'classifier.1.attention.fc1.weight',
        'classifier.1.bias',
    }


REFUSED = {
    'a warehouse too many': (
        lambda file: file | {'warehouse_manager.weights.4': torch.ones(1)},
        'has 5 warehouses, this ResNet 4',
    ),
    'an attention missing': (
        lambda file: {k: v for k, v in file.items() if k != 'layer2.0.conv2.attention.fc2.bias'},
        r'layer2.0.conv2.attention.fc2.bias .* the checkpoint lacks it.*made with reduction',
    ),
    'another reduction': (
        lambda file: KWResNet(18, base_channels=8, reduction=2.5).state_dict(),
        r'layer1.0.conv1.attention.fc1.weight .*shape \(16, 8\), the checkpoint has \(20, 8\).*'
        'made with reduction=',
    ),
    'a detection file': (
        lambda file: {f'backbone.{k}': v for k, v in file.items()} | {'neck.weight': torch.ones(1)},
        r"under 'backbone.'.*init_cfg=dict\(type='Pretrained', prefix='backbone.'",
    ),
    'a VGG': (
        lambda file: {'features.0.weight': torch.ones(1), 'features.3.bias': torch.ones(1)},
        r'no warehouse for this ResNet, where it holds features.0.weight',
    ),
    'foreign keys': (
        lambda file: {'visual.proj': torch.ones(2), 'logit_scale': torch.ones(1)},
        'no warehouse for this ResNet, where it holds visual.proj, logit_scale',
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(case):
    change, message = REFUSED[case]
    network = KWResNet(18, base_channels=8)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match=message):
        load_state_dict(network, change(small_file()))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_an_imagenet_file_in_place_of_a_detector_is_refused():
    detector = torch.nn.ModuleDict(dict(backbone=KWResNet(18, base_channels=8)))
    with pytest.raises(
        CheckpointMismatchError, match=r"under 'backbone\.', where it holds nothing"
    ):
        load_state_dict(detector, small_file())


@pytest.mark.parametrize('key', ['features.0.weight', 'features.4.block.0.0.weight'])
def test_features_of_other_networks_are_left_to_be_refused(key):
    with pytest.raises(CheckpointMismatchError, match=f'no warehouse for this MobileNetV2.*{key}'):
        KWMobileNetV2(0.5).load_state_dict({key: torch.ones(1)})

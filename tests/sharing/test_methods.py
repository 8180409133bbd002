"""Networks of DY-Conv, CondConv and ODConv: their layers, parameters, files, and training."""

import copy
import re
from functools import partial

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from torch import nn

import mmkw
from mmkw.backbones import ResNet
from mmkw.checkpoints import CheckpointMismatchError
from mmkw.deploy import to_static
from mmkw.layers import PlanError
from mmkw.layers.kernel_attention import CondAttention

METHODS = dict(dyconv=mmkw.DYConv2d, condconv=mmkw.CondConv2d, odconv=mmkw.ODConv2d)


def dynamic(network):
    kinds = tuple(METHODS.values())
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, kinds)}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# Millions, of ImageNet classifiers: the papers' tables. That of DY-Conv is in the later ones.
PUBLISHED = [
    ('odconv', 'r18', 1, 11.94),
    ('odconv', 'r18', 4, 44.90),
    ('odconv', 'r50', 1, 28.64),
    ('odconv', 'r50', 4, 90.67),
    ('odconv', 'r101', 1, 50.82),
    ('odconv', 'mobilenet', 1, 4.94),
    # The paper has 11.52, the page of its files 11.51: without a dynamic stem.
    ('odconv', 'mobilenet', 4, 11.51),
    ('dyconv', 'r18', 4, 45.47),
    ('dyconv', 'r50', 4, 100.88),
]


@pytest.mark.parametrize('method, name, kernels, millions', PUBLISHED)
def test_parameters_are_the_published(method, name, kernels, millions):
    with torch.device('meta'):
        if name == 'mobilenet':
            network = mmkw.KWMobileNetV2(out_indices=(7,), method=method, cell_num_ratio=kernels)
            classifier = nn.Linear(1280, 1000)
        else:
            depth = int(name[1:])
            network = mmkw.KWResNet(depth, method=method, cell_num_ratio=kernels)
            classifier = nn.Linear(512 if depth == 18 else 2048, 1000)
    assert round((count(network) + count(classifier)) / 1e6, 2) == millions


def test_parameters_of_condconv_s_last_blocks():
    """The published 81.35 M of ResNet18 are of the last three blocks and the classifier.

    That is 0.01 M less than here. With all layers it would be 89.82 M.
    """
    with torch.device('meta'):
        static = ResNet(18)
        names = [n for n, _ in static.named_modules() if re.match(r'layer(3\.1|4\.\d)\.conv', n)]
        plan = mmkw.SharingPlan.make([(name, 'last') for name in names], method='condconv')
        network = mmkw.convert(static, plan, keep_weights=False)
        everywhere = mmkw.KWResNet(18, method='condconv')
    assert len(dynamic(network)) == 6
    # Eight kernels of the classifier and one bias, and eight routing weights.
    classifier = 8 * 512_000 + 1000 + 8 * 513
    assert (count(network) + classifier) / 1e6 == pytest.approx(81.35, abs=0.01)
    assert count(everywhere) + 513_000 == 89_822_912


@pytest.fixture
def static():
    with torch.no_grad():
        network = ResNet(18, base_channels=8)
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)
    network.eval()
    return network


def same(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize('method', METHODS)
def test_static_weights_start_a_network(method, static):
    x = torch.randn(2, 3, 40, 40)
    network = mmkw.convert(copy.deepcopy(static), method=method)
    same(network(x), static(x), atol=1e-4, rtol=1e-4)
    loaded = mmkw.KWResNet(18, base_channels=8, method=method, start_tau=1)
    loaded.init_weights()
    loaded.load_state_dict(static.state_dict())
    loaded.eval()
    assert {layer.attention.temperature for layer in dynamic(loaded).values()} == {1.0}
    same(loaded(x), static(x), atol=1e-4, rtol=1e-4)
    layers = dynamic(network)
    assert {type(layer) for layer in layers.values()} == {METHODS[method]}
    # In the first block of stage 1 as well; ODConv's projections are static.
    assert len(layers) == (16 if method == 'odconv' else 19)
    assert len(network.warehouse_manager.weights) == len(layers)
    # The names of the static network, but for the kernels.
    renamed = {f'{name}.weight' for name in layers}
    assert set(static.state_dict()) - set(network.state_dict()) == renamed


@pytest.mark.parametrize('method', METHODS)
def test_own_files_load_and_others_are_refused(method, static):
    network = mmkw.convert(copy.deepcopy(static), method=method, cell_num_ratio=2)
    twin = mmkw.convert(copy.deepcopy(static), method=method, cell_num_ratio=2)
    for parameter in network.parameters():
        parameter.data.mul_(1.1)
    twin.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 40, 40)
    same(twin(x), network(x), rtol=0, atol=0)
    other = mmkw.convert(copy.deepcopy(static), method=method, cell_num_ratio=3)
    with pytest.raises(RuntimeError, match='With cell_num_ratio=2 it would fit'):
        other.load_state_dict(network.state_dict())


@pytest.mark.parametrize('other', [*METHODS, 'kernelwarehouse'])
@pytest.mark.parametrize(
    'method, published',
    [*((method, False) for method in (*METHODS, 'kernelwarehouse')), ('odconv', True)],
)
def test_files_of_another_method_are_refused_by_its_name(method, other, published, static):
    found, network = (
        mmkw.convert(copy.deepcopy(static), method=name, cell_num_ratio=2)
        for name in (method, other)
    )
    state = as_published(found) if published else found.state_dict()
    if method == other:
        network.load_state_dict(state)
        return
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(CheckpointMismatchError, match=f'With method={method!r} it would fit'):
        network.load_state_dict(state, strict=False)
    for name, tensor in network.state_dict().items():
        assert tensor.equal(before[name]), name
    network.load_state_dict(static.state_dict())


@pytest.mark.parametrize('published', [False, True])
def test_files_of_another_reduction_are_refused_by_their_own(published, static):
    found = mmkw.convert(copy.deepcopy(static), method='odconv', reduction=1 / 2)
    network = mmkw.convert(copy.deepcopy(static), method='odconv', reduction=1 / 4)
    state = as_published(found) if published else found.state_dict()
    with pytest.raises(CheckpointMismatchError, match=r'made with reduction=0\.5,'):
        network.load_state_dict(state, strict=False)


def as_published(network):
    """A state dict in the form of the authors' ImageNet files of ODConv."""
    partitions = network.warehouse_manager.partitions
    state = dict(network.state_dict())
    for index, partition in enumerate(partitions):
        state[f'{partition.name}.weight'] = state.pop(f'warehouse_manager.weights.{index}')
    for name, tensor in state.items():
        if '.attention.' in name and tensor.dim() == 2:
            state[name] = tensor[:, :, None, None]
    return state


@pytest.mark.parametrize('depth, kernels, stages', [(18, 1, 4), (18, 4, 2), (50, 2, 1)])
def test_files_with_the_published_names_of_odconv_load(depth, kernels, stages, caplog):
    """Synthetic ones: the published files are not at hand."""

    def make():
        return mmkw.KWResNet(
            depth,
            base_channels=8,
            num_stages=stages,
            strides=(1, 2, 2, 2)[:stages],
            dilations=(1,) * stages,
            out_indices=(0,),
            method='odconv',
            cell_num_ratio=kernels,
        )

    network, other = make(), make()
    state = as_published(network)
    state |= {'fc.weight': torch.zeros(10, 4), 'fc.bias': torch.zeros(10)}
    assert state['layer1.0.conv1.weight'].dim() == 5
    assert state['layer1.0.conv1.attention.channel_fc.weight'].shape == (8, 16, 1, 1)
    with caplog.at_level('INFO', 'mmkw'):
        other.load_state_dict(state)
    for name, tensor in network.state_dict().items():
        assert other.state_dict()[name].equal(tensor), name
    state['layer1.0.conv1.attention.channel_fc.weight'] = torch.zeros(8, 3, 1, 1)
    with pytest.raises(RuntimeError, match=r'channel_fc\.weight of this ResNet has'):
        make().load_state_dict(state)


class InvertedResidual(nn.Module):
    """A block of a MobileNetV2 in torchvision's nesting, by ODConv."""

    def __init__(self, into, out, stride, factor, conv):
        super().__init__()
        inner = factor * into
        parts = [ODConvUnit(into, inner, 1, 1, 1, conv)] if factor > 1 else []
        parts.append(ODConvUnit(inner, inner, 3, stride, inner, conv))
        last = conv(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        self.conv = nn.Sequential(*parts, *last)
        self.adds = stride == 1 and into == out

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class ODConvUnit(nn.Sequential):
    def __init__(self, into, out, kernel, stride, groups, conv):
        layer = conv(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(layer, nn.BatchNorm2d(out), nn.ReLU6())


class MobileNetV2OfTheFiles(nn.Module):
    """The network of the authors' files, a fourth as wide: static in its stem alone."""

    def __init__(self, conv):
        super().__init__()
        into, features = 8, [ODConvUnit(3, 8, 3, 2, 1, nn.Conv2d)]
        widths, counts, strides = (
            (8, 8, 8, 16, 24, 40, 80),
            (1, 2, 3, 4, 3, 3, 1),
            (1, 2, 2, 2, 1, 2, 1),
        )
        for group, (out, count, stride) in enumerate(zip(widths, counts, strides)):
            for block in range(count):
                step = stride if block == 0 else 1
                features.append(InvertedResidual(into, out, step, 6 if group else 1, conv))
                into = out
        self.features = nn.Sequential(*features, ODConvUnit(into, 1280, 1, 1, 1, conv))

    def forward(self, x):
        return self.features(x)


@pytest.mark.parametrize('kernels', [1, 4])
def test_mobilenet_files_of_odconv_load(kernels, tmp_path):
    """Their stem is static. The static network reads the same file without its attentions."""
    published = MobileNetV2OfTheFiles(partial(mmkw.ODConv2d, cell_num_ratio=kernels))
    static = MobileNetV2OfTheFiles(nn.Conv2d)
    for network, config in (
        (static, dict(type='mmkw.MobileNetV2')),
        (published, dict(type='mmkw.KWMobileNetV2', method='odconv', cell_num_ratio=kernels)),
    ):
        state = {}
        for name, tensor in network.state_dict().items():
            name = name.replace('warehouse_manager.weights.0', 'weight')
            linear = '.attention.' in name and tensor.dim() == 2
            state[f'module.{name}'] = tensor[:, :, None, None] if linear else tensor
        read = MODELS.build(dict(config, widen_factor=0.25, out_indices=(7,)))
        torch.save(dict(state_dict=state), tmp_path / 'file.pth')
        load_checkpoint(read, str(tmp_path / 'file.pth'))
        # By the statistics of the images, as activations vanish by those of random weights.
        network.train(), read.train()
        x = torch.randn(4, 3, 64, 64)
        same([read(x)[0]], [network(x)], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('method', METHODS)
def test_any_registered_backbone(method):
    pytest.importorskip('mmdet', reason='the backbone is its')
    with DefaultScope.overwrite_default_scope('mmdet'):
        config = dict(type='mmkw.KWModule', module=dict(type='ResNet', depth=18, base_channels=8))
        network = MODELS.build(dict(config, method=method))
        assert len(dynamic(network)) == (16 if method == 'odconv' else 19)
        patterns = [dict(match=r'layer4\.\d\.conv\d', warehouse='last', cell_num_ratio=3)]
        few = MODELS.build(dict(config, method=method, patterns=patterns))
        mixed = MODELS.build(dict(config, patterns=[dict(patterns[0], method=method)]))
    for network in (few, mixed):
        assert [len(cells) for cells in network.warehouse_manager.weights] == [3] * 4
        assert list(dynamic(network)) == [f'layer4.{b}.conv{c}' for b in (0, 1) for c in (1, 2)]


def test_two_methods_in_one_network():
    pytest.importorskip('mmdet', reason='the backbone is its')
    with DefaultScope.overwrite_default_scope('mmdet'):
        config = dict(type='mmkw.KWModule', module=dict(type='ResNet', depth=18, base_channels=8))
        patterns = [
            dict(match=r'layer3\.\d\.conv\d', warehouse='stage3'),
            dict(match=r'layer4\.\d\.conv\d', method='odconv'),
        ]
        network = MODELS.build(dict(config, patterns=patterns))
    assert type(network.layer3[1].conv2) is mmkw.KWConv2d
    assert type(network.layer4[1].conv2) is mmkw.ODConv2d
    assert len(network.warehouse_manager.weights) == 1 + 4


@pytest.mark.parametrize('arch', ['convnext', 'mobilenet'])
@pytest.mark.parametrize('method', METHODS)
def test_other_families(method, arch):
    with torch.device('meta'):
        if arch == 'convnext':
            network = mmkw.KWConvNeXt('tiny', method=method)
        else:
            network = mmkw.KWMobileNetV2(method=method, out_indices=(7,))
    # The stem of ODConv's MobileNetV2 is static.
    mobilenet = 51 if method == 'odconv' else 52
    assert len(dynamic(network)) == (58 if arch == 'convnext' else mobilenet)


@pytest.mark.parametrize('method', METHODS)
def test_a_network_trains(method):
    network = nn.Sequential(mmkw.KWResNet(18, base_channels=8, method=method, frozen_stages=1))
    network[0].init_weights()
    constructor = dict(
        optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1),
        paramwise_cfg=dict(dwconv_decay_mult=0.0, custom_keys={'layer4': dict(lr_mult=0.5)}),
    )
    optimizer = build_optim_wrapper(network, constructor)
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    weights = network[0].warehouse_manager.weights
    names = [partition.name for partition in network[0].warehouse_manager.partitions]
    network.train()
    before = [cells.detach().clone() for cells in weights]
    for tau in (1.0, 0.5):
        mmkw.set_temperature(network, tau)
        loss = sum(y.square().mean() for y in network(torch.randn(2, 3, 40, 40)))
        optimizer.update_params(loss)
    for name, cells, start in zip(names, weights, before):
        frozen = name.startswith('layer1')
        assert cells.equal(start) == frozen and cells.requires_grad != frozen, name
        if not frozen:
            assert rates[id(cells)] == (0.05 if name.startswith('layer4') else 0.1)


def test_initialisers_set_the_kernels():
    """Of a network that is not the paper's; the attentions keep their start."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(64, 64, 3)

        def forward(self, x):
            return self.conv(x)

    for method in METHODS:
        network = mmkw.convert(Network(), method=method)
        attention = copy.deepcopy(network.conv.attention.state_dict())
        network.apply(lambda m: nn.init.constant_(m.weight, 2) if type(m) is nn.Conv2d else None)
        kernel = network.conv.static_twin().weight
        torch.testing.assert_close(kernel, torch.full((64, 64, 3, 3), 2.0), atol=1e-4, rtol=1e-4)
        for name, tensor in network.conv.attention.state_dict().items():
            assert tensor.equal(attention[name])


def test_static_twins(static):
    x = [torch.randn(4, 3, 40, 40)]
    network = mmkw.convert(copy.deepcopy(static), method='dyconv')
    mmkw.set_temperature(network, 1)
    with pytest.raises(ValueError, match=r'mmkw\.deploy\.to_static approximates'):
        mmkw.to_static(network)
    twin, report = to_static(network, x)
    same(twin(x[0]), static(x[0]), atol=1e-4, rtol=1e-4)
    assert report.distance < 1e-4
    with pytest.raises(ValueError, match=r'layer1\.0\.conv1 is an ODConv2d.*no mean kernel'):
        to_static(mmkw.convert(static, method='odconv'), x)


class Linears(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: mmkw.KWResNet(18, method='dynamic'), 'method must be one of'),
        (
            lambda: mmkw.KWResNet(18, method='dyconv', cell_num_ratio=1),
            'whole number of at least 2, got 1',
        ),
        (
            lambda: mmkw.KWResNet(18, method='odconv', nonlocal_basis_ratio=0.5),
            'nonlocal_basis_ratio=0.5 does not apply',
        ),
        (lambda: mmkw.KWResNet(18, method='condconv', reduction=0.5), 'reduction=0.5 does not'),
        (
            lambda: mmkw.KWResNet(18, method='dyconv', attention_norm_cfg=dict(type='LN')),
            "attention_norm_cfg=.* does not apply to method='dyconv'.*Leave it out",
        ),
        (
            lambda: mmkw.convert(Linears(), method='odconv'),
            r'the rule makes no Conv2d dynamic.*Name some by patterns or in a SharingPlan, or take',
        ),
        (
            lambda: mmkw.KWResNet(18, method='condconv', cell_num_ratio=10**7),
            r'Lower cell_num_ratio=10000000\.$',
        ),
        (lambda: mmkw.KWResNet(18, method=['odconv']), 'method must be one for all layers'),
        (
            lambda: mmkw.convert(
                Linears(), mmkw.SharingPlan.make([('first', 'w')], method='odconv')
            ),
            "'first' is a Linear, for which method='odconv' has no layer: only for Conv2d",
        ),
        (
            lambda: mmkw.KWResNet(18, method='odconv', cell_num_ratio=[1, 4]),
            'cell_num_ratio has 2 values .* for 16 warehouses',
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(PlanError, match=message):
        make()


def test_condconv_has_no_temperature():
    layer = mmkw.CondConv2d(4, 4, 3)
    x = torch.randn(2, 4, 5, 5)
    before = layer(x)
    mmkw.set_temperature(layer, 1.0)
    assert isinstance(layer.attention, CondAttention)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)


@pytest.mark.parametrize('method', ['odconv', 'kernelwarehouse'])
@pytest.mark.parametrize('norm, other', [('BN1d', 'LN'), ('BN1d', 'GN'), ('LN', 'BN1d')])
def test_attentions_of_another_norm_are_refused(method, norm, other, static):
    """Those of ODConv have no bias before their norm, and so all that LayerNorm needs."""
    norms = {name: dict(type=name) for name in (norm, other)}
    norms.get('GN', {})['num_groups'] = 2
    found, network = (
        mmkw.convert(copy.deepcopy(static), method=method, attention_norm_cfg=norms[name])
        for name in (norm, other)
    )
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError, match='norm'):
        network.load_state_dict(found.state_dict(), strict=False)
    for name, tensor in network.state_dict().items():
        assert tensor.equal(before[name]), name
    network.load_state_dict(static.state_dict())
    x = torch.randn(2, 3, 40, 40)
    network.eval(), static.eval()
    same(network(x), static(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('method', ['kernelwarehouse', 'odconv'])
@pytest.mark.parametrize(
    'norm', [dict(type='LN', elementwise_affine=False), dict(type='GN', num_groups=2, affine=False)]
)
def test_own_files_of_norms_without_parameters_load(method, norm, static):
    found, network = (
        mmkw.convert(copy.deepcopy(static), method=method, attention_norm_cfg=norm)
        for _ in range(2)
    )
    last = 'fc2' if method == 'kernelwarehouse' else 'channel_fc'
    nn.init.normal_(found.layer1[0].conv2.attention.get_parameter(f'{last}.bias'))
    network.load_state_dict(found.state_dict())
    x = torch.randn(2, 3, 40, 40)
    same(network(x), found(x), rtol=0, atol=0)
    other = mmkw.convert(copy.deepcopy(static), method=method, attention_norm_cfg=dict(type='LN'))
    with pytest.raises(CheckpointMismatchError, match='or another norm'):
        other.load_state_dict(found.state_dict())


def test_own_files_of_replaced_parts_load(static):
    found, network = (mmkw.convert(copy.deepcopy(static)) for _ in range(2))
    for one in (found, network):
        for layer in one.modules():
            if isinstance(layer, mmkw.KWConv2d):
                layer.attention.norm1 = nn.Identity()
    network.load_state_dict(found.state_dict())
    x = torch.randn(2, 3, 40, 40)
    same(network(x), found(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    'method, part', [('kernelwarehouse', 'norm1'), ('odconv', 'channel_fc'), ('dyconv', 'fc2')]
)
def test_files_that_lack_a_part_are_refused_by_its_name(method, part, static):
    network = mmkw.convert(copy.deepcopy(static), method=method)
    state = {k: v for k, v in network.state_dict().items() if f'.attention.{part}.' not in k}
    with pytest.raises(CheckpointMismatchError, match=rf'{part}\.\w+ of this ResNet .* lacks it'):
        network.load_state_dict(state)


@pytest.mark.parametrize('layer', [mmkw.DYConv2d, mmkw.CondConv2d, mmkw.ODConv2d])
def test_layers_alone_start_with_their_own_noise(layer):
    noise = []
    for _ in range(2):
        made, static = layer(16, 16, 3, cell_num_ratio=4), nn.Conv2d(16, 16, 3)
        made.load_state_dict(static.state_dict())
        x = torch.rand(2, 16, 5, 5)
        torch.testing.assert_close(made.eval()(x), static(x), atol=1e-5, rtol=1e-4)
        cells = made.cells.detach()
        noise.append((cells - cells.mean(0)).flatten())
    assert torch.cosine_similarity(*noise, dim=0).abs() < 0.1


@pytest.mark.parametrize('method', ['dyconv', 'condconv', 'odconv'])
def test_layers_of_one_shape_start_with_their_own_noise(method, static):
    """And with the same in every process."""
    networks = [
        mmkw.convert(copy.deepcopy(static), method=method, cell_num_ratio=4) for _ in range(2)
    ]
    cells = [network.layer1[1].conv1.cells.detach() for network in networks]
    assert cells[0].equal(cells[1])
    noise = [
        getattr(networks[0].layer1[1], name).cells.detach().flatten(1)
        for name in ('conv1', 'conv2')
    ]
    one, other = ((cells - cells.mean(0)).flatten() for cells in noise)
    assert torch.cosine_similarity(one, other, dim=0).abs() < 0.1
    x = torch.randn(2, 3, 40, 40)
    networks[0].eval(), static.eval()
    same(networks[0](x), static(x), atol=1e-4, rtol=1e-4)

"""A warehouse is frozen with its layers: when a network is built, set to training, or by name."""

import copy
import pickle

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from twin_networks import HRNET

from mmkw.layers.dynamic_layers import DynamicLayer
from mmkw.sharing import SharingPlan, convert

CSP = dict(widen_factor=0.25, deepen_factor=0.33, frozen_stages=3)
SWIN = dict(embed_dims=48, num_heads=[3] * 4, window_size=2, frozen_stages=3)
# Of each one more stage than its layers share with frozen ones.
NETWORKS = {
    'mmdet.ResNet': dict(depth=18, base_channels=16, frozen_stages=2),
    'mmdet.SwinTransformer': dict(depths=(2, 2, 2, 2), **SWIN),
    'mmdet.CSPDarknet': CSP,
    'mmdet.CSPNeXt': CSP,
    'mmdet.EfficientNet': dict(arch='b0', frozen_stages=5),
    'mmdet.Darknet': dict(depth=53, frozen_stages=3),
    'mmdet.MobileNetV2': dict(widen_factor=0.5, frozen_stages=4),
    'mmseg.SwinTransformer': dict(depths=[2, 2, 2, 2], **SWIN),
    'mmseg.MobileNetV2': dict(widen_factor=0.5, frozen_stages=4),
    'mmseg.MobileNetV3': dict(arch='large', frozen_stages=9),
    'mmseg.HRNet': dict(frozen_stages=2, extra=HRNET),
}


def step(network, x=None):
    """One of training, with decay."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1)
    outputs = network(torch.randn(2, 3, 64, 64) if x is None else x)
    sum(y.square().mean() for y in outputs).backward()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer.step()
    return {name for name, p in network.named_parameters() if not p.equal(before[name])}


def layers_of(network):
    """By warehouse."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, DynamicLayer):
            found.setdefault(module._warehouse_index, []).append(name)
    return found


@pytest.mark.parametrize('kind', NETWORKS)
def test_frozen_stages_freeze_their_warehouses(kind):
    library = kind.partition('.')[0]
    pytest.importorskip(library, reason='the networks are its')
    config = dict(type=kind, **NETWORKS[kind])
    static = MODELS.build(config)
    dynamic = MODELS.build(dict(type='mmkw.KWModule', module=config))
    moved = step(static)
    moves = step(dynamic)
    frozen = 0
    for index, names in layers_of(dynamic).items():
        # Of a fused projection the value is dynamic.
        weights = [f'{name}.weight' for name in names if not name.endswith('.value')]
        cells = f'warehouse_manager.weights.{index}'
        attentions = [name for name in moves if name.startswith(tuple(f'{n}.att' for n in names))]
        assert (cells in moves) == bool(attentions)
        if weights:
            assert (cells in moves) == any(weight in moved for weight in weights)
        frozen += cells not in moves
    assert 0 < frozen < len(dynamic.warehouse_manager.weights)


@pytest.mark.parametrize(
    'config',
    [
        dict(type='mmkw.KWResNet', depth=18, base_channels=16, frozen_stages=2),
        dict(type='mmkw.KWMobileNetV2', widen_factor=0.5, frozen_stages=2),
        dict(
            type='mmkw.KWConvNeXt',
            arch=dict(depths=[1] * 4, channels=[8, 16, 24, 32]),
            frozen_stages=2,
        ),
        dict(type='mmkw.KWModule', module=dict(type='mmdet.MobileNetV2', frozen_stages=2)),
    ],
    ids=lambda config: config['type'],
)
def test_warehouses_go_on_learning_where_they_are_told_to(config):
    pytest.importorskip('mmdet', reason='the networks are its')
    usual, told = MODELS.build(config), MODELS.build(dict(config, freeze_warehouses=False))
    moves = step(told)
    cells = {f'warehouse_manager.weights.{i}' for i in range(len(layers_of(told)))}
    assert cells <= moves and not cells <= step(usual)
    # Nothing else does.
    learn = [{n for n, p in net.named_parameters() if p.requires_grad} for net in (told, usual)]
    assert learn[0] == learn[1] | cells


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize('copied', ['not', 'deepcopy', 'pickle'])
def test_layers_frozen_by_name_freeze_and_thaw_their_warehouse(copied):
    network = convert(Network(), SharingPlan.make([('a', 'one'), ('b', 'one'), ('c', 'two')]))
    network = dict(deepcopy=copy.deepcopy, pickle=lambda n: pickle.loads(pickle.dumps(n))).get(
        copied, lambda n: n
    )(network)
    one, two = network.warehouse_manager.weights
    x = torch.randn(2, 8, 4, 4)
    network.a.requires_grad_(False)
    network(x)
    assert one.requires_grad
    network.b.requires_grad_(False)
    with torch.no_grad():
        network(x)
    assert one.requires_grad
    network(x)
    assert not one.requires_grad and two.requires_grad
    network.b.requires_grad_(True)
    network(x)
    assert one.requires_grad
    # What is frozen by itself stays so.
    two.requires_grad_(False)
    network(x)
    assert not two.requires_grad and network.c.attention.fc1.weight.requires_grad


PLANS = {'own': [('a', 'one'), ('b', 'two'), ('c', 'three')], 'shared': [(n, 'all') for n in 'abc']}


@pytest.mark.parametrize('before', [False, True], ids=['after', 'before'])
@pytest.mark.parametrize('plan', PLANS)
def test_a_part_learns_after_all_was_frozen(plan, before):
    """As its static twin does, where the network is frozen before or after it is converted."""
    static = Network()
    network = copy.deepcopy(static)
    if before:
        network.requires_grad_(False)
    convert(network, SharingPlan.make(PLANS[plan]))
    moved = []
    for net in (static, network):
        net.requires_grad_(False)
        net.c.requires_grad_(True)
        moved.append(step(net, torch.randn(2, 8, 4, 4)))
    assert moved[0] == {'c.weight', 'c.bias'}
    cells = f'warehouse_manager.weights.{len(set(dict(PLANS[plan]).values())) - 1}'
    assert {name for name in moved[1] if 'attention' not in name} == {cells, 'c.bias'}
    assert any(name.startswith('c.attention') for name in moved[1])


@pytest.mark.parametrize('names', [('bias',), ('bias', 'norm.weight')], ids=str)
def test_tuning_biases_and_norms_leaves_kernels_frozen(names):
    static = Network()
    dynamic = convert(copy.deepcopy(static), SharingPlan.make(PLANS['shared']))
    for network in (static, dynamic):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith('c.') and name.endswith(names))
        moved = step(network, torch.randn(2, 8, 4, 4))
        assert {name for name in moved if 'attention' not in name} == {'c.bias'}
        assert all(name.endswith(names) for name in moved)


def test_layers_thaw_one_after_the_other():
    network = Network().requires_grad_(False)
    convert(network, SharingPlan.make(PLANS['own']))
    for name in 'abc':
        getattr(network, name).requires_grad_(True)
    network(torch.randn(2, 8, 4, 4))
    assert all(cells.requires_grad for cells in network.warehouse_manager.weights)


@pytest.mark.parametrize('first', [False, True])
def test_cells_that_are_frozen_by_name_stay_so(first, caplog):
    caplog.set_level('INFO', 'mmkw')
    network = convert(Network(), SharingPlan.make(PLANS['own']))
    if first:
        network.a.requires_grad_(False)
        network.warehouse_manager.requires_grad_(False)
    else:
        for cells in network.warehouse_manager.parameters():
            cells.requires_grad_(False)
    for _ in range(2):
        network(torch.randn(2, 8, 4, 4))
        assert not any(cells.requires_grad for cells in network.warehouse_manager.weights)
    # Only where it might be a mistake something is said, once.
    assert caplog.text.count('stays frozen') == (0 if first else 3)
    network.warehouse_manager.requires_grad_(True)
    network(torch.randn(2, 8, 4, 4))
    learn = [cells.requires_grad for cells in network.warehouse_manager.weights]
    assert learn == [not first, True, True]


def test_frozen_layers_where_other_methods_than_forward_compute():
    timm = pytest.importorskip('timm', reason='its networks have such methods')
    static = timm.create_model('resnet18', num_classes=3)
    x = torch.randn(2, 3, 32, 32)
    dynamic = convert(copy.deepcopy(static))
    cells = dynamic.warehouse_manager
    for network in (static, dynamic):
        network.layer1.requires_grad_(False)
        network.layer2.requires_grad_(False)
        network.forward_features(x).sum().backward()
        found = [p.grad is None for n, p in network.named_parameters() if n.startswith('layer2')]
        assert all(found)
    grads = [p.grad is None for p in cells.parameters()]
    assert grads == [True, False, False, False]
    # All is frozen, and then a part learns that mixes the cells of several warehouses.
    for network in (static, dynamic):
        network.requires_grad_(False)
        network.forward_features(x)
        for part in (network.layer3, network.layer4):
            part.requires_grad_(True)
        network.zero_grad()
        network.forward_features(x).sum().backward()
        found = [p.grad is not None for n, p in network.named_parameters() if n[:6] == 'layer4']
        assert all(found)
    grads = [p.grad is not None for p in cells.parameters()]
    # The first block of a stage takes some of its kernels from the stage before.
    assert grads == [False, True, True, True]


@pytest.mark.parametrize('held', [False, True], ids=['alone', 'in a model'])
@pytest.mark.parametrize('plan', PLANS)
def test_an_optimizer_that_is_given_what_learns_has_the_cells(plan, held):
    """Before anything has computed: as users fine-tune a part of a network."""
    static = Network()
    dynamic = convert(copy.deepcopy(static), SharingPlan.make(PLANS[plan]))
    x = torch.randn(2, 8, 4, 4)
    for network in (static, dynamic):
        model = nn.Sequential(network) if held else network
        model.requires_grad_(False)
        network.b.requires_grad_(True)
        given = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(given, lr=0.1, weight_decay=0.1)
        with torch.no_grad():
            before = network.eval().b(x)
        model.train()(x).square().mean().backward()
        optimizer.step()
        learning = {p for p in model.parameters() if p.requires_grad}
        assert learning == set(given)
        if network is dynamic:
            index = network.b.place[1]
            assert network.warehouse_manager.weights[index] in set(given)
        with torch.no_grad():
            assert not torch.equal(network.eval().b(x), before)


def test_frozen_layers_and_distributed_training(tmp_path):
    """DistributedDataParallel looks once at what learns, when it wraps the network."""
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        static = Network()
        dynamic = convert(copy.deepcopy(static), SharingPlan.make(PLANS['own']))
        for network in (static, dynamic, nn.Sequential(copy.deepcopy(dynamic))):
            next(iter(network.children())).requires_grad_(False)
            if network is not static and network is not dynamic:
                network[0].requires_grad_(True)
                network[0].b.requires_grad_(False)
            parallel = nn.parallel.DistributedDataParallel(network)
            for _ in range(2):
                parallel(torch.randn(2, 8, 4, 4)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()

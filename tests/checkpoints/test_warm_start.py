"""A static network's weights make a KernelWarehouse network that computes the same, and learns."""

import contextlib
import copy
import logging
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import exhaustively
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import load_checkpoint, load_state_dict, weights_to_cpu
from torch import nn

import mmkw
from mmkw.checkpoints import CheckpointMismatchError
from mmkw.layers import KWConv2d, KWLinear, WarehouseOptions, partition_warehouse
from mmkw.layers.attention import Attention
from mmkw.layers.dynamic_layers import DynamicLayer
from mmkw.layers.partition import KernelShape
from mmkw.layers.warm_start import warm_start
from mmkw.ops import mix_cells
from mmkw.sharing import SharingPlan, convert

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools/analysis_tools'))
import exactness
from exactness import difference, outputs

HRNET = {
    f'stage{stage}': dict(
        num_modules=1,
        num_branches=max(stage, 1),
        block='BASIC' if stage > 1 else 'BOTTLENECK',
        num_blocks=(1,) * max(stage, 1),
        num_channels=tuple(16 << branch for branch in range(max(stage, 1))),
    )
    for stage in (1, 2, 3, 4)
}
SWIN = dict(embed_dims=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 4), window_size=4)
# scope, config of the static network, image side
NETWORKS = {
    'resnet18': ('mmdet', dict(type='ResNet', depth=18, base_channels=16), 64),
    'resnet50': ('mmdet', dict(type='ResNet', depth=50, base_channels=16), 64),
    'resnext': ('mmdet', dict(type='ResNeXt', depth=50, groups=8, base_channels=16), 64),
    'res2net': ('mmdet', dict(type='Res2Net', depth=50, base_width=8, base_channels=16), 64),
    'regnet': ('mmdet', dict(type='RegNet', arch='regnetx_400mf'), 64),
    'hrnet': ('mmdet', dict(type='HRNet', extra=HRNET), 64),
    'mobilenet-v2': ('mmdet', dict(type='MobileNetV2', widen_factor=0.5), 64),
    'mobilenet-v2 of mmseg': ('mmseg', dict(type='MobileNetV2', widen_factor=0.5), 64),
    'convnext': (
        'mmkw',
        dict(type='ConvNeXt', arch=dict(depths=[1, 1, 2, 1], channels=[16, 32, 48, 64])),
        64,
    ),
    'cspdarknet': ('mmdet', dict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.25), 64),
    'cspnext': ('mmdet', dict(type='CSPNeXt', deepen_factor=0.167, widen_factor=0.375), 64),
    'swin': ('mmdet', dict(type='SwinTransformer', **SWIN), 72),
    'swin of mmseg': ('mmseg', dict(type='SwinTransformer', **SWIN), 72),
    'vit': (
        'mmseg',
        dict(
            type='VisionTransformer',
            img_size=64,
            embed_dims=48,
            num_layers=4,
            num_heads=3,
            out_indices=(1, 3),
        ),
        64,
    ),
    'mit': (
        'mmseg',
        dict(
            type='MixVisionTransformer',
            embed_dims=16,
            num_layers=[1, 1, 1, 1],
            num_heads=[1, 2, 4, 4],
        ),
        64,
    ),
    'bisenet': (
        'mmseg',
        dict(
            type='BiSeNetV1',
            backbone_cfg=dict(type='ResNet', depth=18, base_channels=32),
            context_channels=(64, 128, 256),
            spatial_channels=(16, 16, 16, 64),
            out_channels=64,
        ),
        64,
    ),
}


# They are much like one of the others.
SIMILAR = ['res2net', 'regnet', 'mobilenet-v2 of mmseg', 'cspdarknet', 'swin of mmseg']


def build(name, **wrapper):
    library, config, _ = NETWORKS[name]
    pytest.importorskip('mmdet' if library == 'mmkw' else library, reason='the network is its')
    return exactness.build(library, config, **wrapper)


@cache
def static_twin(name):
    """State, and outputs in both precisions."""
    side, static = NETWORKS[name][2], build_static(name)
    state = static.state_dict()
    single = outputs(static, side)
    return state, single, outputs(copy.deepcopy(static).double(), side, torch.double)


def build_static(name):
    library, config, _ = NETWORKS[name]
    pytest.importorskip('mmdet' if library == 'mmkw' else library, reason='the network is its')
    return exactness.build_static(library, config)


@pytest.mark.parametrize('budget, tau', exhaustively([(1, 1), (2, 0), (4, 0)], [(2, 0)]))
@pytest.mark.parametrize('name', exhaustively(NETWORKS, SIMILAR))
def test_outputs_equal_those_of_the_static_network(name, budget, tau):
    side = NETWORKS[name][2]
    state, expected, expected_double = static_twin(name)
    single = build(name, cell_num_ratio=budget, start_tau=tau)
    result = single.load_state_dict(state)
    assert not result.missing_keys
    before = [p.detach().clone() for p in single.parameters()]
    assert difference(outputs(single, side), expected) < 1e-4
    assert all(p.equal(q) for p, q in zip(single.parameters(), before))

    double = build(name, cell_num_ratio=budget, start_tau=tau).double()
    load_state_dict(double, {name: value.double() for name, value in state.items()}, strict=True)
    assert difference(outputs(double, side, torch.double), expected_double) < 1e-9


def test_all_layers_of_the_plan_are_dynamic():
    """What the table above compares is not the static network itself."""
    for name in NETWORKS:
        if name.endswith('mmseg'):
            continue
        network = build(name)
        planned = sum(len(p.layers) for p in network.warehouse_manager.partitions)
        dynamic = sum(isinstance(m, Attention) for m in network.modules())
        assert dynamic == planned >= 10


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 1)
        self.c = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def net(**options):
    names = ('start_tau', 'freeze_warehouses', 'keep_weights')
    given = {name: options.pop(name) for name in names if name in options}
    plan = SharingPlan.make([('a', 'w'), ('b', 'w'), ('c', 'w')], **options)
    return convert(Net(), plan, dict(type='BN1d'), **given)


@pytest.mark.parametrize('options', [{}, dict(nonlocal_basis_ratio=0.5)])
@pytest.mark.parametrize('budget', [1, 4])
def test_everything_learns_from_the_start(budget, options):
    """Every cell and every attention parameter has had a gradient, and the attentions differ."""
    network = net(cell_num_ratio=budget, **options).train()
    network.load_state_dict(Net().state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05)
    pooled = {}
    for layer in (network.a, network.b, network.c):
        layer.attention.register_forward_hook(
            lambda module, _, alpha: pooled.setdefault(module, []).append(alpha.detach())
        )
    moved = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, 6, 6, generator=generator) + torch.randn(
            8, 4, 1, 1, generator=generator
        )
        optimizer.zero_grad()
        (network(x) - x.flip(1)).square().mean().backward()
        for name, p in network.named_parameters():
            moved[name] += p.grad.abs()
        optimizer.step()
    for name, total in moved.items():
        if name.endswith('warehouse_manager.weights.0'):
            assert (total.flatten(1).sum(1) > 0).all()
        else:
            assert (total > 0).all(), name
    for alphas in pooled.values():
        assert (alphas[-1] - alphas[0]).abs().max() > 1e-4
        assert (alphas[0][0] - alphas[0][1]).abs().max() == 0
        assert (alphas[-1][0] - alphas[-1][1]).abs().max() > 1e-6


def test_the_attention_starts_at_its_cell():
    network = net(cell_num_ratio=2).eval()
    network.load_state_dict(Net().state_dict())
    for layer in (network.a, network.b, network.c):
        alpha = layer.attention(torch.randn(3, layer.in_channels))
        cells = torch.tensor(layer.attention._assigned)
        assigned = alpha.gather(2, cells.expand(3, -1).unsqueeze(-1))
        assert ((assigned - 1).abs() < 1e-3).all()
        torch.testing.assert_close(alpha.sum(-1, keepdim=True), assigned, atol=1e-6, rtol=0)


def test_a_start_at_temperature_1_leaves_the_attention_as_it_is():
    network = net(start_tau=1)
    before = network.a.attention.fc2.weight.clone()
    network.load_state_dict(Net().state_dict())
    assert network.a.attention.fc2.weight.equal(before)
    assert network.a.attention.temperature == 1


@pytest.mark.parametrize('where', ['memory', 'file', 'read', 'bare'])
@pytest.mark.parametrize('method', ['kernelwarehouse', 'odconv'])
def test_trained_attentions_have_their_temperature(method, where, tmp_path):
    """A network that is made anew and given what another learnt computes the same."""
    trained, again = (net(method=method, start_tau=1) for _ in range(2))
    optimizer = torch.optim.Adam(trained.parameters(), 1e-2)
    x = torch.randn(2, 4, 8, 8)
    for tau in (1, 0.5, 0):
        mmkw.set_temperature(trained, tau)
        optimizer.zero_grad()
        trained(x).square().mean().backward()
        optimizer.step()

    def stored():
        """What is saved now, as it comes back."""
        state, path = trained.state_dict(), tmp_path / 'a.pth'
        if where == 'bare':
            # As in files of others, or of another format.
            return dict(state)
        if where == 'memory':
            return state
        torch.save(dict(state_dict=weights_to_cpu(state)), path)
        read = torch.load if where == 'file' else mmkw.read_checkpoint
        return read(path)['state_dict']

    again.load_state_dict(stored())
    torch.testing.assert_close(again.eval()(x), trained.eval()(x))
    layers = [m for m in again.modules() if isinstance(m, DynamicLayer)]
    if where == 'read':
        # As MMDetection's and MMSegmentation's `init_...` functions do.
        mmkw.set_temperature(trained, 0.5)
        stored()
        load_checkpoint(again, str(tmp_path / 'a.pth'))
        torch.testing.assert_close(again(x), trained(x))
    # Half-way, too, if the file says so; else what a schedule set stays.
    for tau in (0.5, 0.25):
        mmkw.set_temperature(trained, tau)
        again.load_state_dict(stored())
        expected = 0.0 if where == 'bare' else tau
        assert {layer.attention.temperature for layer in layers} == {expected}
    # A static network begins anew.
    again.load_state_dict(Net().state_dict())
    assert {layer.attention.temperature for layer in layers} == {1}
    alone, twin = KWConv2d(4, 4, 3), KWConv2d(4, 4, 3)
    mmkw.set_temperature(alone, 0.75)
    twin.load_state_dict(alone.state_dict())
    assert twin.attention.temperature == 0.75


@pytest.mark.parametrize('tau', [0.5, True, '0'])
def test_other_temperatures_are_refused(tau):
    with pytest.raises(ValueError, match='start_tau must be 0'):
        net(start_tau=tau)


@pytest.mark.parametrize('name', ['keep_weights', 'freeze_warehouses'])
@pytest.mark.parametrize('value', ['no', 0, None])
def test_switches_are_true_or_false(name, value):
    """Of a word such as ``no`` Python would think that it is true."""
    message = f'{name} must be True or False, got {value!r}'
    with pytest.raises(TypeError, match=message):
        net(**{name: value})


def test_every_process_draws_the_same_spare_cells():
    state = Net().state_dict()
    networks = [net(cell_num_ratio=4) for _ in range(2)]
    for network in networks:
        network.load_state_dict(dict(state))
    one, other = (network.warehouse_manager.weights[0] for network in networks)
    assert one.equal(other)
    assert (one.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize('tau', [0, 1])
def test_below_a_budget_of_1_the_start_is_the_nearest(tau):
    kernels = {
        'a': torch.randn(16, 8, 3, 3, dtype=torch.double),
        'b': 9 * torch.randn(8, 8, 3, 3, dtype=torch.double),
    }
    options = WarehouseOptions(cell_num_ratio=0.5, cell_inplane_ratio=0.5)
    shapes = [KernelShape(name, *k.shape[:2], (3, 3)) for name, k in kernels.items()]
    partition = partition_warehouse('w', shapes, options)
    attentions = {
        share.kernel.layer: Attention(8, share, partition.num_cells, options, dict(type='LN'))
        for share in partition.layers
    }
    for attention in attentions.values():
        attention.double().temperature = tau
    cells = torch.zeros(partition.num_cells, *partition.cell_shape, dtype=torch.double)
    cells, error = warm_start(partition, kernels, attentions, cells, tau)
    errors, rows = [], []
    for share in partition.layers:
        kernel = kernels[share.kernel.layer]
        alpha = attentions[share.kernel.layer](torch.randn(1, 8, dtype=torch.double)).detach()
        mixed = mix_cells(alpha, cells, share.grid)[0]
        errors.append(((mixed - kernel).norm() / kernel.norm()) ** 2)
        # The pieces of a kernel, by unfolding it: (out, in / 4, 4, 9) -> ...
        pieces = kernel.view(-1, 8, kernel.shape[1] // 4, 4, 9).permute(4, 0, 2, 1, 3)
        rows.append((pieces / kernel.norm()).reshape(-1, 32))
    found = (sum(errors) / 2) ** 0.5
    assert found == pytest.approx(error, abs=1e-9)
    values = torch.linalg.svdvals(torch.cat(rows))
    best = (values[partition.num_cells :].square().sum() / 2).sqrt()
    if tau == 0:
        assert found == pytest.approx(float(best), abs=1e-9)
    else:
        assert best < found < 1


def test_a_layer_alone_takes_a_static_kernel():
    for layer, static in (
        (KWConv2d(8, 6, 3, groups=2, padding=1, cell_num_ratio=2), nn.Conv2d(8, 6, 3, 1, 1, 1, 2)),
        (KWLinear(8, 6), nn.Linear(8, 6)),
    ):
        x = torch.randn(2, 8, 8, 8)
        layer.load_state_dict(static.state_dict())
        torch.testing.assert_close(layer.eval()(x), static(x), atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match=r'of \(4, 4, 3, 3\); this layer has kernels of \(8, 4'):
        KWConv2d(4, 8, 3).load_state_dict(nn.Conv2d(4, 4, 3).state_dict())


def test_a_static_kernel_for_a_part_of_a_network_is_refused():
    with pytest.raises(RuntimeError, match='shares its warehouse'):
        net().a.load_state_dict(Net().a.state_dict())


@contextlib.contextmanager
def log():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield lambda: [m for r in records if 'checkpoint' in (m := r.getMessage())]
    logger.removeHandler(handler)


def test_the_log_says_in_a_line_what_was_recognised():
    network = net()
    with log() as lines:
        network.load_state_dict(Net().state_dict())
    message = 'Net: static checkpoint, 3 kernels into 1 warehouses for temperature 0, exactly'
    assert lines() == [message]
    with log() as lines:
        network.load_state_dict(network.state_dict())
    cells = len(network.warehouse_manager.weights[0])
    assert lines() == [f'Net: KernelWarehouse checkpoint, {cells} cells into 1 warehouses']
    with log() as lines:
        published = network.state_dict() | {'fc.weight': torch.zeros(2, 4)}
        network.load_state_dict(published)
    assert lines()[0].startswith('Net: published KernelWarehouse checkpoint')
    with log() as lines:
        net(cell_num_ratio=0.5, cell_outplane_ratio=0.5).load_state_dict(Net().state_dict())
    (line,) = lines()
    assert 'approximately: below a budget of 1' in line and "in warehouse 'w'" in line


def test_a_config_s_pretrained_file_starts_the_network(tmp_path):
    static = build_static('resnet18')
    state = static.state_dict() | {'fc.weight': torch.zeros(5, 128)}
    torch.save(state, tmp_path / 'resnet18.pth')
    weights = dict(type='Pretrained', checkpoint=str(tmp_path / 'resnet18.pth'))
    with DefaultScope.overwrite_default_scope('mmdet'):
        cfg = dict(type='mmkw.KWResNet', depth=18, base_channels=16, init_cfg=weights)
        network = MODELS.build(dict(cfg, cell_num_ratio=4))
    network.init_weights()
    found, expected = (outputs(n, 64) for n in (network, static))
    assert difference(found, expected) < 1e-4


def test_load_from_starts_a_whole_model(tmp_path):
    pytest.importorskip('mmdet', reason='the model is its')
    model = nn.ModuleDict(dict(backbone=build('resnet18', cell_num_ratio=2), neck=net()))
    static = nn.ModuleDict(dict(backbone=build_static('resnet18'), neck=Net()))
    torch.save(dict(meta={}, state_dict=static.state_dict()), tmp_path / 'model.pth')
    load_checkpoint(model, str(tmp_path / 'model.pth'), map_location='cpu', strict=True)
    for part in ('backbone', 'neck'):
        x = torch.randn(2, 3 if part == 'backbone' else 4, 64, 64)
        model.eval(), static.eval()
        with torch.no_grad():
            found, expected = (m[part](x) for m in (model, static))
        found, expected = (y if isinstance(y, tuple) else (y,) for y in (found, expected))
        assert difference(found, expected) < 1e-4


@pytest.mark.parametrize(
    'depths, message',
    [
        ((18, 34), r'for 19 of the 35 dynamic layers of this ResNet; for layer1.2.conv1, .* none'),
        ((34, 18), r'layers that this ResNet lacks, such as layer1.2.conv1.weight'),
        ((50, 101), r'dynamic layers of this ResNet; for layer3.6.conv1, .* it has none'),
        ((18, 50), r'for layer1.0.conv2, of \(16, 16, 3, 3\)|it has none|of another|another arch'),
    ],
)
def test_a_static_checkpoint_of_another_depth_is_refused(depths, message):
    stored, wanted = depths
    with DefaultScope.overwrite_default_scope('mmdet'):
        static = MODELS.build(dict(type='mmkw.ResNet', depth=stored, base_channels=16))
        network = MODELS.build(dict(type='mmkw.KWResNet', depth=wanted, base_channels=16))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match=message):
        network.load_state_dict(static.state_dict())
    assert all(before[key].equal(value) for key, value in network.state_dict().items())


def test_a_static_checkpoint_of_another_width_is_refused():
    with DefaultScope.overwrite_default_scope('mmdet'):
        static = MODELS.build(dict(type='mmkw.ResNet', depth=18, base_channels=8))
        network = MODELS.build(dict(type='mmkw.KWResNet', depth=18, base_channels=16))
    with pytest.raises(
        CheckpointMismatchError, match=r'of \(16, 16, 3, 3\), it has \(8, 8, 3, 3\)'
    ):
        network.load_state_dict(static.state_dict())

"""KWResNet: the table of the paper, the arguments of the static network, freezing."""

import copy
import itertools
import pickle

import numpy as np
import plain_reference as plain
import pytest
import torch
from mmengine.registry import DefaultScope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkw.backbones import KWResNet, ResNet
from mmkw.layers import PlanError, set_temperature
from mmkw.layers.attention import Attention
from mmkw.layers.dynamic_layers import DynamicLayer

pytest.importorskip('mmdet', reason="needs MMDetection's ResNet")

HALF = dict(cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)
# depth, options, parameters with the ImageNet classifier, cells of the warehouses
TABLE = [
    (
        18,
        dict(cell_num_ratio=0.25, **HALF),
        4_031_768,
        '56x(32,32) 47x(64,64) 47x(128,128) 27x(256,256)',
    ),
    (
        18,
        dict(cell_num_ratio=0.5, **HALF),
        7_431_044,
        '112x(32,32) 94x(64,64) 94x(128,128) 54x(256,256)',
    ),
    (18, dict(cell_num_ratio=1), 11_932_148, '56x(64,64) 47x(128,128) 47x(256,256) 27x(512,512)'),
    (18, dict(cell_num_ratio=2), 23_242_127, '112x(64,64) 94x(128,128) 94x(256,256) 54x(512,512)'),
    (
        18,
        dict(cell_num_ratio=4),
        45_862_085,
        '224x(64,64) 188x(128,128) 188x(256,256) 108x(512,512)',
    ),
    (
        50,
        dict(cell_num_ratio=0.5, nonlocal_basis_ratio=1 / 16, **HALF),
        17_638_264,
        '174x(32,32) 208x(64,64) 276x(128,128) 94x(256,256)',
    ),
    (50, dict(cell_num_ratio=1), 28_052_310, '87x(64,64) 104x(128,128) 138x(256,256) 47x(512,512)'),
    (
        50,
        dict(cell_num_ratio=4),
        102_015_144,
        '348x(64,64) 416x(128,128) 552x(256,256) 188x(512,512)',
    ),
]
CLASSIFIER = {18: 512 * 1000 + 1000, 50: 2048 * 1000 + 1000}
# A thin network with the paper's structure, for everything but the table.
THIN = dict(depth=18, base_channels=8)


@pytest.mark.parametrize('depth, options, parameters, cells', TABLE)
def test_parameters_and_warehouses_of_the_paper(depth, options, parameters, cells):
    with torch.device('meta'):
        network = KWResNet(depth, **options)
    assert sum(p.numel() for p in network.parameters()) == parameters - CLASSIFIER[depth]
    shapes = [tuple(weight.shape) for weight in network.warehouse_manager.weights]
    assert ' '.join(f'{n}x({o},{i})' for n, o, i, *_ in shapes) == cells
    assert all(shape[3:] == (1, 1) for shape in shapes)


@pytest.mark.parametrize('depth', [34, 101, 152])
def test_deeper_networks_share_by_the_same_rule(depth):
    """No counts are published for these depths: the rule is recomputed from the block list."""
    with torch.device('meta'):
        network = KWResNet(depth, cell_num_ratio=1)
    blocks = {34: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    convs = ['conv1', 'conv2'] if depth == 34 else ['conv1', 'conv2', 'conv3']
    members = {f'stage{i}': [] for i in (1, 2, 3, 4)}
    for stage, count in enumerate(blocks):
        for block, conv in itertools.product(range(count), [*convs, 'downsample.0']):
            first = block == 0 and conv in ('conv1', 'downsample.0')
            if conv == 'downsample.0' and (block or (depth == 34 and stage == 0)):
                continue
            if first and stage == 0 and depth != 34:
                continue
            home = max(stage - 1, 0) if first else stage
            members[f'stage{home + 1}'].append(f'layer{stage + 1}.{block}.{conv}')
    partitions = network.warehouse_manager.partitions
    assert {p.name: [s.kernel.layer for s in p.layers] for p in partitions} == members


def test_names_are_those_of_the_static_network():
    from mmdet.models import ResNet

    network, static = KWResNet(50, base_channels=8), ResNet(50, base_channels=8)
    assert isinstance(network, ResNet)
    dynamic = {n for n, m in network.named_modules() if isinstance(m, DynamicLayer)}
    names = {n for n in network.state_dict() if 'attention' not in n and 'warehouse' not in n}
    assert names | {f'{n}.weight' for n in dynamic} == set(static.state_dict())
    assert 'layer1.0.conv1' not in dynamic and 'layer1.0.downsample.0' not in dynamic
    assert 'layer1.0.conv2' in dynamic and 'conv1' not in dynamic


VARIANTS = [
    dict(depth=18),
    dict(depth=50),
    dict(depth=18, deep_stem=True, avg_down=True),
    dict(depth=50, style='caffe'),
    dict(depth=18, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    dict(depth=18, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(1, 2)),
    dict(depth=18, norm_cfg=dict(type='GN', num_groups=2)),
    dict(
        depth=50,
        plugins=[dict(cfg=dict(type='ContextBlock', ratio=1 / 4), position='after_conv3')],
    ),
    dict(depth=18, drop_path_rate=0.2, cell_num_ratio=[1, 2, 1, 4]),
    dict(depth=18, cell_num_ratio=0.5, nonlocal_basis_ratio=0.5, **HALF),
]


@pytest.mark.parametrize('arguments', VARIANTS, ids=str)
def test_every_argument_of_the_static_network_works(arguments):
    from mmdet.models import ResNet

    ours = ('drop_path_rate', 'cell_num_ratio', 'nonlocal_basis_ratio', *HALF)
    static = ResNet(base_channels=8, **{k: v for k, v in arguments.items() if k not in ours})
    network = KWResNet(base_channels=8, norm_eval=False, **arguments)
    x = torch.randn(2, 3, 64, 64)
    outputs = network(x)
    assert [o.shape for o in outputs] == [o.shape for o in static(x)]
    sum(o.square().mean() for o in outputs).backward()
    assert not [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
    network.init_weights()


def test_deformable_convolutions_stay_deformable():
    network = KWResNet(
        50,
        base_channels=8,
        dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    )
    assert isinstance(network.layer1[1].conv2, DynamicLayer)
    assert not isinstance(network.layer2[1].conv2, DynamicLayer)
    assert network(torch.randn(1, 3, 64, 64))[-1].shape == (1, 256, 2, 2)


@pytest.mark.parametrize('frozen', [-1, 0, 1, 2, 4])
def test_frozen_stages(frozen):
    network = KWResNet(**THIN, frozen_stages=frozen)
    network.train()
    for stage in range(1, 5):
        layer = getattr(network, f'layer{stage}')
        expected = stage > frozen
        assert {p.requires_grad for p in layer.parameters()} == {expected}
        if not expected:
            assert not any(m.training for m in layer.modules())
    # The first block of a stage uses the warehouse of the stage before.
    trainable = [w.requires_grad for w in network.warehouse_manager.weights]
    expected = [stage > frozen or (stage == frozen and stage < 4) for stage in range(1, 5)]
    assert trainable == expected


def test_norm_eval_covers_the_norms_of_the_attentions():
    network = KWResNet(**THIN, norm_eval=True)
    network.train()
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    attentions = [m for m in network.modules() if isinstance(m, Attention)]
    assert len(norms) > len(attentions) > 0
    assert not any(norm.training for norm in norms)
    assert all(attention.training for attention in attentions)
    network = KWResNet(**THIN, norm_eval=False)
    network.train()
    assert all(m.training for m in network.modules() if isinstance(m, _BatchNorm))


@pytest.mark.parametrize('drop_path_rate', [0, 0.5])
@pytest.mark.parametrize('copier', [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_with_cp_changes_memory_only(drop_path_rate, copier):
    x = torch.randn(2, 3, 32, 32)
    gradients, calls = [], []
    for with_cp in (False, True):
        torch.manual_seed(1)
        network = copier(KWResNet(**THIN, drop_path_rate=drop_path_rate, with_cp=with_cp))
        network.train()
        network.layer4[1].conv1.register_forward_hook(lambda *_, on=with_cp: calls.append(on))
        torch.manual_seed(1)
        sum(o.square().mean() for o in network(x)).backward()
        gradients.append({n: p.grad for n, p in network.named_parameters()})
    assert calls == [False, True, True]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_drop_path_drops_whole_branches_while_training():
    network = KWResNet(**THIN, drop_path_rate=0.9, norm_eval=True)
    rates = [b.drop_path.drop_prob for n in network.res_layers for b in getattr(network, n)]
    assert rates == pytest.approx([0.9 * i / 7 for i in range(8)])
    x = torch.randn(64, 8, 4, 4).repeat(1, 8, 1, 1)
    block = network.layer4[1].train()
    network.layer4[1].bn2.eval()
    nn.init.ones_(block.bn2.weight)
    unchanged = (block(x) == x.relu()).flatten(1).all(1)
    assert 40 < unchanged.sum() < 64
    torch.testing.assert_close(block.eval()(x), block(x))
    assert copy.deepcopy(network).layer4[1].drop_path.drop_prob == pytest.approx(0.9)
    twin = copy.deepcopy(block).train()
    hook = next(iter(twin.bn2._forward_hooks.values()))
    assert hook is twin.drop_path


@pytest.mark.parametrize('tau', [0, 0.3, 1])
def test_shared_attention_with_a_nonlocal_basis_equals_plain_loops(tau):
    """Every layer of a network with a basis, at its own place in the warehouse."""
    network = KWResNet(
        18, base_channels=16, cell_num_ratio=0.5, nonlocal_basis_ratio=1 / 16, **HALF
    )
    network.double().eval()
    set_temperature(network, tau)
    for name, tensor in network.state_dict().items():
        if name.endswith('basis_bias'):
            tensor.normal_()
    for partition in network.warehouse_manager.partitions:
        start = 0
        for share in partition.layers:
            layer = network.get_submodule(share.kernel.layer)
            state = {k: v.numpy() for k, v in layer.attention.state_dict().items()}
            mixtures = share.num_mixtures
            pooled = torch.randn(2, layer.in_channels, dtype=torch.double)
            expected = plain.attention(
                pooled.numpy(), state, '', mixtures, partition.num_cells, start, 0.5, tau
            )
            alpha = layer.attention(pooled)
            np.testing.assert_allclose(alpha.detach().numpy(), expected, atol=1e-12)
            _, start = plain.one_to_one(start, mixtures, 0.5)
        assert start == partition.num_cells


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_the_static_network_is_the_current_library_s(scope):
    pytest.importorskip(scope)
    with DefaultScope.overwrite_default_scope(scope):
        assert type(KWResNet(**THIN)).__module__.startswith(f'{scope}.')


@pytest.mark.parametrize('rate', [-0.1, 1])
def test_drop_path_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match=rf'drop_path_rate must be in \[0, 1\), got {rate}'):
        KWResNet(**THIN, drop_path_rate=rate)
    with pytest.raises(ValueError, match=rf'drop_path_rate must be in \[0, 1\), got {rate}'):
        KWResNet(**THIN, drop_path_rate=[0.1] * 7 + [rate])


def test_drop_path_rate_may_be_one_per_block():
    rates = (0.1, 0.3, 0, 0, 0.1, 0.2, 0.1, 0)
    network = KWResNet(**THIN, drop_path_rate=rates)
    blocks = [block for name in network.res_layers for block in getattr(network, name)]
    assert [block.drop_path.drop_prob for block in blocks] == list(rates)
    assert not hasattr(KWResNet(**THIN, drop_path_rate=[0] * 8).layer4[1], 'drop_path')
    with pytest.raises(ValueError, match='drop_path_rate has 16 values, the network 8 blocks'):
        KWResNet(**THIN, drop_path_rate=[0.1] * 16)
    for wrong in ('0.1', None, True, [0.1] * 7 + ['0.1']):
        with pytest.raises(TypeError, match='drop_path_rate must be a number, or one for every'):
            KWResNet(**THIN, drop_path_rate=wrong)


@pytest.mark.parametrize('kind', [ResNet, KWResNet])
@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(num_stages=5), 'num_stages must be 1, 2, 3 or 4, got 5'),
        (dict(num_stages='4'), "num_stages must be 1, 2, 3 or 4, got '4'"),
        (dict(out_indices=(4,)), r'out_indices must be a tuple of numbers from 0 to 3, got \(4,\)'),
        (dict(out_indices=[[1]]), r'out_indices must be a tuple .*, got \[\[1\]\]'),
        (dict(out_indices=3), 'out_indices must be a tuple of numbers from 0 to 3, got 3'),
        (
            dict(num_stages=3, out_indices=(0, 3), strides=(1, 2, 2), dilations=(1, 1, 1)),
            r'out_indices must be a tuple of numbers from 0 to 2, got \(0, 3\)',
        ),
        (dict(frozen_stages=5), 'frozen_stages must be a whole number from -1 to 4, got 5'),
        (dict(frozen_stages=-2), 'frozen_stages must be a whole number from -1 to 4, got -2'),
        (dict(frozen_stages='1'), "frozen_stages must be a whole number from -1 to 4, got '1'"),
        (dict(frozen_stages=True), 'frozen_stages must be a whole number from -1 to 4, got True'),
    ],
)
def test_stages_that_are_not_there_are_refused(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(18, **wrong)


def test_budget_that_does_not_come_out_is_refused():
    with pytest.raises(PlanError, match=r"Warehouse 'stage1': cell_num_ratio=1.5 gives"):
        KWResNet(**THIN, cell_num_ratio=1.5)
    with pytest.raises(PlanError, match='cell_num_ratio has 3 values'):
        KWResNet(**THIN, cell_num_ratio=[1, 1, 1])

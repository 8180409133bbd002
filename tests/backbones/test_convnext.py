"""ConvNeXt and KWConvNeXt: the table of the paper, arguments, freezing."""

import copy

import pytest
import torch

from mmkw.backbones import ConvNeXt, KWConvNeXt
from mmkw.layers import PlanError
from mmkw.layers.dynamic_layers import DynamicLayer

THIN = dict(arch=dict(depths=[1, 2, 1, 1], channels=[8, 16, 24, 32]))


def test_parameters_and_warehouses_of_the_paper():
    with torch.device('meta'):
        network = KWConvNeXt('tiny', out_indices=(3,))
    # The classifier's norm stands in for the output norm of the last stage.
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters + 768 * 1000 + 1000 == 39_370_674
    shapes = [tuple(weight.shape) for weight in network.warehouse_manager.weights]
    assert ' '.join(f'{n}x({o},{i})' for n, o, i, *_ in shapes) == (
        '16x(96,3) 4x(192,96) 4x(384,192) 4x(768,384) 147x(96,1) 24x(96,96) 147x(192,1) '
        '24x(192,192) 441x(384,1) 72x(384,384) 147x(768,1) 24x(768,768)'
    )


@pytest.mark.parametrize(
    'arch, millions', [('tiny', 28.6), ('small', 50.2), ('base', 88.6), ('large', 197.8)]
)
def test_static_parameters_of_the_convnext_paper(arch, millions):
    with torch.device('meta'):
        network = ConvNeXt(arch, out_indices=(3,))
    width = network.norm3.weight.numel()
    parameters = sum(p.numel() for p in network.parameters()) + width * 1000 + 1000
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize('build', [ConvNeXt, KWConvNeXt])
@pytest.mark.parametrize('with_cp', [False, True])
def test_outputs_and_gradients(build, with_cp):
    network = build(**THIN, drop_path_rate=0.2, layer_scale_init_value=1.0, with_cp=with_cp)
    network.init_weights()
    network.train()
    outs = network(torch.randn(2, 3, 64, 96))
    assert [tuple(o.shape) for o in outs] == [
        (2, 8, 16, 24),
        (2, 16, 8, 12),
        (2, 24, 4, 6),
        (2, 32, 2, 3),
    ]
    sum(o.square().mean() for o in outs).backward()
    assert not [n for n, p in network.named_parameters() if p.grad is None]


def test_every_convolution_is_dynamic_and_keeps_its_name():
    network, static = KWConvNeXt(**THIN), ConvNeXt(**THIN)
    assert not [m for m in network.modules() if type(m) is torch.nn.Conv2d]
    dynamic = [n for n, m in network.named_modules() if isinstance(m, DynamicLayer)]
    names = {n for n in network.state_dict() if 'attention' not in n and 'warehouse' not in n}
    assert names | {f'{n}.weight' for n in dynamic} == set(static.state_dict())
    assert 'stages.0.0.dwconv.attention.fc1.bias' in network.state_dict()


@pytest.mark.parametrize('frozen', [-1, 0, 1, 4])
def test_frozen_stages(frozen):
    network = KWConvNeXt(**THIN, frozen_stages=frozen).train()
    for stage in range(4):
        trainable = {p.requires_grad for p in network.stages[stage].parameters()}
        assert trainable == {stage >= frozen}
        assert network.stages[stage].training == (stage >= frozen)
    weights = network.warehouse_manager.weights
    # The stem, three downsampling convolutions, then two warehouses a stage.
    expected = [frozen < 0] + [frozen <= i for i in (1, 2, 3)]
    expected += [frozen <= i for i in range(4) for _ in range(2)]
    assert [w.requires_grad for w in weights] == expected


def test_layer_scale_and_out_indices():
    network = ConvNeXt(**THIN, layer_scale_init_value=0, out_indices=(1, 3))
    assert network.stages[0][0].gamma is None
    assert len(network(torch.randn(1, 3, 32, 32))) == 2
    assert not hasattr(network, 'norm0')
    twin = copy.deepcopy(KWConvNeXt(**THIN, with_cp=True))
    assert twin.stages[0][0].forward.args[0] is twin.stages[0][0]


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(arch='huge'), "arch must be one of .*got 'huge'"),
        (dict(arch=dict(depths=[1], channels=[8, 8])), 'arch must be dict'),
        (dict(out_indices=(4,)), r'out_indices must be a tuple of numbers from 0 to 3, got \(4,\)'),
        (dict(frozen_stages=5), 'frozen_stages must be a whole number from -1 to 4, got 5'),
        (dict(drop_path_rate=1.0), r'drop_path_rate must be in \[0, 1\), got 1.0'),
        (dict(drop_path_rate=[0.1]), r'drop_path_rate has 1 values, the network \d+ blocks'),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvNeXt(**arguments)


def test_ratios_per_warehouse():
    ratios = [1] * 4 + [2, 1] * 4
    network = KWConvNeXt(**THIN, cell_num_ratio=ratios)
    assert [p.options.cell_num_ratio for p in network.warehouse_manager.partitions] == ratios
    with pytest.raises(PlanError, match='reduction has 2 values'):
        KWConvNeXt(**THIN, reduction=[1 / 16, 1 / 8])

"""Plans and conversion on a small network of no known family; and every refusal."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mmkw.checkpoints import CheckpointMismatchError
from mmkw.layers import KernelShape, KWConv2d, KWLinear, PlanError
from mmkw.sharing import SharingPlan, convert


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU())
        self.c = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.up = nn.ConvTranspose2d(16, 16, 2)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.up(self.c(self.b(self.a(self.stem(x)))))
        return self.head(x.mean((2, 3)))


LAYERS = [('a', 'body'), ('b.0', 'body'), ('c', 'depthwise'), ('head', 'head')]


def converted(**options):
    return convert(Net(), SharingPlan.make(LAYERS, **options))


def test_layers_of_a_warehouse_share_its_cells():
    net = converted(cell_num_ratio=[2, 1, 4])
    assert isinstance(net.a, KWConv2d) and isinstance(net.head, KWLinear)
    assert net.a.cells is net.b[0].cells is net.warehouse_manager.weights[0]
    shapes = [tuple(weight.shape) for weight in net.warehouse_manager.weights]
    assert shapes == [(2 * (9 + 2), 8, 8, 1, 1), (9, 16, 1, 1, 1), (4, 4, 16, 1)]
    names = [name for name, _ in net.named_parameters()]
    assert names[-3:] == [f'warehouse_manager.weights.{i}' for i in range(3)]
    assert len(names) == len(set(names))
    assert not [name for name in names if 'warehouse' in name and not name.startswith('warehouse')]
    assert net(torch.randn(2, 3, 6, 6)).shape == (2, 4)


def test_other_names_biases_and_modes_stay():
    static = Net().double().eval()
    bias = static.a.bias
    net = convert(static, SharingPlan.make(LAYERS))
    assert net.a.bias is bias and net.c.bias is None
    assert {p.dtype for p in net.parameters()} == {torch.double}
    assert not any(
        module.training for module in net.modules() if module is not net.warehouse_manager
    )
    kept = [n for n in Net().state_dict() if n not in ('a.weight', 'b.0.weight', 'c.weight')]
    assert set(kept) - {'head.weight'} <= set(net.state_dict())


def test_frozen_layers_freeze_a_warehouse_only_together():
    static = Net()
    static.a.requires_grad_(False)
    static.head.requires_grad_(False)
    net = convert(static, SharingPlan.make(LAYERS))
    assert not any(p.requires_grad for p in net.a.parameters())
    assert all(p.requires_grad for p in net.b.parameters())
    assert [w.requires_grad for w in net.warehouse_manager.weights] == [True, True, False]


def test_one_layer_at_several_places_stays_one():
    net = Net()
    net.b.again = net.a
    convert(net, SharingPlan.make(LAYERS))
    assert net.b.again is net.a and isinstance(net.a, KWConv2d)


@pytest.mark.parametrize('copier', [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_share_within_but_not_with_the_original(copier):
    net = converted().eval()
    twin = copier(net)
    assert twin.a.cells is twin.b[0].cells is twin.warehouse_manager.weights[0]
    assert twin.a.cells is not net.a.cells
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(twin(x), net(x), rtol=0, atol=0)
    with torch.no_grad():
        twin.warehouse_manager.weights[0].zero_()
    assert not torch.equal(twin(x), net(x))


def test_state_dict_and_dtype_round_trip():
    net, twin = converted().eval(), converted().eval()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(twin(x), net(x), rtol=0, atol=0)
    assert net.double().a.cells.dtype == torch.double
    assert net(x.double()).dtype == torch.double


def test_every_parameter_receives_a_gradient():
    net = converted(cell_num_ratio=2)
    net(torch.randn(4, 3, 6, 6)).square().mean().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]


@pytest.mark.parametrize(
    'layers, message',
    [
        ([], 'The plan names no layer'),
        ([('a', 'w'), ('a', 'v')], "layers more than once: a in 'w', a in 'v'"),
        ([('a', 'w'), ('d', 'v')], "Warehouse 'v', layer 'd': Net has no such layer"),
        (
            [('up', 'w')],
            "Warehouse 'w', layer 'up' is a ConvTranspose2d, which has no dynamic twin",
        ),
        ([('b', 'w')], "Warehouse 'w', layer 'b' is a Sequential"),
        ([('twin', 'w'), ('a', 'w')], "layer 'a' is the same module as layer 'twin'"),
        ([('a', 'w'), ('head', 'w')], r"Warehouse 'w': kernels of different dimension"),
    ],
)
def test_impossible_plans_are_refused_and_change_nothing(layers, message):
    net = Net()
    net.twin = net.a
    before = list(net.state_dict())
    with pytest.raises(PlanError, match=message):
        convert(net, SharingPlan.make(layers))
    assert list(net.state_dict()) == before


def test_options_of_a_wrong_length_are_refused():
    message = (
        r"cell_num_ratio has 2 values \[1, 2\] for 3 warehouses \['body', 'depthwise', 'head'\]"
    )
    with pytest.raises(PlanError, match=message):
        SharingPlan.make(LAYERS, cell_num_ratio=[1, 2])


def test_unknown_options_are_refused():
    with pytest.raises(PlanError, match="Unknown warehouse option 'budget'"):
        SharingPlan.make(LAYERS, budget=2)


def test_converting_twice_is_refused():
    with pytest.raises(PlanError, match='it is converted'):
        convert(converted(), SharingPlan.make([('stem', 'w')]))


def test_a_parametrized_layer_is_refused():
    net = Net()
    nn.utils.parametrizations.weight_norm(net.a)
    with pytest.raises(PlanError, match="layer 'a' is a ParametrizedConv2d"):
        convert(net, SharingPlan.make(LAYERS))


class Chain(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth)))

    def forward(self, x):
        return self.layers(x)


def test_an_absent_layer_keeps_its_cells():
    """A network without its last layer has the warehouse of the whole one."""
    plan = SharingPlan.make([(f'layers.{i}', 'all') for i in range(3)])
    absent = KernelShape('layers.2', 8, 8, (3, 3))
    whole, part = convert(Chain(3), plan), convert(Chain(2), plan, absent=[absent])
    assert [len(weight) for weight in part.warehouse_manager.weights] == [27]
    state = whole.state_dict()
    part.load_state_dict({k: v for k, v in state.items() if not k.startswith('layers.2')})
    x = torch.randn(2, 8, 5, 5)
    whole.eval()
    part.eval()
    torch.testing.assert_close(part(x), whole.layers[:2](x))
    with pytest.raises(PlanError, match="All layers of warehouse 'all' are absent"):
        convert(Chain(2), SharingPlan.make([('layers.2', 'all')]), absent=[absent])


def test_files_of_a_layer_that_stays_static():
    """A dynamic file has no kernel for it, a static one has."""
    plan = SharingPlan.make([(f'layers.{i}', 'all') for i in range(3)])
    static, whole = Chain(3), convert(Chain(3), plan)
    part = convert(Chain(3), plan, absent=[KernelShape('layers.2', 8, 8, (3, 3))])
    assert type(part.layers[2]) is nn.Conv2d
    with pytest.raises(
        CheckpointMismatchError, match=r'layers\.2\.weight of this Chain .* lacks it'
    ):
        part.load_state_dict(whole.state_dict())
    part.load_state_dict(static.state_dict())
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(part.eval()(x), static.eval()(x))


@pytest.mark.parametrize('absent', [5, None, 'a', ['layers.2'], {KernelShape('b', 8, 8, (3, 3))}])
def test_what_is_absent_must_be_kernels(absent):
    network = Chain(3)
    with pytest.raises(TypeError, match=r'absent must be the KernelShapes of planned layers, besi'):
        convert(network, SharingPlan.make([('layers.0', 'all')]), absent=absent)
    assert not hasattr(network, 'warehouse_manager')


def test_without_a_plan_nothing_is_named_absent():
    """The rule of the family knows it: what is named would be ignored."""
    network = Chain(3)
    with pytest.raises(TypeError, match="Without a plan the rule of the network's family knows"):
        convert(network, absent=[KernelShape('layers.2', 8, 8, (3, 3))])
    assert not hasattr(network, 'warehouse_manager')


@pytest.mark.parametrize('norm', [{}, [], 0, '', False, 'LN', {'type': 'BN2d'}])
def test_the_norm_of_attentions_is_one_that_is_known(norm):
    """Nothing but None stands for the network's own."""
    network = Chain(3)
    with pytest.raises(ValueError, match='attention_norm_cfg must be such as'):
        convert(network, SharingPlan.make([('layers.0', 'all')]), attention_norm_cfg=norm)
    assert not hasattr(network, 'warehouse_manager')
    with pytest.raises(ValueError, match='attention_norm_cfg must be such as'):
        KWConv2d(8, 8, 3, attention_norm_cfg=norm)


def test_a_sequential_is_refused():
    with pytest.raises(PlanError, match='is a Sequential, which would count its warehouses'):
        convert(nn.Sequential(nn.Conv2d(8, 8, 3)), SharingPlan.make([('0', 'all')]))


def test_a_plan_that_is_refused_leaves_no_hooks():
    """But that fused projections are split, which keeps what the network computes."""
    network = nn.Module()
    network.a = nn.Conv2d(8, 8, 3)
    hooks = len(network._load_state_dict_pre_hooks), len(network._forward_pre_hooks)
    for plan in (
        SharingPlan.make([('a', 'one')], cell_num_ratio=1.5),
        SharingPlan.make([('a', 'one'), ('b', 'one')]),
    ):
        with pytest.raises(PlanError):
            convert(network, plan)
    found = len(network._load_state_dict_pre_hooks), len(network._forward_pre_hooks)
    assert found == hooks and type(network.a) is nn.Conv2d and 'init_weights' not in vars(network)

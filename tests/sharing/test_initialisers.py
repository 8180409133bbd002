"""Initialisers do to a converted network what they do to the static one, and nothing else."""

import copy
import pickle

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn
from twin_networks import BACKBONES, HEADS, build

from mmkw.layers import KWConv2d, KWLinear, LayerAttention, StandsForStatic
from mmkw.layers.attention import Attention
from mmkw.sharing import SharingPlan, convert
from mmkw.sharing.families import is_of_the_paper
from mmkw.sharing.value_projection import SplitProjection


def kernels_and_biases(network):
    """Of a static network, or of the static twins of a dynamic one, by name."""
    found = {}
    for name, module in network.named_modules():
        if any(name.startswith(f'{place}.') for place in found.get('twins', ())):
            continue
        if isinstance(module, StandsForStatic):
            found.setdefault('twins', []).append(name)
            for part, parameter in module.static_twin().named_parameters():
                found[f'{name}.{part}'] = parameter.detach().clone()
        elif 'warehouse_manager' not in name:
            for part, parameter in module.named_parameters(recurse=False):
                found[f'{name}.{part}'.lstrip('.')] = parameter.detach().clone()
    found.pop('twins', None)
    return found


def attentions(network):
    return {
        f'{place}.{name}': tensor.clone()
        for place, attention in network.named_modules()
        if isinstance(attention, Attention)
        for name, tensor in attention.state_dict().items()
    }


def changes(network, initialise):
    """The parameters that an initialiser sets, with their new values."""
    before = kernels_and_biases(network)
    torch.manual_seed(1)
    initialise(network)
    after = kernels_and_biases(network)
    return {name: after[name] for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize('kind', [*BACKBONES, *HEADS])
def test_init_weights(kind):
    static, dynamic = build(kind, False), build(kind, True)
    kept = attentions(dynamic)
    assert kept
    expected = changes(static, lambda network: network.init_weights())
    found = changes(dynamic, lambda network: network.init_weights())
    if is_of_the_paper(static):
        # The cells of these start as released, whatever becomes of static kernels.
        names = {
            f'{name}.weight'
            for name, module in dynamic.named_modules()
            if isinstance(module, StandsForStatic)
        }
        assert not names & set(found)
        expected = {name: value for name, value in expected.items() if name not in names}
    # Biases are made at random, also where an initialiser then sets what was there.
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert all(torch.equal(tensor, kept[name]) for name, tensor in attentions(dynamic).items())
    assert not [m for m in dynamic.modules() if hasattr(m, '_params_init_info')]


class Outer(BaseModule):
    """Of a head with initialisers of its own, which holds a part that may be converted."""

    def __init__(self, inner, init_cfg):
        super().__init__(init_cfg)
        self.inner = inner
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.inner(x))


class Inner(nn.Module):
    def __init__(self, kind=nn.Conv2d, linear=nn.Linear):
        super().__init__()
        self.first = kind(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = kind(8, 8, 3, padding=1, groups=2)
        self.map = linear(8, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        y = self.map(self.second(self.norm(self.first(x))).flatten(2).transpose(1, 2))
        return self.attend(y, y, y)[0].transpose(1, 2).unflatten(2, x.shape[2:])


def converted():
    names = ['first', 'second', 'map', 'attend.value']
    plan = SharingPlan.make([(name, name) for name in names], cell_num_ratio=2)
    return convert(Inner(), plan)


INITIALISERS = {
    'Normal': dict(type='Normal', layer=['Conv2d', 'Linear'], std=0.3, bias=0.5),
    'Conv2d': dict(type='Xavier', layer='Conv2d', bias=0.25),
    'Linear': dict(type='TruncNormal', layer='Linear', std=0.1),
    'BatchNorm2d': dict(type='Constant', layer='BatchNorm2d', val=3.0),
    'BatchNorm1d': dict(type='Constant', layer='BatchNorm1d', val=3.0),
    'override': dict(
        type='Constant', layer='GroupNorm', val=1, override=dict(type='Xavier', name='inner')
    ),
}


@pytest.mark.parametrize('kind', INITIALISERS)
@pytest.mark.parametrize('make', [converted, lambda: Inner(KWConv2d, KWLinear)])
def test_initialisers_of_what_is_around(kind, make):
    cfg = INITIALISERS[kind]
    if kind == 'override':
        # The norm has a weight of one dimension, which has no fan.
        static = Outer(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(8, 8)), cfg)
        dynamic = Outer(nn.Sequential(KWConv2d(4, 8, 3), KWLinear(8, 8)), cfg)
    else:
        static, dynamic = Outer(Inner(), cfg), Outer(make(), cfg)
    kept = attentions(dynamic)
    expected = changes(static, lambda network: network.init_weights())
    found = changes(dynamic, lambda network: network.init_weights())
    assert set(found) == set(expected) and bool(expected) == (kind != 'BatchNorm1d')
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in attentions(dynamic).items())


def test_other_functions_reach_what_is_in_a_dynamic_layer():
    """As one that sets norms to evaluation, or counts, or freezes."""
    network = converted()

    def still(module):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()

    network.train().apply(still)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 5 and not any(norm.training for norm in norms)
    seen = set()
    network.apply(seen.add)
    assert set(network.modules()) <= seen
    network.apply(lambda module: module.requires_grad_(False))
    assert not [n for n, p in network.named_parameters() if p.requires_grad]


@pytest.mark.parametrize('dynamic', [False, True])
def test_a_reset_leaves_nothing_that_was_learnt(dynamic):
    """As between the folds of a cross-validation."""
    layers = [nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(32 * 9, 32)]
    network = nn.Module()
    network.inner = nn.Sequential(*layers)
    if dynamic:
        convert(network, SharingPlan.make([('inner.0', 'a'), ('inner.3', 'b')]))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        network.inner(torch.randn(4, 32, 5, 5)).square().mean().backward()
        optimizer.step()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.apply(lambda m: m.reset_parameters() if hasattr(m, 'reset_parameters') else None)
    after = network.state_dict()
    assert not [name for name in after if torch.equal(before[name], after[name])]


class Freezing(BaseModule):
    """Freezes, and sets to evaluation, while it starts its weights."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def init_weights(self):
        for module in (self.inner.first, self.inner.attend):
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad = False

    def forward(self, x):
        return self.inner(x)


def test_freezing_in_init_weights():
    names = ['inner.first', 'inner.second', 'inner.attend.value']
    network = convert(Freezing(), SharingPlan.make([(name, name) for name in names]))
    network.train().init_weights()
    network(torch.randn(2, 4, 5, 5))
    inner = network.inner
    frozen = {id(p) for m in (inner.first, inner.attend) for p in m.parameters()}
    frozen |= {id(network.warehouse_manager.weights[index]) for index in (0, 2)}
    assert {id(p) for p in network.parameters() if not p.requires_grad} == frozen
    assert not inner.first.attention.norm1.training and inner.second.attention.norm1.training
    assert not inner.attend.value.attention.norm1.training


def test_copies_have_their_own():
    network = convert(Freezing(), SharingPlan.make([('inner.first', 'one')]))
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        copied.init_weights()
        assert not copied.inner.first.bias.requires_grad
    assert network.inner.first.bias.requires_grad


class TakesAll(BaseModule):
    """Starts every matrix alike, as the heads of DETR and of Sparse R-CNN do."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.after = nn.Linear(8, 8)

    def init_weights(self):
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x):
        return self.inner(x)


def test_no_warehouse_is_taken_for_a_kernel():
    static, network = TakesAll(), TakesAll()
    convert(network, SharingPlan.make([('inner.first', 'one')], cell_num_ratio=2))
    # After the warehouses: it is given the random numbers that come next.
    static.last, network.last = nn.Linear(2, 2), nn.Linear(2, 2)
    names = [name for name, _ in network.named_parameters()]
    kept = attentions(network)
    expected = changes(static, lambda network: network.init_weights())
    found = changes(network, lambda network: network.init_weights())
    assert set(found) == set(expected) and 'last.weight' in found
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in attentions(network).items())
    # Optimizers know parameters by their order.
    assert [name for name, _ in network.named_parameters()] == names


class Pretrained(BaseModule):
    """A part that starts from a file, as the backbone of a detector does."""

    def __init__(self, path):
        super().__init__(dict(type='Pretrained', checkpoint=str(path), prefix='backbone.'))
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        y = self.first(x).flatten(2).transpose(1, 2)
        return self.attend(y, y, y)[0].transpose(1, 2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize('ratio', [1, 2])
@pytest.mark.parametrize('tau', [0, 1])
def test_the_file_of_a_part_gives_a_warm_start(tau, ratio, tmp_path):
    """Also where a whole model is converted, of which the file is a part."""
    path = tmp_path / 'backbone.pth'
    static = Outer(Pretrained(path), dict(type='Normal', layer='Conv2d', std=0.1))
    state = static.inner.state_dict()
    torch.save({f'backbone.{name}': value for name, value in state.items()}, path)
    model = Outer(Pretrained(path), dict(type='Normal', layer='Conv2d', std=0.1))
    pairs = [('inner.first', 'one'), ('inner.attend.value', 'two'), ('last', 'three')]
    convert(model, SharingPlan.make(pairs, cell_num_ratio=ratio), start_tau=tau)
    kept = attentions(model)
    model.init_weights()
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model.inner(x), static.inner(x), rtol=1e-4, atol=1e-5)
    assert model.inner.first.attention.temperature == tau
    # What is not in the file is random, and stays so.
    last = {name: tensor for name, tensor in attentions(model).items() if name.startswith('last')}
    assert last and all(torch.equal(tensor, kept[name]) for name, tensor in last.items())
    assert 0.05 < model.last.static_twin().weight.std() < 0.2


def test_an_error_leaves_the_network_as_it_was():
    class Failing(Freezing):
        def init_weights(self):
            nn.init.zeros_(self.inner.first.weight)
            raise RuntimeError('no file')

    network = convert(Failing(), SharingPlan.make([('inner.first', 'one')]))
    cells = network.warehouse_manager.weights[0].clone()
    with pytest.raises(RuntimeError, match='no file'):
        network.init_weights()
    assert isinstance(network.inner.first, KWConv2d)
    assert torch.equal(network.warehouse_manager.weights[0], cells)


def test_a_fused_projection_stays_split():
    network = converted()
    assert isinstance(network.attend, SplitProjection)
    network.apply(lambda module: None)
    assert isinstance(network.attend, SplitProjection)


def test_an_initialiser_starts_fewer_cells_than_pieces_as_kernels_that_are_loaded_do():
    class Net(BaseModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(2))

        def init_weights(self):
            for layer, kernel in zip((self.a, self.b), kernels):
                layer.weight.data.copy_(kernel)

        def forward(self, x):
            return self.b(self.a(x))

    options = dict(cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)
    plan = SharingPlan.make([('a', 'one'), ('b', 'one')], **options)
    # Kernels that half of the cells hold: what is not lost here is lost by the start.
    bases = torch.randn(4, 16, 16)
    kernels = [(torch.randn(9 * 4, 4) @ bases.flatten(1)).view(3, 3, 2, 2, 16, 16) for _ in 'ab']
    kernels = [k.permute(2, 4, 3, 5, 0, 1).reshape(32, 32, 3, 3) / 50 for k in kernels]
    network = convert(Net(), plan)
    network.init_weights()
    x = torch.randn(2, 32, 9, 9)
    with torch.no_grad():
        found = network.eval()(x)
        expected = nn.functional.conv2d(x, kernels[0], padding=1)
        expected = nn.functional.conv2d(expected, kernels[1], padding=1)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


RANDOM = {
    'KWResNet': ('ResNet', dict(depth=18, base_channels=8)),
    'KWMobileNetV2': ('MobileNetV2', dict(widen_factor=0.5)),
    'KWConvNeXt': ('ConvNeXt', dict(arch=dict(depths=[1] * 4, channels=[8, 16, 24, 32]))),
    'KWModule': ('ResNet', dict(depth=18, base_channels=8)),
}


@pytest.mark.parametrize('method', ['kernelwarehouse', 'dyconv'])
@pytest.mark.parametrize('kind', RANDOM)
def test_training_from_scratch_may_begin_as_the_static_network_does(kind, method):
    """With its random kernels, before and after they are initialised, and at temperature 0."""
    static, arguments = RANDOM[kind]
    if kind != 'KWConvNeXt':
        pytest.importorskip('mmdet', reason='the networks are its')
    wrapped = dict(type=f'mmkw.{static}', **arguments)
    config = dict(module=wrapped) if kind == 'KWModule' else dict(arguments)
    config = dict(config, type=f'mmkw.{kind}', method=method, cell_num_ratio=2)
    made = []
    for options in (wrapped, dict(config, keep_weights=True), config):
        torch.manual_seed(0)
        made.append(MODELS.build(options))
    twin, network, _ = made
    x = torch.randn(2, 3, 64, 64)
    for tolerance in (1e-5, 1e-2):
        found = []
        for each in made:
            each.eval()
            with torch.no_grad():
                found.append(each(x)[-1])
        scale = found[0].abs().max()
        assert (found[1] - found[0]).abs().max() < tolerance * scale
        assert (found[2] - found[0]).abs().max() > 1e-2 * scale
        for each in (twin, network):
            torch.manual_seed(1)
            each.init_weights()
    assert {a.temperature for a in network.modules() if isinstance(a, LayerAttention)} == {0}
    # Its attentions learn.
    network.train()
    network(x)[-1].square().mean().backward()
    learn = [p.grad for name, p in network.named_parameters() if 'attention' in name]
    assert any(grad is not None and grad.abs().max() > 0 for grad in learn)

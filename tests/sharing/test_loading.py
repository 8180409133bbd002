"""Nothing is half loaded: a model with several converted parts takes a file whole or not at all."""

import copy
import pickle

import pytest
import torch
from mmengine.runner import load_state_dict
from torch import nn

from mmkw.checkpoints import CheckpointMismatchError, DamagedCheckpointError
from mmkw.sharing import SharingPlan, convert, is_converted


class Part(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3)
        self.b = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.b(self.a(x))


def part(dynamic, ratio=1):
    network = Part()
    if dynamic:
        convert(network, SharingPlan.make([('a', 'one'), ('b', 'two')], cell_num_ratio=ratio))
    return network


class Model(nn.Module):
    """A static part, and two converted ones at different depths."""

    def __init__(self, dynamic=True, ratio=1):
        super().__init__()
        self.static = nn.Conv2d(3, 8, 1)
        self.backbone = part(dynamic)
        self.heads = nn.ModuleDict(dict(first=nn.Sequential(part(dynamic, ratio))))

    def forward(self, x):
        return self.heads['first'](self.backbone(self.static(x)))


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def broken(kind):
    """State dicts whose last part does not fit."""
    if kind == 'static':
        state = Model(False).state_dict()
        state['heads.first.0.a.weight'] = torch.randn(8, 4, 3, 3)
    elif kind == 'damaged':
        state = Model(False).state_dict()
        state['heads.first.0.b.weight'][0] = torch.nan
    elif kind == 'budget':
        state = Model(ratio=2).state_dict()
    else:
        state = Model(False).state_dict()
        state = {k: v for k, v in state.items() if not k.startswith('heads')}
    return state


def wrapped(model):
    """As DistributedDataParallel holds it."""
    wrapper = nn.Module()
    wrapper.module = model
    return wrapper


@pytest.mark.parametrize('load', ['torch', 'mmengine'])
@pytest.mark.parametrize('kind', ['static', 'damaged', 'budget', 'lacking'])
@pytest.mark.parametrize(
    'change',
    [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), wrapped],
    ids=['as made', 'copied', 'pickled', 'wrapped'],
)
def test_all_or_nothing(load, kind, change):
    torch.manual_seed(0)
    model = change(Model())
    state = broken(kind)
    if change is wrapped:
        state = {f'module.{name}': value for name, value in state.items()}
    before = values(model)
    with pytest.raises((CheckpointMismatchError, DamagedCheckpointError)):
        if load == 'torch':
            model.load_state_dict(state, strict=False)
        else:
            load_state_dict(model, state, strict=False)
    after = values(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize('source', ['static', 'dynamic'])
def test_what_fits_is_loaded(source):
    torch.manual_seed(0)
    one, other = Model(source == 'dynamic'), Model()
    state = one.state_dict()
    names = list(state)
    other.load_state_dict(state)
    assert list(state) == names
    x = torch.randn(2, 3, 5, 5)
    one.eval()
    other.eval()
    torch.testing.assert_close(other(x), one(x), rtol=1e-4, atol=1e-5)


class ReadsNothing(Part):
    """As MMDetection's VFNetHead: the parameters are those of its parts."""

    def _load_from_state_dict(self, *args):
        pass


class Renames(Part):
    """As MMDetection's FCOSHead does with its older files."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in [name for name in state_dict if '.old_' in f'.{name}']:
            state_dict[name.replace('old_', '')] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


@pytest.mark.parametrize('load', ['torch', 'mmengine'])
@pytest.mark.parametrize('kind', [ReadsNothing, Renames])
@pytest.mark.parametrize('change', [lambda n: n, lambda n: pickle.loads(pickle.dumps(n))])
def test_a_network_that_reads_state_dicts_in_its_own_way(kind, change, load):
    static, network = kind(), kind()
    convert(network, SharingPlan.make([('a', 'one'), ('b', 'two')]))
    model, whole = nn.Module(), nn.Module()
    model.head, whole.head = change(network), static
    state = whole.state_dict()
    if kind is Renames:
        state = {name.replace('head.', 'head.old_'): value for name, value in state.items()}
    read = model.load_state_dict if load == 'torch' else lambda state: load_state_dict(model, state)
    read(state)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(model.head(x), static(x), rtol=1e-4, atol=1e-5)
    own = values(model)
    with pytest.raises(CheckpointMismatchError):
        read({name: value for name, value in own.items() if 'weights.1' not in name})
    read(own)


def test_is_converted():
    model = Model()
    parts = [name for name, module in model.named_modules() if is_converted(module)]
    assert parts == ['backbone', 'heads.first.0']
    assert not [name for name, module in Model(False).named_modules() if is_converted(module)]

"""Cells, kernels and attentions that no network can use: one error that names the tensor."""

import sys

import pytest
import torch
from command_util import run
from torch import nn

from mmkw import KWConv2d, SharingPlan, convert
from mmkw.backbones import rewrite_published
from mmkw.checkpoints import DamagedCheckpointError


class Static(nn.Module):
    """Two layers that share a warehouse once they are converted."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)


def dynamic():
    plan = SharingPlan.make([('first', 'one'), ('second', 'one')], cell_num_ratio=1)
    return convert(Static(), plan, dict(type='BN1d'))


def with_value(value):
    def replace(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return replace


FAULTS = {
    'NaN': (with_value(float('nan')), r'has 1 of \d+ values that are NaN or infinite'),
    'infinity': (with_value(float('-inf')), r'has 1 of \d+ values that are NaN or infinite'),
    'integers': (lambda t: t.int(), r'is of torch\.int32, not of real numbers'),
    'complex': (lambda t: t.to(torch.complex64), r'is of torch\.complex64'),
    'meta': (lambda t: t.to('meta'), 'is on the meta device'),
    'sparse': (lambda t: t.to_sparse(), 'is sparse'),
    'quantized': (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), 'is quantized'),
    'text': (lambda t: 'cells', 'is a str, not a tensor'),
    'nothing': (lambda t: None, 'is a NoneType, not a tensor'),
}
PLACES = {
    'cells': 'warehouse_manager.weights.0',
    'attention': 'second.attention.fc2.weight',
    'static kernel': 'second.weight',
}


@pytest.mark.filterwarnings('ignore:.*(quantize_per_tensor|deprecated).*')
@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('fault', FAULTS)
def test_a_tensor_that_cannot_be_used_is_named(fault, place):
    source = Static() if place == 'static kernel' else dynamic()
    state, name = source.state_dict(), PLACES[place]
    damage, message = FAULTS[fault]
    state[name] = damage(state[name])
    network = nn.ModuleDict(dict(backbone=dynamic()))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(DamagedCheckpointError, match=rf'backbone\.{name}\b.* {message}'):
        network.load_state_dict({f'backbone.{key}': value for key, value in state.items()})
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    # The static twin takes the undamaged file of the other and refuses what is no tensor.
    twin = Static()
    twin.load_state_dict(Static().state_dict())
    if place == 'static kernel' and fault in ('text', 'nothing'):
        with pytest.raises((RuntimeError, AttributeError)):
            twin.load_state_dict(state)


@pytest.mark.filterwarnings('ignore:.*(quantize_per_tensor|deprecated).*')
@pytest.mark.parametrize('name', ['warehouse_manager.weights.0', 'weight'])
@pytest.mark.parametrize('fault', FAULTS)
def test_a_layer_alone_names_it_too(fault, name):
    if (fault, name) == ('nothing', 'weight'):
        pytest.skip('no kernel at all: the layer looks for cells')
    source = nn.Conv2d(4, 4, 3) if name == 'weight' else KWConv2d(4, 4, 3)
    damage, message = FAULTS[fault]
    state = source.state_dict()
    state[name] = damage(state[name])
    with pytest.raises(RuntimeError, match=rf'conv\.{name}, .* {message}'):
        nn.ModuleDict(dict(conv=KWConv2d(4, 4, 3))).load_state_dict(
            {f'conv.{key}': value for key, value in state.items()}
        )


@pytest.mark.parametrize('index', ['00', '-1', '1.0', 'x', '\u0660', '0 '])
def test_an_index_that_no_warehouse_has(index):
    """``int`` reads most of these, and the cells would stay random."""
    state = dynamic().state_dict()
    state[f'warehouse_manager.weights.{index}'] = state.pop('warehouse_manager.weights.0')
    with pytest.raises(DamagedCheckpointError, match='is no name of a warehouse'):
        dynamic().load_state_dict(state, strict=False)


def test_cells_of_every_precision_load():
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        network = dynamic()
        network.load_state_dict({k: v.to(kind) for k, v in dynamic().state_dict().items()})
        assert network.warehouse_manager.weights[0].dtype == torch.float32


def test_a_network_without_memory_takes_cells_without_values():
    """As its static twin does."""
    with torch.device('meta'):
        for make in (dynamic, Static):
            make().load_state_dict(make().state_dict())


def published():
    state = {
        'warehouse_manager.weights.0': torch.ones(3, 4, 4, 1, 1),
        'conv1.weight': torch.ones(1),
    }
    return dict(state_dict=state)


def test_the_published_form_without_meta_is_converted(root, tmp_path):
    for meta in (None, 'x', []):
        torch.save(dict(published(), meta=meta), tmp_path / 'a.pth')
        out = tmp_path / f'out{len(str(meta))}.pth'
        result, output = run(root, sys.executable, '-m', 'mmkw', 'convert', tmp_path / 'a.pth', out)
        assert result.returncode == 0 and out.exists(), output


@pytest.mark.parametrize('fault', ['NaN', 'text'])
def test_the_converters_write_nothing(root, tmp_path, fault):
    damage, message = FAULTS[fault]
    checkpoint = published()
    assert rewrite_published(checkpoint)
    name = 'warehouse_manager.weights.0'
    checkpoint['state_dict'][name] = damage(checkpoint['state_dict'][name])
    torch.save(checkpoint, tmp_path / 'published.pth')
    static = dict(state_dict={'layer1.0.conv1.weight': damage(torch.ones(32, 32, 3, 3))})
    torch.save(static, tmp_path / 'static.pth')
    config = 'configs/demo/mask-rcnn_kw1x-r18_fpn_mini-coco.py'
    out = tmp_path / 'out.pth'
    for arguments in (
        [tmp_path / 'published.pth', out],
        [tmp_path / 'static.pth', out, '--config', config],
    ):
        result, output = run(root, sys.executable, '-m', 'mmkw', 'convert', *arguments)
        assert result.returncode == 2 and 'Traceback' not in output, output
        assert message.replace('\\d+', '').split()[0] in output and not out.exists()
        assert 'layer1.0.conv1.weight' in output or name in output


def test_numbers_beyond_the_network_are_named():
    """Finite in the file's precision, infinite in the network's."""
    for place in PLACES.values():
        state = (Static() if place == 'second.weight' else dynamic()).double().state_dict()
        state[place] = torch.full_like(state[place], 1e300)
        with pytest.raises(DamagedCheckpointError, match=r'NaN or infinite in torch\.float32'):
            dynamic().load_state_dict(state)
        dynamic().double().load_state_dict(state)


SHAPES = [(), (3,), (3, 4), (0, 4, 4, 1, 1), (2**34,), (18, 4, 4, 1)]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('place', PLACES)
def test_tensors_of_any_shape_are_refused_by_it(place, shape):
    """Expanded ones without looking at their values, of which there may be any number."""
    state = (Static() if place == 'static kernel' else dynamic()).state_dict()
    state[PLACES[place]] = torch.ones(1).expand(shape) if shape else torch.tensor(1.0)
    with pytest.raises(RuntimeError, match=r'shape|has|kernel'):
        dynamic().load_state_dict(state)


def test_counters_are_whole():
    state = dynamic().state_dict()
    (name,) = [name for name in state if name.startswith('first') and 'num_batches' in name]
    for value in (torch.tensor(1.5), torch.tensor(1j), torch.tensor(float('nan')), 'x'):
        with pytest.raises(DamagedCheckpointError, match='is no tensor of whole numbers'):
            dynamic().load_state_dict({**state, name: value})


def test_names_of_any_length_and_kind_are_refused():
    state = dynamic().state_dict()
    cells = state.pop('warehouse_manager.weights.0')
    name = f'warehouse_manager.weights.{"9" * 5000}'
    with pytest.raises(DamagedCheckpointError, match='is no name of a warehouse') as error:
        dynamic().load_state_dict({**state, name: cells})
    assert len(str(error.value)) < 1000

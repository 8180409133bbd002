"""Hostile files of every kind, through the reader: refused, nothing run, nothing altered."""

import pickle
import pickletools

import hostile
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmkw import KWConv2d
from mmkw.checkpoints import (
    DamagedCheckpointError,
    UnsafeCheckpointError,
    containers,
    read_checkpoint,
)

KINDS = sorted(hostile.payloads('made'))
# Pickles whose only fault is that they hold no data, though all that they name is known.
NO_DATA = {
    'an extension', 'an old instance', 'another codec',
    'memory', 'attributes of histories', 'attributes of parameters', 'the state of an array',
    'attributes of the class of tensors', 'slots of the class of tensors', 'a type with fields',
    'attributes by the type of a tensor', 'a history as a door', 'the globals of a statistic',
}  # fmt: skip


@pytest.fixture
def unaltered(tmp_path):
    """Compares the process before and after, and looks for what a payload would have made."""
    made = tmp_path / 'made'
    before = hostile.namespaces()
    yield made
    assert not made.exists()
    assert hostile.namespaces() == before


@pytest.mark.parametrize('write', hostile.FORMATS.values(), ids=hostile.FORMATS)
@pytest.mark.parametrize('kind', KINDS)
def test_a_hostile_file_is_refused(tmp_path, unaltered, kind, write):
    payload = hostile.payloads(unaltered)[kind]
    path = tmp_path / 'hostile.pth'
    expected = DamagedCheckpointError if kind in NO_DATA else UnsafeCheckpointError
    for pickled in (payload, hostile.inside(payload)):
        write(path, pickled)
        with pytest.raises(expected, match=r'^Checkpoint .*hostile\.pth ') as error:
            read_checkpoint(path)
        if expected is UnsafeCheckpointError:
            assert 'If you trust its source' in str(error.value)


def test_the_payloads_are_pickles():
    """Else they would be refused for the wrong reason."""
    for kind, payload in hostile.payloads('made').items():
        assert list(pickletools.genops(payload))[-1][0].name == 'STOP', kind


def test_pytorch_would_be_altered_if_it_were_asked(tmp_path):
    """The payloads do act where names are allowed, so the tests above can fail."""
    made = tmp_path / 'made'
    payload = hostile.payloads(made)
    hostile.zip_file(tmp_path / 'a.pth', hostile.inside(payload['a call']))
    torch.load(tmp_path / 'a.pth', weights_only=False)
    assert made.exists()
    hostile.zip_file(tmp_path / 'b.pth', hostile.inside(payload['a statistic under a new name']))
    before = hostile.namespaces()
    torch.load(tmp_path / 'b.pth', weights_only=False)
    assert hostile.namespaces() != before
    del HistoryBuffer._statistics_methods[hostile.MARK]


def test_all_unknown_names_are_listed(tmp_path):
    payload = hostile.payloads(tmp_path / 'made')
    both = b'\x80\x02' + payload['a call'][2:-1] + payload['NumPy loading'][2:-1] + b'\x86.'
    hostile.zip_file(tmp_path / 'a.pth', both)
    with pytest.raises(UnsafeCheckpointError, match=r'pickled objects \(numpy\.load, os\.mkdir\)'):
        read_checkpoint(tmp_path / 'a.pth')


def test_a_name_cannot_write_on_the_terminal(tmp_path):
    code = b'\x80\x02' + hostile.text('os') + hostile.text('\x1b[31mmkdir\n\ud7ff') + b'\x93.'
    hostile.zip_file(tmp_path / 'a.pth', code)
    with pytest.raises(UnsafeCheckpointError) as error:
        read_checkpoint(tmp_path / 'a.pth')
    assert str(error.value).isprintable() and str(error.value).isascii()


@pytest.mark.parametrize('write', hostile.FORMATS.values(), ids=hostile.FORMATS)
def test_what_is_too_deep_or_contains_itself_is_refused(tmp_path, unaltered, write):
    deep = b'(' * 5000 + b'N' + b't' * 5000
    parameters = hostile.name('torch.nn.parameter', 'Parameter') * 5000 + b'N' + b'\x85R' * 5000
    itself = b']q\x00h\x00a'
    through_a_dict = b'}q\x00' + hostile.text('a') + b'h\x00s'
    through_a_state = (
        hostile.name('collections', 'OrderedDict') + b')Rq\x00}'
        + hostile.text('_metadata') + b'h\x00sb'
    )  # fmt: skip
    for body in (deep, parameters, itself, through_a_dict, through_a_state):
        write(tmp_path / 'a.pth', b'\x80\x02}' + hostile.text('state_dict') + body + b's.')
        with pytest.raises(DamagedCheckpointError, match=r'deep|contains itself'):
            read_checkpoint(tmp_path / 'a.pth')


def test_what_is_shared_over_and_over_is_built_once(tmp_path):
    """60 lists of twice the one before: 2**60 leaves."""
    nested = []
    for _ in range(60):
        nested = [nested, nested]
    hostile.zip_file(tmp_path / 'a.pth', pickle.dumps(dict(x=nested), 2))
    value = read_checkpoint(tmp_path / 'a.pth')['x']
    for _ in range(60):
        assert value[0] is value[1]
        value = value[0]
    assert value == []


# Small files that would take long, or much memory, or end in errors of other libraries

NUMBERS = hostile.name('numpy', 'dtype')
SCALAR = hostile.name('numpy.core.multiarray', 'scalar')
HISTORY = hostile.name('mmengine.logging.history_buffer', 'HistoryBuffer') + b')R'
# 2**45 leaves, remembered as 1.
LEAVES = b'](]X\x01\0\0\0xaq\x01' + b'](h\x01h\x01eq\x01' * 45 + b'e'


def content(code):
    return b'B' + len(code).to_bytes(4, 'little') + code


def integer(number):
    return b'\x8a\x0a' + number.to_bytes(10, 'little')


def tensor(size, location='cpu', kind='FloatStorage'):
    def group(*parts):
        return b'(' + b''.join(parts) + b't'

    storage = group(
        hostile.text('storage'),
        hostile.name('torch', kind),
        hostile.text('0'),
        hostile.text(location),
        b'K\x04',
    )
    lengths, strides = group(*map(integer, size)), group(*[b'K\0'] * len(size))
    return (
        hostile.name('torch._utils', '_rebuild_tensor_v2')
        + group(storage + b'Q', b'K\0', lengths, strides, b'\x89', b'}')
        + b'R'
    )


BEYOND = {
    'text of many leaves as a type': LEAVES + SCALAR + NUMBERS + b'(h\x01tR' + content(b'x')
    + b'\x86R',
    'a deep type': SCALAR + NUMBERS + b'(' + b']' * 20000 + b'a' * 19999 + b'tR' + content(b'x')
    + b'\x86R',
    'text of many leaves as a statistic': LEAVES + HISTORY + b'}'
    + hostile.text('statistics_methods') + b'}h\x01Nssb',
    'a name of a megabyte': hostile.text('x' * 10**6) + b'q\x01(' + b'h\x01h\x01\x93' * 4000 + b't',
    'content copied over and over': content(b'x' * 10**6) + b'q\x01('
    + (hostile.name('builtins', 'bytearray') + b'h\x01\x85R') * 6000 + b't',
    'bytes copied over and over': hostile.text('x' * 10**6) + b'q\x01('
    + (hostile.name('_codecs', 'encode') + b'h\x01' + hostile.text('latin1') + b'\x86R') * 6000
    + b't',
    'numbers of one hash': b'\x8f(' + b''.join(integer(k * (2**61 - 1)) for k in range(60000))
    + b'\x90',
    'a type of no arguments': SCALAR + NUMBERS + b'K\x05R' + content(b'x') + b'\x86R',
    'a huge empty tensor': tensor((2**62, 2**62, 0)),
    'a huge expanded tensor': tensor((2**40,)),
    'a device beyond all': hostile.name('torch', 'device') + hostile.text('cpu')
    + integer(200) + b'\x86R',
    'a device far beyond all': hostile.name('torch', 'device') + hostile.text('cpu')
    + integer(2**70) + b'\x86R',
    'a storage of nowhere': tensor((1,), 'cpu:1'),
    'a storage of an odd device': tensor((1,), 'lazy'),
    'truth values of their own': tensor((4,), kind='BoolStorage'),
}  # fmt: skip


@pytest.mark.parametrize('kind', BEYOND)
def test_a_small_file_is_refused_soon(tmp_path, unaltered, kind):
    """Each took more than ten seconds, gigabytes, or an error of another library."""
    records = b'(' + BEYOND[kind] + b't'
    hostile.zip_file(
        tmp_path / 'a.pth',
        b'\x80\x02}' + hostile.text('state_dict') + records + b's.',
        **{'data/0': b'\x07\x00\x00\x00' * (1 if kind.startswith('truth') else 4)},
    )
    with pytest.raises((DamagedCheckpointError, UnsafeCheckpointError)) as error:
        read_checkpoint(tmp_path / 'a.pth')
    assert len(str(error.value)) < 2000
    assert 'unusual' not in str(error.value)


def test_a_number_of_many_digits_as_a_key(tmp_path):
    for key in (10**6000, (1, 10**6000)):
        torch.save({key: 1}, tmp_path / 'a.pth')
        with pytest.raises(DamagedCheckpointError, match='huge number'):
            read_checkpoint(tmp_path / 'a.pth')


def test_a_state_dict_changes_no_way_of_loading(tmp_path):
    """``assign_to_params_buffers`` would put the file's tensors in the place of the parameters."""
    layers = [KWConv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3)]
    for layer in layers:
        state = layer.double().state_dict()
        layer.float()
        for name in list(state._metadata):
            state._metadata[name] = dict(assign_to_params_buffers=True, version='x')
        state._metadata['other'] = 5
        torch.save(dict(state_dict=state), tmp_path / 'a.pth')
        before = [id(parameter) for parameter in layer.parameters()]
        layer.load_state_dict(read_checkpoint(tmp_path / 'a.pth')['state_dict'])
        assert [id(parameter) for parameter in layer.parameters()] == before
        assert all(parameter.dtype == torch.float32 for parameter in layer.parameters())


def test_what_no_check_foresees_is_damage(tmp_path, monkeypatch):
    torch.save(dict(w=torch.ones(1)), tmp_path / 'a.pth')
    monkeypatch.setattr(containers, 'parse', lambda *_: {}['unforeseen'])
    with pytest.raises(DamagedCheckpointError, match='damaged in an unusual way: KeyError'):
        read_checkpoint(tmp_path / 'a.pth')


def test_an_error_of_the_caller_is_the_callers(tmp_path):
    torch.save(dict(w=torch.ones(1)), tmp_path / 'a.pth')
    with pytest.raises(ZeroDivisionError):
        read_checkpoint(tmp_path / 'a.pth', lambda *_: 1 / 0)
    with pytest.raises(TypeError, match='map_location must be a device, a dict of devices'):
        read_checkpoint(tmp_path / 'a.pth', 3)
    with pytest.raises(RuntimeError, match='foo'):
        read_checkpoint(tmp_path / 'a.pth', 'foo')
    got = read_checkpoint(tmp_path / 'a.pth', {'cpu': torch.device('cpu')})
    assert got['w'].tolist() == [1]

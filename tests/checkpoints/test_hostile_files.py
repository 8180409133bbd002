"""Hostile files of every kind, through the reader: refused, nothing run, nothing altered."""

import pickle
import pickletools

import hostile
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmkw.checkpoints import DamagedCheckpointError, UnsafeCheckpointError, read_checkpoint

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

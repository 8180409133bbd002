"""Damage is named: what is cut, flipped, or no checkpoint at all, and what a checkpoint lacks."""

import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reading import assert_equal, checkpoint
from torch import nn

from mmkw.checkpoints import DamagedCheckpointError, UnsafeCheckpointError, read_checkpoint


def saved(value, new=True, protocol=2):
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    return stream.getvalue()


def refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=message) as error:
        read_checkpoint(path)
    assert 'could run code' not in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nowhere\.pth does not exist'):
        read_checkpoint('nowhere.pth')
    with pytest.raises(DamagedCheckpointError, match='is a folder or a device, not a file'):
        read_checkpoint(tmp_path)
    for wrong in (3, None, {}):
        with pytest.raises(TypeError, match=f'source must be a path or a binary file, got {wrong}'):
            read_checkpoint(wrong)


@pytest.mark.parametrize('new', [True, False])
@pytest.mark.parametrize('share', [0.001, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file(tmp_path, new, share):
    content = saved(dict(state_dict=dict(w=torch.randn(2000), v=torch.randn(500))), new)
    cut = content[: int(share * len(content))]
    refused(tmp_path / 'a.pth', cut, r'a\.pth is damaged: (it|its)')


def test_more_than_a_whole_old_file(tmp_path):
    content = saved(dict(w=torch.ones(3)), new=False)
    refused(tmp_path / 'a.pth', content + b'\x00', 'is damaged')


@pytest.mark.parametrize('record', ['data.pkl', 'data/0', 'data/1', 'byteorder'])
def test_a_flipped_bit_of_a_zip(tmp_path, record):
    content = bytearray(saved(dict(w=torch.randn(100), v=torch.randn(50))))
    info = zipfile.ZipFile(io.BytesIO(content)).getinfo(f'archive/{record}')
    header = content[info.header_offset : info.header_offset + 30]
    start = info.header_offset + 30 + int.from_bytes(header[26:28], 'little')
    start += int.from_bytes(header[28:30], 'little')
    content[start + info.file_size // 2] ^= 4
    refused(tmp_path / 'a.pth', content, f'is damaged: archive/{record} in it does not have its')


def test_what_people_give_in_place_of_a_checkpoint(tmp_path):
    path = tmp_path / 'a.pth'
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)
    refused(path, path.read_bytes(), 'is a TorchScript archive')
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(2))
    refused(path, stream.getvalue(), r'is a NumPy archive \(\.npz\)')
    np.save(stream := io.BytesIO(), np.ones(2))
    refused(path, stream.getvalue(), 'is a NumPy array')
    with zipfile.ZipFile(stream := io.BytesIO(), 'w') as file:
        file.writestr('inner.pth', saved(dict(w=torch.ones(1))))
    refused(
        path, stream.getvalue(), r'is a zip archive of inner\.pth, not a checkpoint\. Unpack it'
    )
    with tarfile.open(fileobj=(stream := io.BytesIO()), mode='w') as file:
        file.addfile(tarfile.TarInfo('storages'))
    refused(path, stream.getvalue(), 'is a tar archive')
    refused(path, pickle.dumps(dict(w=1)), 'is a pickle that torch.save did not write')
    refused(path, b'\x80', 'is damaged: its pickle is not whole')
    refused(path, b'\x80\x02', 'is damaged: its pickle is not whole')
    refused(path, b'PK', 'is damaged: it ends early, after 2 bytes')
    refused(path, b'PK\x03\x04', 'is damaged: it ends early')
    refused(path, b'', 'is empty')
    refused(path, b'<!DOCTYPE html><html>', 'is a web page')
    refused(path, b'version https://git-lfs.github.com/spec/v1', 'is a pointer of Git LFS')
    refused(path, b'{"state_dict": 1}', 'is text, JSON perhaps')
    refused(path, b'\x1f\x8b\x08', 'is compressed with gzip')
    refused(path, b'\x89HDF\r\n', 'is an HDF5 file')
    refused(path, b'weights', r"is no checkpoint: it begins with b'weights'")


def test_a_rewritten_zip(tmp_path):
    """Compressed, with two files of one name, or with more than there is."""
    content = saved(dict(w=torch.ones(3)))
    records = zipfile.ZipFile(io.BytesIO(content))
    for compression, again, message in (
        (zipfile.ZIP_DEFLATED, False, 'in it is packed'),
        (zipfile.ZIP_STORED, True, 'its directory names more than it holds'),
    ):
        with zipfile.ZipFile(stream := io.BytesIO(), 'w', compression) as file:
            for info in records.infolist():
                file.writestr(info.filename, records.read(info))
            if again:
                with pytest.warns(UserWarning, match='Duplicate name'):
                    file.writestr('archive/data.pkl', b'\x80\x02}.')
        refused(tmp_path / 'a.pth', stream.getvalue(), message)


@pytest.mark.parametrize('new', [True, False])
def test_what_is_no_state_dict(tmp_path, new):
    path = tmp_path / 'a.pth'
    refused(path, saved(torch.ones(2), new), r'holds a Tensor, not a state dict')
    refused(path, saved(dict(state_dict=None), new), 'holds a NoneType under state_dict')
    refused(path, saved(dict(model=[1]), new), 'holds a list under state_dict')
    refused(path, saved(dict(state_dict={1: torch.ones(1)}), new), 'with a key that is no text')


@pytest.mark.parametrize('new', [True, False])
@pytest.mark.parametrize(
    'tensor, what',
    [
        (torch.eye(3).to_sparse(), 'sparse'),
        (torch.eye(3).to_sparse_csr(), 'sparse'),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), 'quantized'),
        (torch.ones(3, device='meta'), 'on the meta device'),
        (torch.ones(2, dtype=torch.complex64).conj(), 'conjugated'),
    ],
    ids=['sparse', 'csr', 'quantized', 'meta', 'conjugated'],
)
@pytest.mark.filterwarnings('ignore:.*(Sparse CSR|quantize_per_tensor|deprecated).*')
def test_tensors_that_are_not_dense_are_named(tmp_path, tensor, what, new):
    content = saved(dict(state_dict={'conv1.weight': tensor}), new)
    refused(tmp_path / 'a.pth', content, rf'holds state_dict\.conv1\.weight, which is .*{what}')


@pytest.mark.parametrize('shape, stride, offset', [
    ((4,), (1,), 0), ((3,), (1,), 1), ((2, 2), (2, 1), 0), ((2,), (3,), 0), ((1,), (1,), -1),
    ((-1,), (1,), 0), ((2,), (-1,), 1), ((2,), (1, 1), 0), ((True,), (1,), 0),
    ((2**62, 2), (0, 0), 0), ((2**63,), (0,), 0), ((1.0,), (1,), 0),
    ((2,), (2**63 - 1,), 0), ((1,), (1,), 2**62),
])  # fmt: skip
def test_a_tensor_beyond_its_storage(tmp_path, shape, stride, offset):
    class Tensor:
        def __reduce__(self):
            storage = torch.ones(3).storage()
            hooks = {}
            return torch._utils._rebuild_tensor_v2, (storage, offset, shape, stride, False, hooks)

    content = saved(dict(state_dict=dict(w=Tensor())))
    refused(tmp_path / 'a.pth', content, r'holds state_dict\.w, which (is a tensor|has a shape)')


VALUE = checkpoint()
WHOLE = {
    (new, protocol): saved(VALUE, new, protocol) for new in (True, False) for protocol in (2, 4)
}
EXPECTED = torch.load(io.BytesIO(WHOLE[True, 2]), weights_only=False)
KINDS = st.sampled_from(['flip', 'byte', 'cut', 'insert', 'end', 'copy'])


@st.composite
def mutations(draw):
    """A file, and what happens to it: kinds, places, lengths, contents."""
    key = draw(st.sampled_from(sorted(WHOLE)))
    size = len(WHOLE[key])
    # Tensors take most of a file; its pickle and its directory are what can be misread.
    places = st.integers(0, 3000) | st.integers(size - 3000, size - 1) | st.integers(0, size - 1)
    step = st.tuples(KINDS, places, st.integers(1, 20), st.binary(min_size=1, max_size=8))
    return key, draw(st.lists(step, min_size=1, max_size=3))


def mutate(content, steps):
    content = bytearray(content)
    for kind, place, length, new in steps:
        place %= len(content)
        match kind:
            case 'flip':
                content[place] ^= 1 << length % 8
            case 'byte':
                content[place] = new[0]
            case 'cut':
                del content[place : place + length]
            case 'insert':
                content[place:place] = new
            case 'end':
                del content[max(place, 1) :]
            case 'copy':
                content[place:place] = content[place // 2 : place // 2 + length]
    return bytes(content)


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@settings(max_examples=700, deadline=None, derandomize=True)
@given(mutations())
def test_a_mutated_file_loads_equal_or_is_refused(mutated):
    (new, protocol), steps = mutated
    try:
        got = read_checkpoint(io.BytesIO(mutate(WHOLE[new, protocol], steps)), name='mutated')
    except (DamagedCheckpointError, UnsafeCheckpointError) as error:
        assert str(error).startswith('Checkpoint mutated ')
        return
    # Files of torch before 1.6 have no checksum: their numbers and texts may be others.
    if new:
        assert_equal(got, EXPECTED)

"""The reader gives what ``torch.load`` gives of files that are trusted, tensor by tensor."""

import argparse
import io
import pickle
import sys
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from mmkw.checkpoints import DamagedCheckpointError, read_checkpoint
from mmkw.layers import KWConv2d

FORMATS = [(protocol, new) for protocol in (2, 3, 4, 5) for new in (True, False)]
IDS = [f'protocol {protocol}, {"zip" if new else "old"}' for protocol, new in FORMATS]


def bits(tensor):
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_equal(got, expected, place='checkpoint'):
    """Types, values, strides, gradients; the fields of histories; the metadata of state dicts."""
    assert type(got) is type(expected), place
    if isinstance(expected, torch.Tensor):
        assert (got.dtype, got.shape, got.stride()) == (
            expected.dtype,
            expected.shape,
            expected.stride(),
        ), place
        assert got.requires_grad == expected.requires_grad, place
        assert bits(got) == bits(expected), place
    elif isinstance(expected, dict):
        assert list(got) == list(expected), place
        for key in expected:
            assert_equal(got[key], expected[key], f'{place}.{key}')
        if hasattr(expected, '_metadata'):
            assert_equal(got._metadata, expected._metadata, f'{place}._metadata')
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), place
        for index, pair in enumerate(zip(got, expected)):
            assert_equal(*pair, f'{place}.{index}')
    elif isinstance(expected, HistoryBuffer):
        for name in ('max_length', '_log_history', '_count_history'):
            assert_equal(getattr(got, name), getattr(expected, name), f'{place}.{name}')
        assert got._statistics_methods is HistoryBuffer._statistics_methods
    elif isinstance(expected, np.ndarray):
        assert got.dtype == expected.dtype and got.shape == expected.shape, place
        assert got.flags.writeable and (got == expected).all(), place
        assert got.flags.f_contiguous == expected.flags.f_contiguous, place
    else:
        assert got == expected, place


@pytest.mark.parametrize('new', [True, False], ids=['zip', 'old'])
def test_files_are_read_to_the_cpu_whatever_the_default_device(new, tmp_path):
    expected = nn.Linear(3, 4).state_dict()
    torch.save(expected, tmp_path / 'a.pth', _use_new_zipfile_serialization=new)
    with torch.device('meta'):
        got = read_checkpoint(tmp_path / 'a.pth')
    assert_equal(got, expected)


def history(*values):
    buffer = HistoryBuffer(max_length=100)
    for value in values:
        buffer.update(value)
    return buffer


def checkpoint():
    """What MMEngine writes after some training, of a dynamic and of a static network."""
    torch.manual_seed(0)
    networks = nn.ModuleDict(
        dict(dynamic=KWConv2d(4, 8, 3, cell_num_ratio=2), static=nn.Conv2d(4, 8, 3))
    )
    networks['norm'] = nn.BatchNorm2d(8)
    optimizer = torch.optim.AdamW(networks.parameters(), lr=0.1)
    images = torch.randn(2, 4, 6, 6)
    for _ in range(2):
        optimizer.zero_grad()
        norm = networks['norm']
        (norm(networks['dynamic'](images)) + networks['static'](images)).square().mean().backward()
        optimizer.step()
    return dict(
        meta=dict(
            epoch=3,
            cfg='model = dict()\n',
            seed=2**40,
            dataset_meta=dict(classes=('a', 'ä'), palette=[(1, 2, 3)]),
            rate=0.25,
            nothing=None,
            flags=(True, False),
            thresholds={1, 2},
            raw=b'\x00\xff',
            buffer=bytearray(b'ab'),
            point=1 + 2j,
            size=torch.Size([2, 3]),
            dtype=torch.bfloat16,
            device=torch.device('cpu'),
            counts=Counter(a=2),
        ),
        state_dict=networks.state_dict(),
        optimizer=optimizer.state_dict(),
        param_schedulers=[dict(by_epoch=True, _last_value=[0.1])],
        message_hub=dict(
            log_scalars=dict(loss=history(1.0, 2.0, 6.0), empty=history()),
            runtime_info=dict(
                array=np.arange(6, dtype=np.int32).reshape(2, 3),
                columns=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
                empty=np.zeros((0, 3), np.float16),
                foreign=np.arange(3, dtype='>f4'),
                number=np.float64(2.5),
                flag=np.bool_(True),
                wave=np.complex64(1j),
                none=np.uint8(200),
            ),
            resumed_keys=dict(loss=True),
        ),
    )


@pytest.mark.parametrize('protocol, new', FORMATS, ids=IDS)
def test_everything_that_mmengine_writes_is_read(tmp_path, protocol, new):
    path = tmp_path / 'a.pth'
    torch.save(checkpoint(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    got = read_checkpoint(path)
    assert_equal(got, torch.load(path, weights_only=False))
    loss = got['message_hub']['log_scalars']['loss']
    assert (loss.mean(), loss.current(), loss.max(), loss.statistics('min')) == (3, 6, 6, 1)
    loss.update(7.0)
    assert loss.current() == 7


KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
KINDS += [torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
KINDS += [torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32]


@pytest.mark.parametrize('protocol, new', FORMATS[::3], ids=IDS[::3])
def test_every_kind_of_tensor_is_read(tmp_path, protocol, new):
    values = torch.arange(24).reshape(2, 3, 4)
    tensors = {str(kind): values.to(kind) for kind in KINDS}
    base = torch.randn(4, 6)
    tensors |= dict(
        base=base,
        transposed=base.t(),
        part=base[1:3, ::2],
        expanded=torch.ones(1).expand(5, 3),
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 3),
        learning=torch.ones(2, requires_grad=True),
        parameter=nn.Parameter(torch.ones(2)),
        frozen=nn.Parameter(torch.ones(2), requires_grad=False),
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    )
    with_attribute = torch.ones(3)
    with_attribute.note = 'left aside'
    tensors['with_attribute'] = with_attribute
    path = tmp_path / 'a.pth'
    torch.save(tensors, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    got = read_checkpoint(path)
    assert_equal(got, tensors)
    assert not hasattr(got['with_attribute'], 'note')
    # What shares memory in the file goes on sharing it.
    got['base'][0, 1] = 7
    assert got['transposed'][1, 0] == 7
    got['base'][1, 2] = 8
    assert got['part'][0, 1] == 8


def test_a_view_of_a_storage_in_an_old_file():
    """torch before 0.4 wrote views of storages so."""
    stream = io.BytesIO()

    class Views(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, str) and value.startswith('view'):
                offset = int(value[4:])
                view = (f'key{offset}', offset, 2)
                return ('storage', torch.FloatStorage, 'root', 'cpu', 6, view)
            return None

    class Tensor:
        def __init__(self, name):
            self.name = name

        def __reduce__(self):
            return torch._utils._rebuild_tensor, (self.name, 0, (2,), (1,))

    pickle.dump(0x1950A86A20F9469CFC6C, stream, 2)
    pickle.dump(1001, stream, 2)
    pickle.dump(dict(little_endian=True), stream, 2)
    Views(stream, 2).dump(dict(a=Tensor('view0'), b=Tensor('view4')))
    pickle.dump(['root'], stream, 2)
    stream.write((6).to_bytes(8, 'little') + np.arange(6, dtype='<f4').tobytes())
    stream.seek(0)
    got = read_checkpoint(stream)
    assert got['a'].tolist() == [0, 1] and got['b'].tolist() == [4, 5]


def test_a_command_line_becomes_a_dict(tmp_path):
    """The authors' ImageNet files hold one, and say ``model`` for the state dict."""
    args = argparse.Namespace(lr=0.1, model='kw', sizes=[1, 2])
    torch.save(dict(model=dict(w=torch.ones(2)), args=args), tmp_path / 'a.pth')
    got = read_checkpoint(str(tmp_path / 'a.pth'))
    assert got['args'] == vars(args) and got['state_dict']['w'].tolist() == [1, 1]
    assert 'model' not in got


def test_map_location(tmp_path):
    path = tmp_path / 'a.pth'
    base = torch.arange(4.0)
    torch.save(dict(a=base, b=base[2:]), path)
    seen = []

    def chosen(storage, location):
        seen.append(location)
        return None if len(seen) > 1 else storage

    for location in (None, 'cpu', torch.device('cpu'), {'cpu': 'cpu'}, chosen):
        got, expected = read_checkpoint(path, location), torch.load(path, map_location=location)
        assert_equal(got, expected)
        got['a'][3] = 9
        assert got['b'][1] == 9
    assert seen[0] == 'cpu'
    for location in ('meta', torch.device('meta'), {'cpu': 'meta'}):
        got = read_checkpoint(path, location)['b']
        assert got.is_meta and got.shape == (2,)


def test_a_file_of_another_device_says_what_to_do(tmp_path):
    """As ``torch.load`` says it."""
    if torch.cuda.is_available():
        pytest.skip('the device is here')
    path = tmp_path / 'a.pth'
    torch.save(dict(a=torch.ones(2)), path)
    written = path.read_bytes().replace(b'X\x03\x00\x00\x00cpu', b'X\x06\x00\x00\x00cuda:0')
    _write_again(path, written)
    with pytest.raises(RuntimeError, match=r"map_location=torch.device\('cpu'\)"):
        read_checkpoint(path)
    assert read_checkpoint(path, 'cpu')['a'].tolist() == [1, 1]


def _write_again(path, altered):
    """Writes a zip file anew whose pickle was replaced, so that sizes and checksums fit."""
    import zipfile

    original = zipfile.ZipFile(path)
    start = altered.index(b'\x80\x02')
    pickled = altered[start : altered.index(b'.PK', start) + 1]
    records = {info.filename: original.read(info) for info in original.infolist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as file:
        for name, content in records.items():
            file.writestr(name, pickled if name.endswith('data.pkl') else content)


def test_a_file_without_checksums_is_read(tmp_path):
    """As PyTorch writes it when told to leave them out."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(dict(a=torch.ones(2)), tmp_path / 'a.pth')
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_checkpoint(tmp_path / 'a.pth')['a'].tolist() == [1, 1]


def test_the_metadata_of_a_state_dict_is_all_that_it_keeps(tmp_path):
    state = OrderedDict(w=torch.ones(1))
    state._metadata = OrderedDict({'': dict(version=2)})
    state.copy = 'not a method'
    torch.save(state, tmp_path / 'a.pth')
    got = read_checkpoint(tmp_path / 'a.pth')
    assert got._metadata == state._metadata and got.copy() == got


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch', reason='reads safetensors files')
    tensors = {'a.weight': torch.randn(3, 4), 'b': torch.ones(2, dtype=torch.bfloat16)}
    path = tmp_path / 'a.safetensors'
    safetensors.save_file(tensors, path, metadata=dict(format='pt'))
    got = read_checkpoint(path)['state_dict']
    assert_equal(dict(sorted(got.items())), tensors)
    assert read_checkpoint(path, 'meta')['state_dict']['b'].is_meta
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DamagedCheckpointError, match='is a damaged safetensors file'):
        read_checkpoint(path)


def test_safetensors_without_its_package(tmp_path, monkeypatch):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    content = len(header).to_bytes(8, 'little') + header + bytes(4)
    (tmp_path / 'a.safetensors').write_bytes(content)
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(ImportError, match=r"pip install 'mmkw\[safetensors\]'"):
        read_checkpoint(tmp_path / 'a.safetensors')

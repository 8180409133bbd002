"""Reads the file formats of checkpoints: torch's zip, torch's older format, and safetensors.

Each reader returns the value in the file, with its tensors. Only the zip format has checksums, and
these are compared.
"""

import ctypes
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import torch

from .errors import DamagedCheckpointError, UnsafeCheckpointError, shown
from .pickles import externals, parse
from .values import KNOWN, Values, storage_width

# The first two numbers in files of torch before 1.6: a magic number and the version.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LOCATION = re.compile(r'cpu|meta|(cuda|xpu|mps|npu|mlu|musa|hpu|xla|privateuseone)(:[0-9]{1,3})?')
# Files that are mistaken for checkpoints: their first bytes, what they are, what to do.
_FOREIGN = (
    (b'', 'is empty', 'Download or copy it again'),
    (b'<', 'is a web page', 'Download the file itself'),
    (b'version https://git-lfs', 'is a pointer of Git LFS', 'Run git lfs pull'),
    (b'\x89HDF', 'is an HDF5 file', 'Convert it with the library that wrote it'),
    (b'\x93NUMPY', 'is a NumPy array', 'Save a dict of tensors with torch.save'),
    (b'\x1f\x8b', 'is compressed with gzip', 'Unpack it'),
    (b'BZh', 'is compressed with bzip2', 'Unpack it'),
    (b'\xfd7zXZ', 'is compressed with xz', 'Unpack it'),
    (b'{', 'is text, JSON perhaps', 'Name the checkpoint itself'),
)

Restore = Callable[[torch.UntypedStorage, str], torch.UntypedStorage]


def read(file: BinaryIO, restore: Restore) -> Any:
    """Reads a file of any of the formats.

    Args:
        file: A seekable binary file, at its beginning.
        restore: Moves a storage from the CPU to its device. The second argument is the device that
            it was saved on.

    Raises:
        DamagedCheckpointError: If the file has none of the formats or is altered. The message is
            the end of a sentence that begins with the file's name.
        UnsafeCheckpointError: If the file names objects that no checkpoint needs. The message is
            the end of a sentence, too.
    """
    start = file.read(512)
    file.seek(0)
    if start.startswith(b'PK'):
        return _read_zip(file, restore)
    if start.startswith(b'\x80'):
        return _read_old(file, restore)
    if start[257:262] == b'ustar':
        raise DamagedCheckpointError(
            'is a tar archive, of torch 0.1 perhaps. Load it there, and save it with torch 1.0 or '
            'newer'
        )
    if start[8:9] == b'{' and struct.unpack('<Q', start[:8])[0] < 1 << 32:
        return _read_safetensors(file, restore)
    for beginning, what, remedy in _FOREIGN:
        if start.startswith(beginning) if beginning else not start:
            raise DamagedCheckpointError(f'{what}, not a checkpoint. {remedy}')
    raise DamagedCheckpointError(
        f'is no checkpoint: it begins with {start[:16]!r}. Download or copy it again'
    )


class _Storages:
    """The storages of a file, each read once."""

    def __init__(self, load: Callable[[str, int], torch.UntypedStorage], restore: Restore) -> None:
        self._load = load
        self._restore = restore
        self._read: dict[str, tuple[int, torch.UntypedStorage]] = {}

    def __call__(self, key: str, size: int, location: str) -> torch.UntypedStorage:
        if key not in self._read:
            if not _LOCATION.fullmatch(location):
                raise DamagedCheckpointError(
                    f'is damaged: its storage {shown(key)} was on no device'
                )
            self._read[key] = (size, self._restore(self._load(key, size), location))
        known, storage = self._read[key]
        if known != size:
            raise DamagedCheckpointError(f'is damaged: its storage {shown(key)} has two sizes')
        return storage


def _build(tree: Any, names: set[str], storages: _Storages, size: int) -> Any:
    """Builds the value of a pickle. Refuses a pickle that names unknown objects."""
    _refuse_unknown(names)
    return Values(storages, size).build(tree)


def _refuse_unknown(names: set[str]) -> None:
    unknown = sorted(shown(name) for name in names - KNOWN)
    if unknown:
        more = f' and {len(unknown) - 5} others' if len(unknown) > 5 else ''
        raise UnsafeCheckpointError(f'holds pickled objects ({", ".join(unknown[:5])}{more})')


def _parse(file: BinaryIO, names: set[str]) -> Any:
    """Parses a pickle. One that names unknown objects is unsafe, even if it is also damaged."""
    try:
        return parse(file, names)
    except DamagedCheckpointError:
        _refuse_unknown(names)
        raise


# Zip, from torch 1.6 on


def _read_zip(file: BinaryIO, restore: Restore) -> Any:
    records = _records(file)
    root = _root(records)
    # After torch.serialization.set_crc32_options(False), torch writes zeros as checksums.
    checked = any(info.CRC for info in records.values())

    def content(name: str) -> bytes:
        found = _content(file, records[name], checked)
        return bytes(_memory(found))

    if f'{root}/byteorder' in records and content(f'{root}/byteorder') != b'little':
        raise DamagedCheckpointError('was written by a big-endian machine. Save it again elsewhere')

    def load(key: str, size: int) -> torch.UntypedStorage:
        info = records.get(f'{root}/data/{key}')
        if info is None or info.file_size != size:
            raise DamagedCheckpointError(f'is damaged: its storage {shown(key)} is not whole')
        return _content(file, info, checked).untyped_storage()

    names: set[str] = set()
    pickled = content(f'{root}/data.pkl')
    tree = _parse(io.BytesIO(pickled), names)
    return _build(tree, names, _Storages(load, restore), len(pickled))


def _records(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The directory of a zip file."""
    size = file.seek(0, io.SEEK_END)
    try:
        infos = zipfile.ZipFile(file).infolist()
    except OSError:
        raise
    except Exception as error:
        # zipfile raises many kinds of errors for a damaged directory.
        raise DamagedCheckpointError(
            f'is damaged: it ends early, after {size} bytes, or its directory is altered. Download '
            'or copy it again'
        ) from error
    records = {info.filename: info for info in infos}
    if len(records) != len(infos) or sum(info.file_size for info in infos) > size:
        raise DamagedCheckpointError('is damaged: its directory names more than it holds')
    return records


def _root(records: dict[str, zipfile.ZipInfo]) -> str:
    """The folder of torch's files in a zip file. Raises an error for other zip files."""
    roots = [name.partition('/')[0] for name in records if re.fullmatch(r'[^/]+/data\.pkl', name)]
    if any(name.endswith('/constants.pkl') for name in records):
        raise DamagedCheckpointError(
            'is a TorchScript archive, not a checkpoint. torch.jit.load(FILE).state_dict() has its '
            'tensors, if you trust it'
        )
    if any(name.endswith('archive_format') for name in records):
        raise DamagedCheckpointError('is a program of torch.export, not a checkpoint')
    if records and all(name.endswith('.npy') for name in records):
        raise DamagedCheckpointError('is a NumPy archive (.npz), not a checkpoint')
    if len(roots) != 1:
        held = ', '.join(sorted(map(shown, records))[:3]) or 'nothing'
        raise DamagedCheckpointError(f'is a zip archive of {held}, not a checkpoint. Unpack it')
    return roots[0]


def _content(file: BinaryIO, info: zipfile.ZipInfo, checked: bool) -> torch.Tensor:
    """Reads a record of a zip file and compares its checksum.

    Returns:
        Tensor[bytes].
    """
    name = shown(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise DamagedCheckpointError(f'is damaged or rewritten: {name} in it is packed')
    header = b''
    if info.header_offset >= 0:
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b'PK\x03\x04':
        raise DamagedCheckpointError(f'is damaged: the header of {name} in it is altered')
    file.seek(sum(struct.unpack('<HH', header[26:])), io.SEEK_CUR)
    content = torch.empty(info.file_size, dtype=torch.uint8, device='cpu')
    memory = _memory(content)
    read = 0
    while read < len(memory):
        count = file.readinto(memory[read:])  # type: ignore[attr-defined]
        if not count:
            break
        read += count
    if read < len(memory):
        raise DamagedCheckpointError(f'is damaged: it ends early, within {name}')
    if checked and zlib.crc32(memory) != info.CRC:
        raise DamagedCheckpointError(
            f'is damaged: {name} in it does not have its checksum. Download or copy it again'
        )
    return content


def _memory(content: torch.Tensor) -> memoryview:
    """The memory of a tensor of bytes, which lives as long as the tensor.

    Like ``memoryview(content.numpy())``, but without NumPy, which torch does not need.
    """
    bytes_of = ctypes.c_ubyte * content.numel()
    return memoryview(bytes_of.from_address(content.data_ptr() or 1)).cast('B')


# Several pickles in a row, up to torch 1.5


def _read_old(file: BinaryIO, restore: Restore) -> Any:
    # The whole file is read, so that lengths in a damaged pickle cannot exceed the file. Files of
    # this format are small by today's measures.
    data = file.read()
    stream = io.BytesIO(data)
    names: set[str] = set()
    if _parse(stream, names) != _MAGIC:
        _refuse_unknown(names)
        raise DamagedCheckpointError(
            'is a pickle that torch.save did not write, not a checkpoint. Read it where you trust '
            'it, and write its tensors with torch.save'
        )
    version, machine, tree, keys = (_parse(stream, names) for _ in range(4))
    _refuse_unknown(names)
    written = dict(item for item in getattr(machine, 'items', ()) if type(item[0]) is str)
    if version != _PROTOCOL or written.get('little_endian') is not True:
        raise DamagedCheckpointError('was written by an unknown version or a big-endian machine')
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise DamagedCheckpointError('is damaged: its list of storages is altered')
    # The storages follow in this order. Each begins with its number of elements. The tensors tell
    # how large an element is.
    sizes = dict(_sizes(tree))
    places, place = {}, stream.tell()
    end = place
    for key in keys:
        count, width = sizes.get(key, (None, 0))
        if count is None or data[place : place + 8] != struct.pack('<q', count):
            raise DamagedCheckpointError(
                f'is damaged: it ends early, after {len(data)} bytes, or storage {shown(key)} is '
                'altered'
            )
        places[key] = place + 8
        place += 8 + count * width
    if place != len(data):
        raise DamagedCheckpointError(
            f'is damaged: it has {len(data)} bytes, and its storages end after {place}'
        )

    def load(key: str, size: int) -> torch.UntypedStorage:
        if key not in places:
            raise DamagedCheckpointError(f'is damaged: it lacks storage {shown(key)}')
        content = torch.empty(size, dtype=torch.uint8, device='cpu')
        _memory(content)[:] = data[places[key] : places[key] + size]
        return content.untyped_storage()

    return _build(tree, names, _Storages(load, restore), end)


def _sizes(tree: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields, for every storage, its key, and its number of elements with the bytes of one."""
    for identity in externals(tree):
        if type(identity) is tuple and len(identity) == 6:
            _, kind, key, _, count, _ = identity
            width = storage_width(kind)
            whole = type(count) is int and 0 <= count < 1 << 63
            if width is not None and type(key) is str and whole:
                yield key, (count, width)


# Safetensors


def _read_safetensors(file: BinaryIO, restore: Restore) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise ImportError(
            "To read a safetensors file install its package: pip install 'mmkw[safetensors]'"
        ) from error
    try:
        tensors = load(file.read())
    except SafetensorError as error:
        raise DamagedCheckpointError(
            f'is a damaged safetensors file: {shown(str(error))}'
        ) from error
    return dict(state_dict={name: _moved(tensor, restore) for name, tensor in tensors.items()})


def _moved(tensor: torch.Tensor, restore: Restore) -> torch.Tensor:
    storage = restore(tensor.untyped_storage(), 'cpu')
    return torch.empty(0, dtype=tensor.dtype, device=storage.device).set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )

"""Builds tensors, arrays, histories and plain data from the records of a pickle.

This module lists every name that a checkpoint may use. Each name has a method that checks the
kinds, shapes and sizes of its arguments. No argument from a file reaches a function unchecked.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import DamagedCheckpointError, UnsafeCheckpointError, shown
from .pickles import Call, External, Mapping, Name, Unordered

if TYPE_CHECKING:
    import numpy as np

_HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
_STATISTICS = ('min', 'max', 'current', 'mean')
_HISTORY_FIELDS = {'max_length', '_log_history', '_count_history', 'statistics_methods'}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
# The dtypes whose tensors are plain memory.
_PLAIN = re.compile(r'torch\.(bool|u?int(8|16|32|64)|b?float(16|32|64|8_\w+)|complex(32|64|128))')
_STORAGES = {
    'DoubleStorage': torch.float64,
    'FloatStorage': torch.float32,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
    'ComplexDoubleStorage': torch.complex128,
    'ComplexFloatStorage': torch.complex64,
    # Tensors with an untyped storage name their own dtype.
    'UntypedStorage': torch.uint8,
}
_STORAGE_NAMES = {
    f'{module}.{kind}': dtype
    for module in ('torch', 'torch.cuda', 'torch.storage')
    for kind, dtype in _STORAGES.items()
}
# Kinds of tensors that MMEngine's checkpoints do not hold. They are recognised but not read.
_UNREAD = {
    'torch._utils._rebuild_sparse_tensor': 'sparse',
    'torch._utils._rebuild_sparse_csr_tensor': 'sparse',
    'torch._utils._rebuild_qtensor': 'quantized',
    'torch._utils._rebuild_meta_tensor_no_storage': 'on the meta device, without values',
    'torch._utils._rebuild_nested_tensor': 'nested',
    'torch._utils._rebuild_wrapper_subclass': 'of a subclass of Tensor',
    'torch._utils._rebuild_device_tensor_from_numpy': 'of a device without storages',
    'torch._utils._rebuild_device_tensor_from_cpu_tensor': 'of a device without storages',
}
# The storages of quantized tensors, by the bytes of an element.
_QUANTIZED = {
    'torch.QInt8Storage': 1,
    'torch.QUInt8Storage': 1,
    'torch.QInt32Storage': 4,
    'torch.QUInt4x2Storage': 1,
    'torch.QUInt2x4Storage': 1,
}
# Names in the arguments of these kinds.
_UNREAD_PARTS = {
    'torch.serialization._get_layout',
    *_QUANTIZED,
    *(f'torch.per_{scheme}' for scheme in (
        'tensor_affine', 'tensor_symmetric', 'channel_affine', 'channel_symmetric',
        'channel_affine_float_qparams',
    )),
}  # fmt: skip
_NUMBERS = {'b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8', 'c8', 'c16'}
# The deepest nesting: deeper than any checkpoint, and far below the interpreter's limit.
_DEPTH = 100
_LARGEST = 2**63
# The largest number as a key. Larger integers share their hashes with smaller ones, and so could
# make a dict slow.
_LARGEST_KEY = 2**61 - 2
# How many bytes may be copied from a pickle beyond four times its size. Also the most bytes of a
# tensor that is larger than its storage, such as an expanded tensor.
_SPARE_BYTES = 64 << 20


class Values:
    """Builds values from the records of one file.

    A record that occurs twice gives the same value twice, as in the file.

    Args:
        storage: Returns a storage for its key, its number of bytes, and its device in the file
            (such as ``cuda:0``).
        size: Bytes of the pickle. The size limits how many bytes may be copied from the pickle.
    """

    def __init__(self, storage: Callable[[str, int, str], torch.UntypedStorage], size: int) -> None:
        self._storage = storage
        self._bytes_left = 4 * size + _SPARE_BYTES
        self._built: dict[int, Any] = {}
        self._open: set[int] = set()

    def build(self, record: Any, place: tuple[Any, ...] = ()) -> Any:
        """Builds one value, with all values inside it.

        Args:
            record: A record from :func:`~mmkw.checkpoints.pickles.parse`.
            place: The keys that lead to the record, for messages.

        Raises:
            UnsafeCheckpointError: If the record names something that no checkpoint needs.
            DamagedCheckpointError: If a name comes with wrong arguments.
        """
        if type(record) in (str, int, float, bool, bytes, bytearray) or record is None:
            return record
        identity = id(record)
        if identity in self._built:
            return self._built[identity]
        if identity in self._open:
            raise _damaged(place, 'contains itself')
        if len(self._open) > _DEPTH:
            raise _damaged(place[:4], f'is nested more than {_DEPTH} deep')
        self._open.add(identity)
        value = self._of(record, place)
        self._open.remove(identity)
        # Records live as long as the tree, so no other record can get the same id.
        self._built[identity] = value
        return value

    def _of(self, record: Any, place: tuple[Any, ...]) -> Any:
        match record:
            case list():
                return [self.build(item, (*place, i)) for i, item in enumerate(record)]
            case tuple():
                return tuple([self.build(item, (*place, i)) for i, item in enumerate(record)])
            case Mapping():
                return dict(self._items(record.items, place))
            case Unordered():
                return {self._key(item, place) for item in record.elements}
            case Name(name) if name in _DTYPES:
                return _DTYPES[name]
            case Call(function=Name(name)) if name in _UNREAD:
                raise _damaged(
                    place,
                    f'is a tensor {_UNREAD[name]}, and only dense ones with values are read. '
                    'Convert it (to_dense, dequantize, cpu) and save the file again',
                )
            case Call(function=Name(name)) if name in _CALLS:
                arguments = record.arguments
                if type(arguments) is not tuple:
                    raise _damaged(place, f'is a {shown(name)} of no arguments')
                return _CALLS[name](self, record, arguments, place)
            case Name(name) | Call(function=Name(name)):
                raise _damaged(place, f'is {shown(name)} itself or a call of it, not a value')
            case External():
                raise _damaged(place, 'is a storage without a tensor')
        raise _damaged(place, 'is the result of a result, not a value')

    def _spend(self, size: int, place: tuple[Any, ...]) -> None:
        """Limits the copied bytes, because a file may refer to one content many times."""
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise _damaged(place, 'has far more in it than the file')

    # Plain data

    def _key(self, record: Any, place: tuple[Any, ...]) -> Any:
        key = self.build(record, place)
        parts = key if type(key) is tuple else (key,)
        for part in parts:
            plain = part is None or type(part) in (str, bool, bytes)
            if not plain and (type(part) not in (int, float) or abs(part) > _LARGEST_KEY):
                raise _damaged(place, f'has a key of type {type(part).__name__}, or a huge number')
        return key

    def _items(self, items: list[tuple[Any, Any]], place: tuple[Any, ...]) -> list[tuple[Any, Any]]:
        keys = [self._key(key, place) for key, _ in items]
        return [(key, self.build(value, (*place, key))) for key, (_, value) in zip(keys, items)]

    def _ordered_dict(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> OrderedDict:
        first: list = []
        if arguments:
            first = self.build(arguments[0], place)
            if type(first) is not list or not all(
                type(pair) in (list, tuple) and len(pair) == 2 for pair in first
            ):
                raise _damaged(place, 'is an OrderedDict of no pairs')
            self._spend(64 * len(first), place)
            first = [(self._key(key, place), value) for key, value in first]
        value = OrderedDict([*first, *self._items(call.items, place)])
        # A state dict keeps the versions of modules, and attentions their temperature, in this
        # attribute. Others are ignored.
        if type(call.state) is Mapping:
            attributes = self.build(call.state, (*place, '_metadata'))
            if '_metadata' in attributes:
                metadata = _known(attributes['_metadata'])
                value._metadata = metadata  # type: ignore[attr-defined]
        return value

    def _counter(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> Counter:
        counts = self.build(arguments[0], place) if arguments else {}
        self._spend(64 * len(counts) if type(counts) is dict else 0, place)
        if type(counts) is not dict or not all(type(count) is int for count in counts.values()):
            raise _damaged(place, 'is a Counter of no counts')
        return Counter({**counts, **dict(self._items(call.items, place))})

    def _namespace(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> dict:
        """A command line (``argparse.Namespace``), as a dict."""
        if type(call.state) is not Mapping:
            raise _damaged(place, 'is a Namespace without contents')
        return self.build(call.state, place)

    def _config(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> dict:
        """A dict of a config (``ConfigDict``), as a plain one."""
        value = self.build(arguments[0], place) if arguments else {}
        if type(value) is not dict:
            raise _damaged(place, 'is a ConfigDict of no dict')
        return {**value, **dict(self._items(call.items, place))}

    def _set(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> set:
        elements = arguments[0] if arguments else []
        if type(elements) not in (list, tuple):
            raise _damaged(place, 'is a set of no elements')
        self._spend(64 * len(elements), place)
        return {self._key(element, place) for element in elements}

    def _encode(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> bytes:
        """Bytes as protocol 2 writes them: text with one character per byte."""
        text, *encoding = arguments or (None,)
        if type(text) is not str or encoding not in (['latin1'], ['latin-1']):
            raise _damaged(place, 'holds bytes that are written as something else')
        self._spend(len(text), place)
        try:
            return text.encode('latin-1')
        except UnicodeEncodeError:
            raise _damaged(place, 'holds bytes that are larger than bytes') from None

    def _bytes(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> bytes:
        if arguments:
            raise _damaged(place, 'holds bytes that are written as something else')
        return b''

    def _bytearray(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> bytearray:
        if len(arguments) == 2:
            return bytearray(self._encode(call, arguments, place))
        content = self.build(arguments[0], place) if arguments else b''
        if type(content) not in (bytes, bytearray):
            raise _damaged(place, 'is a bytearray of no bytes')
        self._spend(len(content), place)
        return bytearray(content)

    def _complex(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> complex:
        if len(arguments) != 2 or not all(type(part) is float for part in arguments):
            raise _damaged(place, 'is a complex number without its parts')
        return complex(*arguments)

    # PyTorch

    def _size(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> torch.Size:
        return torch.Size(_whole(arguments[0] if arguments else None, place))

    def _device(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> torch.device:
        kind, index = (*arguments, None, None)[:2]
        whole = index is None or (type(index) is int and 0 <= index < 128)
        if type(kind) is not str or not whole or len(arguments) > 2:
            raise _damaged(place, 'is no device')
        try:
            return torch.device(kind) if index is None else torch.device(kind, index)
        except RuntimeError:
            raise _damaged(place, f'is a device {shown(kind)}, which is unknown here') from None

    def _tensor(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> Tensor:
        """``_rebuild_tensor(storage, offset, size, stride, ...)`` and its later versions."""
        if len(arguments) < 4:
            raise _damaged(place, 'is a tensor without a shape')
        external, offset, size, stride, *rest = arguments
        storage, dtype = self._memory(external, place)
        name = call.function.name
        learns = False
        if name != 'torch._utils._rebuild_tensor':
            own = name == 'torch._utils._rebuild_tensor_v3'
            learns, metadata = (rest or [False])[0], rest[2 + own :]
            if own:
                dtype = self.build(rest[2] if len(rest) > 2 else None, place)
            if type(learns) is not bool or not _PLAIN.fullmatch(str(dtype)):
                raise _damaged(place, 'is a tensor whose type or gradient is not told')
            # Conjugated and negated views have a dict with items. Other tensors have an empty dict.
            if any(part is not None and getattr(part, 'items', True) for part in metadata):
                raise _damaged(place, 'is a conjugated or negated view; save resolve_conj() of it')
        size, stride = (_whole(self._size_of(part, place), place) for part in (size, stride))
        if type(offset) is not int or not 0 <= offset < _LARGEST or len(size) != len(stride):
            raise _damaged(place, 'is a tensor whose shape, strides and offset do not fit')
        last = sum((length - 1) * step for length, step in zip(size, stride))
        used = (offset + last + 1) * _itemsize(dtype) if 0 not in size else 0
        # PyTorch also multiplies the lengths if one of them is 0.
        whole = math.prod(max(length, 1) for length in size) * _itemsize(dtype)
        if used > storage.nbytes() or whole > max(storage.nbytes(), _SPARE_BYTES):
            raise _damaged(
                place, f'is a tensor of shape {size}, for which its {storage.nbytes()} bytes '
                'are too few'
            )  # fmt: skip
        tensor = torch.empty(0, dtype=dtype, device=storage.device)
        tensor.set_(storage, offset if used else 0, size, stride)
        if dtype == torch.bool and not tensor.is_meta and (tensor.view(torch.uint8) > 1).any():
            raise _damaged(place, 'is a tensor of truth values, and has others')
        if learns:
            if not dtype.is_floating_point and not dtype.is_complex:
                raise _damaged(place, f'is a tensor of {dtype} with a gradient')
            tensor.requires_grad_()
        return tensor

    def _size_of(self, record: Any, place: tuple[Any, ...]) -> Any:
        return self.build(record, place) if type(record) is Call else record

    def _memory(
        self, external: Any, place: tuple[Any, ...]
    ) -> tuple[torch.UntypedStorage, torch.dtype]:
        """The storage and dtype of ``('storage', type, key, location, numel[, view])``."""
        identity = external.identity if type(external) is External else None
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != 'storage':
            raise _damaged(place, 'is a tensor without a storage')
        kind, key, location, count = identity[1:5]
        dtype = _STORAGE_NAMES.get(kind.name) if type(kind) is Name else None
        if dtype is None:
            raise _damaged(place, f'is a tensor with a storage {shown(getattr(kind, "name", "?"))}')
        if type(key) is not str or type(location) is not str:
            raise _damaged(place, 'is a tensor whose storage has no name')
        if type(count) is not int or not 0 <= count < _LARGEST:
            raise _damaged(place, 'is a tensor whose storage has no size')
        width = _itemsize(dtype)
        storage = self._storage(key, count * width, location)
        view = identity[5] if len(identity) == 6 else None
        if view is not None:
            _, offset, length = view if type(view) is tuple and len(view) == 3 else (None,) * 3
            if not (
                type(offset) is type(length) is int and 0 <= offset <= offset + length <= count
            ):
                raise _damaged(place, 'is a tensor whose storage is a view of nothing')
            if storage.device.type == 'meta':
                return torch.UntypedStorage(length * width, device='meta'), dtype
            storage = storage[offset * width : (offset + length) * width]
        return storage, dtype

    def _parameter(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> nn.Parameter:
        """``_rebuild_parameter(data, requires_grad, hooks, ...)`` or ``Parameter(data, ...)``."""
        data = self.build(arguments[0], place) if arguments else None
        learns = arguments[1] if len(arguments) > 1 else True
        if not isinstance(data, Tensor) or type(learns) is not bool:
            raise _damaged(place, 'is a Parameter without a tensor')
        if learns and not data.dtype.is_floating_point and not data.dtype.is_complex:
            raise _damaged(place, f'is a Parameter of {data.dtype} with a gradient')
        return nn.Parameter(data.detach(), learns)

    def _from_type(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> Tensor:
        """``_rebuild_from_type_v2(function, type, arguments, attributes)``; ignores attributes."""
        function, kind, inner = arguments[:3] if len(arguments) >= 3 else (None,) * 3
        if (
            type(function) is not Name
            or _CALLS.get(function.name) not in (Values._tensor, Values._parameter)
            or type(kind) is not Name
            or kind.name not in ('torch.Tensor', 'torch._tensor.Tensor', _PARAMETER)
            or type(inner) is not tuple
        ):
            raise _damaged(place, 'is a tensor of a subclass')
        return _CALLS[function.name](self, Call(function, inner), inner, place)

    # NumPy

    def _dtype(self, record: Any, place: tuple[Any, ...]) -> np.dtype:
        """``dtype(code, False, True)`` with the state ``(3, byte order, ...)``."""
        named = type(record) is Call and type(record.function) is Name
        if (
            not named
            or record.function.name != 'numpy.dtype'
            or type(record.arguments) is not tuple
        ):
            raise _damaged(place, 'is an array without a type')
        code = record.arguments[0] if record.arguments else None
        state = record.state
        order = state[1] if type(state) is tuple and len(state) > 1 else '|'
        if type(code) is not str or code not in _NUMBERS:
            raise _damaged(place, f'is an array of {shown(code)}, and only numbers are read')
        if type(order) is not str or order not in ('<', '>', '|', '='):
            raise _damaged(place, 'is an array without a byte order')
        return _numpy().dtype(order + code)

    def _array(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> np.ndarray:
        """``_reconstruct(...)`` with the state ``(version, shape, dtype, fortran, bytes)``."""
        state = call.state
        if type(state) is not tuple or len(state) != 5:
            raise _damaged(place, 'is an array without contents')
        _, shape, dtype, fortran, content = state
        array = self._filled(content, dtype, shape, 'F' if fortran is True else 'C', place)
        # Like NumPy, the result has the byte order of this machine.
        return array.astype(array.dtype.newbyteorder('='), copy=False)

    def _buffer(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> np.ndarray:
        """``_frombuffer(bytes, dtype, shape, order)``, as protocol 5 writes arrays."""
        if len(arguments) != 4:
            raise _damaged(place, 'is an array without contents')
        content, dtype, shape, order = arguments
        return self._filled(content, dtype, shape, order, place)

    def _filled(
        self, content: Any, dtype: Any, shape: Any, order: Any, place: tuple[Any, ...]
    ) -> np.ndarray:
        shape, dtype = _whole(shape, place), self._dtype(dtype, place)
        content = self.build(content, place)
        if type(content) not in (bytes, bytearray) or order not in ('C', 'F') or len(shape) > 32:
            raise _damaged(place, 'is an array without contents')
        self._spend(len(content), place)
        whole = math.prod(max(length, 1) for length in shape) * dtype.itemsize
        if len(content) != math.prod(shape) * dtype.itemsize or whole >= _LARGEST:
            raise _damaged(
                place, f'is an array of shape {shape} with {len(content)} bytes of {dtype}'
            )
        return _numpy().frombuffer(bytes(content), dtype).reshape(shape, order=order).copy(order)

    def _scalar(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> np.generic:
        """``scalar(dtype, bytes)``."""
        if len(arguments) != 2:
            raise _damaged(place, 'is a number without contents')
        return self._filled(arguments[1], arguments[0], (1,), 'C', place)[0]

    # MMEngine

    def _history(self, call: Call, arguments: tuple, place: tuple[Any, ...]) -> Any:
        if type(call.state) is not Mapping:
            raise _damaged(place, 'is a history without contents')
        fields = {key: value for key, value in call.state.items if type(key) is str}
        if len(fields) != len(call.state.items) or not set(fields) <= _HISTORY_FIELDS:
            raise _damaged(place, 'is a history with more than a history has')
        methods = fields.get('statistics_methods')
        for name, method in methods.items if type(methods) is Mapping else ():
            if type(name) is not str or not _is_statistic(name, method):
                raise UnsafeCheckpointError(
                    f'holds {_spelled(place)}, a history with a statistic of its own, {shown(name)}'
                )
        logs = self.build(fields.get('_log_history'), place)
        counts = self.build(fields.get('_count_history'), place)
        longest, array = fields.get('max_length'), _numpy().ndarray
        if (
            not all(type(part) is array and part.ndim == 1 for part in (logs, counts))
            or type(longest) is not int
            or not len(logs) == len(counts) <= longest < _LARGEST
            or not all(part.dtype.kind in 'biuf' for part in (logs, counts))
        ):
            raise _damaged(place, 'is a history whose lengths do not fit, or of no real numbers')
        self._spend(logs.nbytes + counts.nbytes, place)
        try:
            from mmengine.logging import HistoryBuffer
        except ModuleNotFoundError:
            return dict(log_history=logs, count_history=counts, max_length=longest)
        return HistoryBuffer(logs, counts, longest)


_PARAMETER = 'torch.nn.parameter.Parameter'
_CALLS: dict[str, Callable[[Values, Call, tuple, tuple[Any, ...]], Any]] = {
    'collections.OrderedDict': Values._ordered_dict,
    'collections.Counter': Values._counter,
    'argparse.Namespace': Values._namespace,
    'mmengine.config.config.ConfigDict': Values._config,
    'builtins.set': Values._set,
    'builtins.bytes': Values._bytes,
    'builtins.bytearray': Values._bytearray,
    'builtins.complex': Values._complex,
    '_codecs.encode': Values._encode,
    'torch.Size': Values._size,
    'torch.device': Values._device,
    'torch._utils._rebuild_tensor': Values._tensor,
    'torch._utils._rebuild_tensor_v2': Values._tensor,
    'torch._utils._rebuild_tensor_v3': Values._tensor,
    'torch._utils._rebuild_parameter': Values._parameter,
    'torch._utils._rebuild_parameter_with_state': Values._parameter,
    _PARAMETER: Values._parameter,
    'torch._tensor._rebuild_from_type_v2': Values._from_type,
    _HISTORY: Values._history,
    **{
        f'numpy.{core}.{name}': method
        for core in ('core', '_core')
        for name, method in {
            'multiarray._reconstruct': Values._array,
            'multiarray.scalar': Values._scalar,
            'numeric._frombuffer': Values._buffer,
        }.items()
    },
}
# All names that a checkpoint may use. Some of them have a meaning only inside certain calls.
KNOWN = {
    *_CALLS, *_DTYPES, *_STORAGE_NAMES, *_UNREAD, *_UNREAD_PARTS,
    'builtins.getattr', 'numpy.ndarray', 'numpy.dtype', 'torch.Tensor', 'torch._tensor.Tensor',
    *(f'{_HISTORY}.{name}' for name in _STATISTICS),
}  # fmt: skip


def _numpy() -> Any:
    """The module, which PyTorch does not need."""
    try:
        import numpy
    except ModuleNotFoundError as error:
        raise ImportError(
            'The checkpoint holds arrays of NumPy. To read it: pip install numpy'
        ) from error
    return numpy


def _is_statistic(name: str, method: Any) -> bool:
    """Whether a record stands for ``HistoryBuffer.<name>``, a statistic that every history has."""
    if name not in _STATISTICS:
        return False
    if type(method) is Name:
        return method.name == f'{_HISTORY}.{name}'
    match method:
        case Call(function=Name('builtins.getattr'), arguments=(Name(owner), attribute)):
            return owner == _HISTORY and attribute == name
    return False


def storage_width(kind: Any) -> int | None:
    """Bytes of an element of a storage. None if ``kind`` is not a class of storages.

    Args:
        kind: The record of the class.
    """
    name = kind.name if type(kind) is Name else ''
    dtype = _STORAGE_NAMES.get(name)
    return _QUANTIZED.get(name) if dtype is None else _itemsize(dtype)


def _itemsize(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _whole(record: Any, place: tuple[Any, ...]) -> tuple[int, ...]:
    """Checks and returns a shape or strides."""
    if (
        type(record) not in (tuple, list, torch.Size)
        or len(record) > 64
        or not all(type(number) is int and 0 <= number < _LARGEST for number in record)
    ):
        raise _damaged(place, 'has a shape of something else than whole numbers')
    return tuple(record)


def _known(metadata: Any) -> OrderedDict:
    """Keeps the versions of modules and temperatures: others could change how a module loads."""
    given = metadata.items() if isinstance(metadata, dict) else ()
    known = OrderedDict()
    for name, entry in given:
        if type(name) is str and isinstance(entry, dict) and type(entry.get('version')) is int:
            known[name] = {'version': entry['version']}
            if type(entry.get('temperature')) is float:
                known[name]['temperature'] = entry['temperature']
    return known


def _spelled(place: tuple[Any, ...]) -> str:
    keys = [
        key
        if isinstance(key, str)
        else str(key)
        if key.__class__ is int and abs(key) < 1e9
        else '?'
        for key in place
    ]
    return shown('.'.join(key[:200] for key in keys)) or 'a value'


def _damaged(place: tuple[Any, ...], what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f'holds {_spelled(place)}, which {what}')

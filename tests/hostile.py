"""Files that would run code or alter the process if anything called what they name.

Payloads are harmless: they make a folder, or set an attribute called ``altered_by_a_file``.
"""

import argparse
import builtins
import collections
import copyreg
import functools
import io
import operator
import os
import pickle
import struct
import types
import zipfile

import mmengine
import numpy as np
import torch
import torch._dynamo  # replaces a function of torch when it is first used
from mmengine.logging import HistoryBuffer, MessageHub
from torch import nn

MARK = 'altered_by_a_file'


class Calls:
    """Pickles as a call of a function, with what pickle puts into its result."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def text(value):
    encoded = value.encode()
    return b'X' + struct.pack('<I', len(encoded)) + encoded


def name(module, attribute):
    return f'c{module}\n{attribute}\n'.encode()


STATE = b'}' + text(MARK) + b'K\x01s'  # {'altered_by_a_file': 1}
EMPTY = b')'


def payloads(made):
    """By what they try, pickles of protocol 2 that a naive reader would let act.

    Args:
        made: A folder that must not be there afterwards.
    """
    path = text(str(made))
    mkdir = name('os', 'mkdir') + path + b'\x85R'
    getattr_ = name('__builtin__', 'getattr')
    history = name('mmengine.logging.history_buffer', 'HistoryBuffer')
    reconstruct = name('numpy.core.multiarray', '_reconstruct')
    raw = {
        'a call': mkdir,
        'a call by another name of the module': name('posix', 'mkdir') + path + b'\x85R',
        'a call in a call': name('torch', 'Size') + b'(' + mkdir + b'K\x00tR\x85R',
        'a call as a key': b'}' + mkdir + b'K\x01s',
        'an object of a class': name('os', 'mkdir') + path + b'\x85\x81',
        'an old instance': b'(' + path + b'ios\nmkdir\n',
        'an old object': b'(' + name('os', 'mkdir') + path + b'o',
        'a class with keywords': name('os', 'mkdir') + path + b'\x85}\x92',
        'an extension': b'\x82\x01',
        'a stacked name': text('os') + text('mkdir') + b'\x93' + path + b'\x85R',
        'a dotted name': text('os') + text('path.os.mkdir') + b'\x93' + path + b'\x85R',
        'evaluated text': name('__builtin__', 'eval')
        + text(f'__import__("os").mkdir({str(made)!r})')
        + b'\x85R',
        'a history as a door': getattr_ + history + text('__init__') + b'\x86R',
        'the globals of a statistic': getattr_
        + (getattr_ + history + text('min') + b'\x86R')
        + text('__globals__')
        + b'\x86R',
        'attributes of the class of tensors': name('torch', 'Tensor') + STATE + b'b',
        'attributes of parameters': name('torch.nn.parameter', 'Parameter') + STATE + b'b',
        'attributes of histories': history + STATE + b'b',
        'slots of the class of tensors': name('torch', 'Tensor') + b'N' + STATE + b'\x86b',
        'attributes by the type of a tensor': name('torch._tensor', '_rebuild_from_type_v2')
        + b'('
        + (getattr_ + history + b'N' + STATE + b't')
        + b'R',
        'a statistic of its own': history
        + EMPTY
        + b'\x81}('
        + (text('max_length') + b'K\x09')
        + (text('statistics_methods') + b'}' + text('mean') + name('os', 'mkdir') + b's')
        + b'ub',
        'a statistic under a new name': history
        + EMPTY
        + b'\x81}('
        + (text('max_length') + b'K\x09')
        + (text('statistics_methods') + b'}' + text(MARK) + history + b's')
        + b'ub',
        'an array of a class of its choice': reconstruct
        + (name('os', 'mkdir') + b'K\x00\x85' + text('b') + b'\x87R'),
        'the state of an array': name('numpy', 'ndarray') + STATE + b'b',
        'a type with fields': name('numpy', 'dtype') + text('O') + b'\x85R',
        'a scalar of objects': name('numpy.core.multiarray', 'scalar')
        + (name('numpy', 'dtype') + text('O8') + b'\x89\x88\x87R')
        + mkdir
        + b'\x86R',
        'NumPy loading': name('numpy', 'load') + path + b'\x85R',
        'another codec': name('_codecs', 'encode') + text('abc') + text('rot13') + b'\x86R',
        'memory': name('__builtin__', 'bytearray') + b'\x8a\x06' + b'\xff' * 5 + b'\x00\x85R',
        'a persistent module': name('os', 'mkdir') + path + text('') + b'\x87Q',
        'an ordered dict with methods': name('collections', 'OrderedDict')
        + EMPTY
        + b'R}'
        + (text('copy') + mkdir + b's')
        + b'b',
        'a storage that is a pickle': name('torch.storage', '_load_from_bytes')
        + (name('_codecs', 'encode') + text('x') + text('latin1') + b'\x86R')
        + b'\x85R',
        'a function of torch': name('torch._utils', '_import_dotted_name')
        + text('os.mkdir')
        + b'\x85R',
        'a function of MMEngine': name('mmengine.utils.misc', 'get_object_from_string')
        + text('os.mkdir')
        + b'\x85R',
        'an instance of a hub': name('mmengine.logging.message_hub', 'MessageHub')
        + text(MARK)
        + b'\x85R',
        'a result as a function': mkdir + EMPTY + b'R',
        'a network': name('torch.nn.modules.linear', 'Linear') + b'K\x01K\x01\x86R',
        'a partial function': name('functools', 'partial') + name('os', 'mkdir') + path + b'\x86R',
        'an attribute getter': name('operator', 'attrgetter') + text('mkdir') + b'\x85R',
        'a namespace of code': name('argparse', 'Namespace') + EMPTY + b'\x81}'
        + (text('f') + mkdir + b's')
        + b'b',
        'a reconstructed object': name('copy_reg', '_reconstructor')
        + (name('os', 'mkdir') + name('__builtin__', 'object') + b'N\x87R'),
    }  # fmt: skip
    return {kind: b'\x80\x02' + code + b'.' for kind, code in raw.items()}


def inside(payload):
    """The pickle of a checkpoint that holds a payload beside a tensor-free state dict."""
    body = payload[2:-1]
    return b'\x80\x02}(' + text('state_dict') + b'}' + text('extra') + body + b'u.'


def zip_file(path, pickled, **records):
    """A file as torch writes it from 1.6 on; with storages, if they are given by their records."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as file:
        for record, content in (
            ('data.pkl', pickled),
            ('byteorder', b'little'),
            ('version', b'3\n'),
            *records.items(),
        ):
            file.writestr(f'archive/{record}', content)


def old_file(path, pickled):
    """A file as torch wrote it up to 1.5."""
    stream = io.BytesIO()
    pickle.dump(0x1950A86A20F9469CFC6C, stream, 2)
    pickle.dump(1001, stream, 2)
    pickle.dump(dict(protocol_version=1001, little_endian=True, type_sizes={}), stream, 2)
    stream.write(pickled)
    pickle.dump([], stream, 2)
    path.write_bytes(stream.getvalue())


FORMATS = {'zip': zip_file, 'old': old_file}


def namespaces():
    """What a file could alter: names, and what they mean now."""
    spaces = [builtins, os, operator, functools, collections, copyreg, argparse, pickle, io]
    spaces += [torch, torch.nn, torch._utils, torch._tensor, torch.storage, torch.serialization]
    spaces += [torch.Tensor, nn.Parameter, nn.Module, torch.Size, collections.OrderedDict]
    spaces += [np, np.ndarray, np.dtype, np.random, mmengine, mmengine.logging, HistoryBuffer]
    spaces += [MessageHub, argparse.Namespace]
    found = {
        f'{space.__name__}.{key}': id(value)
        for space in spaces
        for key, value in vars(space).items()
        # Submodules come as they are imported.
        if not isinstance(value, types.ModuleType)
    }
    found.update({f'statistic {k}': id(v) for k, v in HistoryBuffer._statistics_methods.items()})
    found['allowed'] = sorted(map(str, torch.serialization.get_safe_globals()))
    return found


def altered(before):
    """The names that are not as before, but for new ones, which libraries add as they are used."""
    now = namespaces()
    new = [name for name in now if name not in before and MARK in name]
    return [name for name, value in before.items() if now.get(name) != value] + new

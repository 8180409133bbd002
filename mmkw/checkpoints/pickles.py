"""Reads pickles as data: names and calls become records, and nothing is imported or called.

:mod:`.values` then builds real objects from the records.
"""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from .errors import DamagedCheckpointError, shown

# Python 2's name of a module.
_RENAMED = {'__builtin__': 'builtins'}
# The operations that put their own argument on the stack.
_VALUES = {
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'BINFLOAT', 'BINSTRING', 'SHORT_BINSTRING',
    'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8',
    'BYTEARRAY8',
}  # fmt: skip
# The most characters of a name. The longest name that a checkpoint needs is half as long.
_LONGEST_NAME = 200
# Lies on the stack below the items of a container.
_MARK = object()


@dataclass(eq=False, slots=True)
class Name:
    """A global that a pickle names, such as ``collections.OrderedDict``."""

    name: str


@dataclass(eq=False, slots=True)
class Call:
    """A call that a pickle asks for: function, arguments, and items and state of the result."""

    function: Any
    arguments: Any
    items: list[tuple[Any, Any]] = field(default_factory=list)
    state: Any = None


@dataclass(eq=False, slots=True)
class Mapping:
    """A dict, as a list of pairs."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Unordered:
    """A set, as a list of elements."""

    elements: list[Any] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class External:
    """An object outside the pickle, such as a storage. ``identity`` describes it."""

    identity: Any


def parse(file: BinaryIO, names: set[str]) -> Any:
    """Reads one pickle of protocol 2 to 5, from the current position of a file.

    Args:
        file: A binary file in memory.
        names: Every global in the pickle is added to this set. So the caller knows them also after
            an error.

    Returns:
        Constants, lists and tuples, and records for everything else.

    Raises:
        DamagedCheckpointError: If this is not a pickle, or has an operation that data does not
            need.
    """
    machine = _Machine(names)
    try:
        for operation, argument, _ in pickletools.genops(file):
            machine.take(operation.name, argument)
    except ValueError as error:
        raise _broken(f'is not whole: {shown(str(error))}') from error
    return machine.pop()


def externals(tree: Any) -> Iterator[Any]:
    """Yields the identity of every external record in a tree.

    Args:
        tree: A result of :func:`parse`.
    """
    seen: set[int] = set()
    left = [tree]
    while left:
        record = left.pop()
        if id(record) in seen:
            continue
        seen.add(id(record))
        match record:
            case External(identity):
                yield identity
            case list() | tuple():
                left += record
            case Mapping(items):
                left += items
            case Unordered(elements):
                left += elements
            case Call():
                left += (record.function, record.arguments, record.items, record.state)


class _Machine:
    """The stack machine of pickle, without its calls."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.known: dict[str, Name] = {}
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def take(self, operation: str, argument: Any) -> None:
        """Runs one operation. The cases are ordered by how often they occur."""
        push = self.stack.append
        if operation in _VALUES:
            push(argument)
            return
        match operation:
            case 'BINPUT' | 'LONG_BINPUT':
                self.memo[argument] = self.top()
            case 'BINGET' | 'LONG_BINGET':
                if argument not in self.memo:
                    raise _broken('recalls what it never remembered')
                push(self.memo[argument])
            case 'MEMOIZE':
                self.memo[len(self.memo)] = self.top()
            case 'MARK':
                push(_MARK)
            case 'TUPLE':
                push(tuple(self.gather()))
            case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                push(tuple([self.pop() for _ in range(int(operation[-1]))][::-1]))
            case 'REDUCE' | 'NEWOBJ':
                arguments, function = self.pop(), self.pop()
                push(Call(function, arguments))
            case 'BINPERSID':
                push(External(self.pop()))
            case 'NEWFALSE':
                push(False)
            case 'NEWTRUE':
                push(True)
            case 'NONE':
                push(None)
            case 'GLOBAL':
                self.name(*argument.split(' ', 1))
            case 'STACK_GLOBAL':
                name, module = self.pop(), self.pop()
                self.name(module, name)
            case 'EMPTY_TUPLE':
                push(())
            case 'EMPTY_LIST':
                push([])
            case 'EMPTY_DICT':
                push(Mapping())
            case 'EMPTY_SET':
                push(Unordered())
            case 'SETITEM':
                value, key = self.pop(), self.pop()
                self.top(Mapping, Call).items.append((key, value))
            case 'SETITEMS':
                gathered = self.gather()
                if len(gathered) % 2:
                    raise _broken('has a key without a value')
                self.top(Mapping, Call).items.extend(zip(gathered[::2], gathered[1::2]))
            case 'APPEND':
                value = self.pop()
                self.top(list).append(value)
            case 'APPENDS':
                gathered = self.gather()
                self.top(list).extend(gathered)
            case 'ADDITEMS':
                gathered = self.gather()
                self.top(Unordered).elements.extend(gathered)
            case 'BUILD':
                state = self.pop()
                call = self.top(Call)
                if call.state is not None:
                    raise _broken('gives one object two states')
                call.state = state
            case 'PROTO' | 'FRAME' | 'STOP':
                pass
            case _:
                raise _broken(f'does {operation}, which no data needs')

    def pop(self) -> Any:
        """Takes the value on top of the stack."""
        top = self.top()
        self.stack.pop()
        return top

    def top(self, *kinds: type) -> Any:
        """The value on top of the stack. If kinds are given, it must be of one of them."""
        if not self.stack or self.stack[-1] is _MARK:
            raise _broken('takes more than it put')
        top = self.stack[-1]
        if kinds and type(top) not in kinds:
            raise _broken('puts something into no container')
        return top

    def gather(self) -> list[Any]:
        """Takes all values above the last mark, and the mark itself."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                gathered = self.stack[place + 1 :]
                del self.stack[place:]
                return gathered
        raise _broken('gathers without a mark')

    def name(self, module: Any, name: Any) -> None:
        """Puts the record of a global on the stack."""
        if type(module) is not str or type(name) is not str:
            raise _broken('names something, but not by text')
        if len(module) + len(name) > _LONGEST_NAME:
            raise _broken(f'names something of more than {_LONGEST_NAME} characters')
        full = f'{_RENAMED.get(module, module)}.{name}'
        self.names.add(full)
        self.stack.append(self.known.setdefault(full, Name(full)))


def _broken(what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f'is damaged: its pickle {what}')

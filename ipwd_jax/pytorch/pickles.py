"""Read pickles of PyTorch objects as plain data.

A pickle is a program that names functions to call. Here its instructions are carried out one by
one, and every name stands for a harmless function or an inert record of `ipwd_jax.pytorch.records`.
A name that is not listed there ends the reading, so a file cannot run anything. Nor can a small
file use much memory: memory is allocated only for bytes that the file really has, and copies are
counted.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from ipwd_jax.errors import UserError
from ipwd_jax.pytorch.records import (
    STORAGES,
    Dict,
    Function,
    NumpyArray,
    NumpyType,
    Storage,
    Tensor,
    as_set,
    hashable,
    names,
)

# Far more than any checkpoint has: a state dict takes about 40 per tensor.
_MOST_INSTRUCTIONS = 1_000_000
_DEEPEST = 100
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "STRING"}
_VALUES |= {"BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"}
_VALUES |= {"BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_NEW_VALUES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}


class Unpickler:
    """Reads one pickle. Afterwards `storages` holds the storages that it names, still to be filled.

    Args:
        file: the file to read from, up to the end of the pickle. Its `read` must not allocate more
            memory than the file has bytes, which holds for `io.BytesIO`.
    """

    def __init__(self, file: BinaryIO):
        self.storages: dict[str, Storage] = {}
        self._file = file
        self._globals = names()
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._work = 0

    def load(self) -> Any:
        """Read the object. Its tensors and arrays are records, which `plain` turns into arrays.

        Raises:
            UserError: the object needs something that is not plain data, or is far too large.
            ValueError: the pickle is one that no program writes. Other exceptions are possible too.
        """
        for instruction, argument, _ in pickletools.genops(self._file):
            if instruction.name == "STOP":
                return self._stack.pop()
            self._count(1)
            self._step(instruction.name, argument)
        raise ValueError("the pickle has no end")

    def _count(self, steps: int) -> None:
        self._work += steps
        if self._work > _MOST_INSTRUCTIONS:
            raise UserError(
                f"its pickle takes more than {_MOST_INSTRUCTIONS:,} steps, far more than weights "
                "need. In PyTorch, save model.state_dict() without other objects."
            )

    def _step(self, name: str, argument: Any) -> None:
        """Carry out an instruction; the module `pickletools` explains what each of them does."""
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._marked()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(self._global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                function, module = stack.pop(), stack.pop()
                stack.append(self._global(module, function))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "BUILD":
                state = stack.pop()
                self._build(stack[-1], state)
            case _:
                self._collect(name, argument)

    def _collect(self, name: str, argument: Any) -> None:
        """Carry out an instruction that makes a value or collects values."""
        stack = self._stack
        match name:
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "LIST":
                stack.append(self._marked())
            case "DICT":
                stack.append(dict(_pairs(self._marked())))
            case "FROZENSET":
                stack.append(frozenset(as_set(self._marked())))
            case "APPEND" | "SETITEM":
                size = 1 if name == "APPEND" else 2
                items = stack[-size:]
                del stack[-size:]
                _extend(stack[-1], items)
            case "APPENDS" | "SETITEMS" | "ADDITEMS":
                items = self._marked()
                _extend(stack[-1], items)
            case _ if name in _NEW_VALUES:
                stack.append(_NEW_VALUES[name]())
            case _ if name in _VALUES:
                stack.append(argument)
            case _:
                raise ValueError(f"plain data does not need the instruction {name}")

    def _marked(self) -> list[Any]:
        """Remove the last mark and everything above it from the stack, and return the latter."""
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _global(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a function has no name")
        try:
            return self._globals[f"{module}.{name}"]
        except KeyError:
            raise UserError(
                f"it needs {module}.{name}, which is not plain data and was not executed. In "
                "PyTorch, save model.state_dict() instead of the whole model or of other objects."
            ) from None

    def _storage(self, reference: Any) -> Storage:
        """Return the storage that a persistent identifier stands for."""
        if not isinstance(reference, tuple) or len(reference) not in (5, 6):
            raise ValueError("a reference to a storage is of an unknown kind")
        kind, storage_type, key, _, numel, *view = reference
        named = all(isinstance(x, str) for x in (kind, storage_type, key))
        if not named or not isinstance(numel, int) or kind != "storage" or any(view):
            raise ValueError("a reference to a storage is of an unknown kind")
        if key not in self.storages:
            self.storages[key] = Storage(STORAGES[storage_type], numel)
        return self.storages[key]

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Function) or not isinstance(arguments, tuple):
            raise ValueError("the pickle calls something that is not a function")
        self._count(sum(map(_length, arguments)))
        return function.call(*arguments)

    def _build(self, record: Any, state: Any) -> None:
        if not isinstance(record, Dict | Tensor | NumpyType | NumpyArray):
            raise ValueError(f"the pickle sets the state of a {type(record).__name__}")
        self._count(_length(state))
        record.build(state)


def _length(value: Any) -> int:
    """Return how many items a function can copy from an argument."""
    return len(value) if isinstance(value, list | tuple | dict | set | frozenset) else 0


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    """Return the pairs of keys and values, which alternate in `items`."""
    return [(hashable(key), value) for key, value in zip(items[::2], items[1::2], strict=True)]


def _extend(collection: Any, items: list[Any]) -> None:
    if isinstance(collection, list):
        collection.extend(items)
    elif isinstance(collection, dict):
        collection.update(_pairs(items))
    elif isinstance(collection, set):
        collection.update(as_set(items))
    else:
        raise ValueError(f"the pickle adds items to a {type(collection).__name__}")


def plain(tree: Any) -> Any:
    """Return what an `Unpickler` loaded, with its records replaced by NumPy arrays.

    The arrays are read-only views of the storages, which must be filled before.

    Raises:
        UserError: a tensor has more elements than its storage.
        ValueError: a tensor reaches beyond its storage, or `tree` is nested too deeply. Other
            exceptions are possible for a pickle that no program writes.
    """
    return _plain(tree, {})


def _plain(value: Any, done: dict[int, Any], name: str = "", depth: int = 0) -> Any:
    """Return `value` with arrays in place of records.

    Args:
        value: a part of the tree.
        done: results by the `id` of the value, because one object can be in several places.
        name: the last key on the path to `value`, for error messages.
        depth: the number of collections around `value`.
    """
    if id(value) in done:
        return done[id(value)]
    if depth > _DEEPEST:
        raise ValueError(f"lists or dictionaries are nested more than {_DEEPEST} deep")
    if isinstance(value, Tensor | NumpyArray):
        done[id(value)] = value.array(name)
    elif isinstance(value, Storage):
        done[id(value)] = value.array
    elif isinstance(value, dict):
        done[id(value)] = plain = {}
        for key, item in value.items():
            inner = key if isinstance(key, str) else name
            plain[key] = _plain(item, done, inner, depth + 1)
    elif isinstance(value, list | tuple):
        items = (_plain(item, done, name, depth + 1) for item in value)
        done[id(value)] = type(value)(items)
    else:
        return value
    return done[id(value)]

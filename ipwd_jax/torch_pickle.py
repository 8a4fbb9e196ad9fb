"""Pickles of PyTorch objects, read as plain data.

A pickle is a program that names functions to call. Here every name stands for an inert function
or record of this module, and a name that is not listed ends the reading: no file can run anything.
"""

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from ipwd_jax.errors import UserError

STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "UntypedStorage": np.dtype("u1"),
    "TypedStorage": np.dtype("u1"),
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8")
_DTYPES += ("uint8", "bool")


class _Global:
    """A callable in a pickle. It takes no state, so that no file can change it for the next."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a function with a state")


class _Dict(dict):
    """A dictionary whose further attributes, such as the `_metadata` of a state dict, are lost."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Namespace(_Dict):
    """The attributes of an `argparse.Namespace`, as a dictionary."""

    def __setstate__(self, state: dict) -> None:
        self.update(state)


class _Storage:
    """The numbers that tensors are views of; they are filled in when the pickle is read."""

    def __init__(self, dtype: np.dtype, numel: int, limit: int):
        if not 0 <= numel * dtype.itemsize <= limit:
            raise ValueError(f"a storage of {numel} x {dtype} in a file of {limit} bytes")
        self.array = np.zeros(numel, dtype)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a storage with a state")

    def fill(self, data: bytes) -> None:
        if len(data) != self.array.nbytes:
            raise ValueError(f"a storage has {len(data)} bytes instead of {self.array.nbytes}")
        self.array[:] = np.frombuffer(data, self.array.dtype)


class _Tensor:
    """A view of a storage. Not an array yet: those would obey a pickle's instructions."""

    def __init__(self, storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any):
        self.view = (storage, offset, tuple(size), tuple(stride))

    def __setstate__(self, state: Any) -> None:
        pass  # attributes of a Parameter

    def array(self) -> np.ndarray:
        storage, offset, size, stride = self.view
        steps = [(n - 1) * step for n, step in zip(size, stride, strict=True)]
        last = offset + sum(steps) if 0 not in size else offset - 1
        if min((offset, *size, *stride)) < 0 or last >= len(storage.array):
            raise ValueError(f"a tensor of shape {size} leaves its storage")
        strides = [step * storage.array.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage.array[offset:], size, strides)


class _NumpyType:
    """A `numpy.dtype` of plain numbers."""

    def __init__(self, name: str, *_: Any):
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "biufc":
            raise ValueError(f"NumPy data of type {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _NumpyArray:
    """A `numpy.ndarray`, whose contents follow its creation."""

    def __init__(self, *_: Any):
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, numpy_type, by_column, data = self.state
        flat = np.frombuffer(_encode(data), numpy_type.dtype)
        return flat.reshape(shape, order="F" if by_column else "C").copy()


def _encode(text: str | bytes, _: str = "latin1") -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin1")


def _numpy_scalar(numpy_type: _NumpyType, data: str | bytes) -> Any:
    return np.frombuffer(_encode(data), numpy_type.dtype, count=1)[0].item()


def _globals() -> dict[str, Any]:
    """What the names in a pickle stand for."""
    tensor, first = _Global(_Tensor), _Global(lambda value, *_: value)
    table = {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": first,
        "torch.nn.parameter.Parameter": first,
        "torch.Size": _Global(tuple),
        "torch.device": _Global(lambda *parts: ":".join(map(str, parts))),
        "collections.OrderedDict": _Global(_Dict),
        "collections.Counter": _Global(_Dict),
        "collections.defaultdict": _Global(lambda *_: _Dict()),
        "argparse.Namespace": _Namespace,
        "_codecs.encode": _Global(_encode),
        "numpy.dtype": _Global(_NumpyType),
        "numpy.ndarray": "numpy.ndarray",
    }
    for module in ("builtins", "__builtin__"):
        table |= {f"{module}.set": _Global(set), f"{module}.bytes": _Global(lambda: b"")}
    for module in ("numpy.core", "numpy._core"):
        table[f"{module}.multiarray._reconstruct"] = _Global(_NumpyArray)
        table[f"{module}.multiarray.scalar"] = _Global(_numpy_scalar)
    for module in ("torch", "torch.cuda", "torch.storage"):
        table |= {f"{module}.{name}": name for name in STORAGES}
    return table | {f"torch.{name}": f"torch.{name}" for name in _DTYPES}


class Unpickler(pickle.Unpickler):
    """Reads one pickle; `storages` then has those it names, still to be filled.

    Args:
        file: to read from.
        limit: largest storage in bytes.
    """

    def __init__(self, file: BinaryIO, limit: int):
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, _Storage] = {}
        self._limit = limit
        self._globals = _globals()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._globals[f"{module}.{name}"]
        except KeyError:
            raise UserError(
                f"it needs {module}.{name}, which is not plain data and was not executed. In "
                "PyTorch, save model.state_dict() instead of the whole model or of other objects."
            ) from None

    def persistent_load(self, pid: tuple) -> _Storage:
        kind, storage_type, key, _, numel, *view = pid
        if kind != "storage" or (view and view[0]):
            raise ValueError(f"an unknown kind of reference, {pid!r}")
        if key not in self.storages:
            self.storages[key] = _Storage(STORAGES[storage_type], numel, self._limit)
        return self.storages[key]


def plain(tree: Any) -> Any:
    """What an `Unpickler` loaded, with NumPy arrays, views of filled storages, for its records.

    Raises:
        ValueError: a tensor leaves its storage; and others for what no program writes.
    """
    return _plain(tree, {})


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """`value` with arrays in place of records; `done` by id, as one object may be in two places."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, _Tensor | _NumpyArray):
        done[id(value)] = value.array()
    elif isinstance(value, _Storage):
        done[id(value)] = value.array
    elif isinstance(value, dict):
        done[id(value)] = plain = {}
        plain.update((key, _plain(item, done)) for key, item in value.items())
    elif isinstance(value, list | tuple):
        done[id(value)] = type(value)(_plain(item, done) for item in value)
    else:
        return value
    return done[id(value)]

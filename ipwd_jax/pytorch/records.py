"""What the names in a PyTorch pickle stand for: inert records, and the functions that make them.

`ipwd_jax.pytorch.pickles` calls these functions with whatever arguments a file gives. None of them
needs more memory than its arguments, or time out of proportion to their size. None prints its
arguments, because their text can be exponentially long.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

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
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
_MOST_AXES = 64  # NumPy's limit
_LONGEST_NAME = 20  # for devices and NumPy types


class Function:
    """A function that a pickle is allowed to call."""

    __slots__ = ("call",)

    def __init__(self, call: Callable):
        self.call = call


class Dict(dict):
    """A dictionary that drops all attributes, such as the `_metadata` of a state dict."""

    def build(self, state: Any) -> None:
        pass


class Namespace(Dict):
    """The attributes of an `argparse.Namespace`, as a dictionary."""

    def build(self, state: dict) -> None:
        self.update(state)


class Storage:
    """The data that tensors are views of, which a file keeps outside its pickle.

    Raises:
        ValueError: `fill` gets more or fewer bytes than announced, or `array` is read before
            `fill` was called.
    """

    def __init__(self, dtype: np.dtype, numel: int):
        self.dtype, self.numel = dtype, numel
        self._array: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def array(self) -> np.ndarray:
        if self._array is None:
            raise ValueError("the data of a storage is missing")
        return self._array

    def fill(self, data: bytes) -> None:
        if len(data) != self.nbytes:
            raise ValueError(f"a storage has {len(data)} bytes instead of {self.nbytes}")
        self._array = np.frombuffer(data, self.dtype)


class Tensor:
    """A view of a storage. It is not an array yet, because its storage is filled later.

    Raises:
        UserError: the view has more elements than its storage.
        ValueError: the view reaches beyond its storage, or is not a view at all.
    """

    def __init__(self, storage: Storage, offset: int, size: tuple, stride: tuple, *others: Any):
        # After `requires_grad` and the hooks, there is metadata, such as that numbers are negated.
        if any(others[2:]):
            raise UserError(
                "a tensor is a lazily negated or conjugated one. In PyTorch, save "
                "tensor.resolve_neg().resolve_conj() in its place."
            )
        numbers = (offset, *size, *stride)
        if not isinstance(storage, Storage) or not all(isinstance(n, int) for n in numbers):
            raise ValueError("a tensor is not a view of a storage")
        if len(size) > _MOST_AXES:
            raise ValueError(f"a tensor has {len(size)} axes")
        self.view = (storage, offset, tuple(size), tuple(stride))

    def build(self, state: Any) -> None:
        pass  # the attributes of a Parameter are ignored

    def array(self, name: str) -> np.ndarray:
        storage, offset, size, stride = self.view
        steps = [(n - 1) * step for n, step in zip(size, stride, strict=True)]
        last = offset + sum(steps) if 0 not in size else offset - 1
        if min((offset, *size, *stride)) < 0 or last >= storage.numel:
            raise ValueError(f"a tensor of shape {size} reaches beyond its storage")
        if math.prod(size) > storage.numel:
            raise UserError(
                f"the tensor {name!r} of shape {size} repeats the {storage.numel} elements that "
                "the file has for it. In PyTorch, save tensor.contiguous() in its place."
            )
        # The stride of an axis of size one is never used, and PyTorch allows it to be anything.
        used = [step if n > 1 else 0 for n, step in zip(size, stride, strict=True)]
        strides = [step * storage.dtype.itemsize for step in used]
        return np.lib.stride_tricks.as_strided(storage.array[offset:], size, strides)


class NumpyType:
    """A `numpy.dtype` of numbers or Booleans."""

    def __init__(self, name: str, *_: Any):
        if not isinstance(name, str) or len(name) > _LONGEST_NAME:
            raise ValueError("a NumPy type has no valid name")
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "biufc":
            raise ValueError(f"NumPy data has the type {self.dtype}")

    def build(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class NumpyArray:
    """A `numpy.ndarray`, which is created first and filled afterwards."""

    def __init__(self, encode: Callable):
        self._encode = encode
        self._array: np.ndarray | None = None

    def build(self, state: tuple) -> None:
        _, shape, numpy_type, by_column, data = state
        # Without a copy, arrays that share their bytes in the file also share them in memory.
        flat = np.frombuffer(self._encode(data), numpy_type.dtype)
        self._array = flat.reshape(shape, order="F" if by_column else "C")

    def array(self, _: str) -> np.ndarray:
        if self._array is None:
            raise ValueError("the data of a NumPy array is missing")
        return self._array


def _encoder() -> Callable[..., bytes]:
    """Return a function that turns the strings of Python 2 into bytes.

    If it is called again with the same text, it returns the same object.
    """
    done: dict[str, bytes] = {}

    def encode(text: str | bytes, *_: Any) -> bytes:
        if isinstance(text, bytes):
            return text
        if not isinstance(text, str):
            raise ValueError("an encoded object is not text")
        if text not in done:
            done[text] = text.encode("latin1")
        return done[text]

    return encode


def _numpy_scalar(encode: Callable, numpy_type: NumpyType, data: str | bytes) -> Any:
    return np.frombuffer(encode(data), numpy_type.dtype, count=1)[0].item()


def _device(kind: str, index: int | None = None) -> str:
    if not isinstance(kind, str) or len(kind) > _LONGEST_NAME or not isinstance(index, int | None):
        raise ValueError("a device has no valid name")
    return kind if index is None else f"{kind}:{index}"


def hashable(value: Any) -> Any:
    """Return `value` if it is safe to compute its hash.

    Hashing nested tuples takes a time that is exponential in their depth if they share parts, and
    overflows the stack if they are nested deeply.

    Raises:
        ValueError: `value` is a nested tuple or a long one, or has a number of which many have one
            hash.
    """
    parts = value if isinstance(value, tuple) else (value,)
    if any(isinstance(x, int | float) and abs(x) >= 2**60 for x in parts):
        raise ValueError("a key has a huge number")
    if isinstance(value, tuple) and (len(value) > 10 or any(isinstance(x, tuple) for x in value)):
        raise ValueError("a key is a long or nested tuple")
    return value


def as_set(items: Iterable = ()) -> set:
    """Return a set of `items`, each of which must be `hashable`."""
    return {hashable(item) for item in items}


def as_dict(items: Iterable[tuple[Any, Any]] | Mapping = ()) -> Dict:
    """Return a dictionary of `items`, whose keys must be `hashable`."""
    pairs = items.items() if isinstance(items, Mapping) else items
    return Dict((hashable(key), value) for key, value in pairs)


def names() -> dict[str, Any]:
    """Return the functions and strings that the names `module.name` in one pickle stand for."""
    encode = _encoder()
    tensor, first = Function(Tensor), Function(lambda value, *_: value)
    table = {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": first,
        "torch.nn.parameter.Parameter": first,
        "torch.Size": Function(tuple),
        "torch.device": Function(_device),
        "collections.OrderedDict": Function(as_dict),
        "collections.Counter": Function(as_dict),
        "collections.defaultdict": Function(lambda *_: Dict()),
        "argparse.Namespace": Function(lambda: Namespace()),
        "_codecs.encode": Function(encode),
        "numpy.dtype": Function(NumpyType),
        "numpy.ndarray": "numpy.ndarray",
    }
    for module in ("builtins", "__builtin__"):
        table |= {f"{module}.set": Function(as_set), f"{module}.bytes": Function(lambda: b"")}
    for module in ("numpy.core", "numpy._core"):
        make, scalar = (lambda *_: NumpyArray(encode)), functools.partial(_numpy_scalar, encode)
        table[f"{module}.multiarray._reconstruct"] = Function(make)
        table[f"{module}.multiarray.scalar"] = Function(scalar)
    for module in ("torch", "torch.cuda", "torch.storage"):
        table |= {f"{module}.{name}": name for name in STORAGES}
    return table | {f"torch.{name}": f"torch.{name}" for name in _DTYPES}

"""Read and write the files of `torch.save` and of safetensors as NumPy arrays, without PyTorch.

The pickles in them are read by `ipwd_jax.pytorch.pickles`, which accepts plain data only and
executes nothing.
"""

import io
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy

from ipwd_jax import writers
from ipwd_jax.errors import UserError, first_line
from ipwd_jax.pytorch.pickles import Unpickler, plain
from ipwd_jax.pytorch.records import STORAGES

SAFETENSORS = ".safetensors"
_MAGIC = 0x1950A86A20F9469CFC6C  # the first object in a legacy file
_SAFETENSORS_TYPES = {
    "F64": STORAGES["DoubleStorage"],
    "F32": STORAGES["FloatStorage"],
    "F16": STORAGES["HalfStorage"],
    "BF16": STORAGES["BFloat16Storage"],
    "I64": STORAGES["LongStorage"],
    "I32": STORAGES["IntStorage"],
    "I16": STORAGES["ShortStorage"],
    "I8": STORAGES["CharStorage"],
    "U8": STORAGES["ByteStorage"],
    "BOOL": STORAGES["BoolStorage"],
}


def load(path: pathlib.Path) -> Any:
    """Read a file that `torch.save` wrote in either of its formats, or a `.safetensors` file.

    Returns:
        The saved object, which consists of dicts, lists, tuples, sets, strings and numbers. Tensors
        and NumPy arrays are returned as `np.ndarray`, and bfloat16 as `ml_dtypes.bfloat16`.

    Raises:
        UserError: the file is missing, damaged or of a different format, or needs something that is
            not plain data. Nothing in it was executed.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            file.seek(0)
            if not start:
                raise UserError(f"{path} is empty")
            if path.suffix == SAFETENSORS:
                return _load_safetensors(file)
            if start.startswith(b"PK"):
                return _load_zip(file)
            if start[0] != 0x80:  # how every pickle of protocol 2 starts
                raise UserError(f"{path} was not written by torch.save: it starts with {start!r}")
            return _load_legacy(file)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # no list exists of what damaged bytes can raise
        detail = first_line(error)
        raise UserError(
            f"{path} cannot be read ({detail}); it is incomplete or was not written by "
            f"{'safetensors' if path.suffix == SAFETENSORS else 'torch.save'}. Copy it again."
        ) from error


def save(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors to a state dict that `torch.load(path, weights_only=True)` reads.

    If `path` ends in .safetensors, a file of that format is written instead.

    Args:
        path: the file to write, which must not exist; it appears whole or not at all.
        tensors: the tensors by name.

    Raises:
        UserError: `path` exists, cannot be written or does not end in .pth, .pt or .safetensors; or
            PyTorch lacks the type of a tensor.
    """
    if path.suffix not in (".pth", ".pt", SAFETENSORS):
        raise UserError(f"the file to write must end in .pth, .pt or {SAFETENSORS}, found {path}")
    if os.path.exists(path):  # False for a name that no file can have
        raise UserError(f"{path} exists already; delete it or choose another name")
    if path.suffix == SAFETENSORS:
        data = safetensors.numpy.save({k: np.array(v, order="C") for k, v in tensors.items()})
    else:
        data = _zip(tensors)
    writers.write_atomically(path, data)


# Reading


def _load_safetensors(file: BinaryIO) -> dict[str, np.ndarray]:
    # `safetensors.numpy.load` is of no use, because it fails for bfloat16.
    tensors = {}
    for name, tensor in safetensors.deserialize(file.read()):
        if tensor["dtype"] not in _SAFETENSORS_TYPES:
            raise UserError(f"the tensor {name} has the type {tensor['dtype']}; save it in float32")
        flat = np.frombuffer(tensor["data"], _SAFETENSORS_TYPES[tensor["dtype"]])
        tensors[name] = flat.reshape(tensor["shape"])
    return tensors


def _load_zip(file: BinaryIO) -> Any:
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError("it is a zip archive, but not one that torch.save wrote")
        folder = pickles[0].removesuffix("data.pkl")
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UserError("it is compressed, which torch.save never does; unpack it first")
        sizes = [max(entry.file_size, entry.compress_size) for entry in entries]
        if sum(sizes) > size:
            raise ValueError(f"its parts claim {sum(sizes)} bytes, but the file has {size}")
        order = f"{folder}byteorder"
        if order in names and archive.read(order) != b"little":
            raise UserError("it was saved on a big-endian machine; save it on a little-endian one")
        reader = Unpickler(io.BytesIO(archive.read(pickles[0])))
        tree = reader.load()
        for key, storage in reader.storages.items():
            storage.fill(archive.read(f"{folder}data/{key}"))
    return plain(tree)


def _load_legacy(file: BinaryIO) -> Any:
    file = io.BytesIO(file.read())
    if Unpickler(file).load() != _MAGIC:
        raise UserError("it is a pickle, but not one that torch.save wrote")
    Unpickler(file).load()  # the version of the format, which never changed
    if not Unpickler(file).load()["little_endian"]:
        raise UserError("it was saved on a big-endian machine; save it on a little-endian one")
    reader = Unpickler(file)
    tree = reader.load()
    keys = Unpickler(file).load()
    if not all(isinstance(key, str) for key in keys):
        raise ValueError("its storages have no names")
    for key in keys:
        (numel,) = struct.unpack("<q", file.read(8))
        storage = reader.storages[key]
        if numel != storage.numel:
            raise ValueError(f"a storage has {numel} elements instead of {storage.numel}")
        storage.fill(file.read(storage.nbytes))
    return plain(tree)


# Writing


def _zip(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Encode tensors in the zip format of `torch.save`.

    Dates are fixed, so that equal tensors give equal files.
    """
    entries = {"data.pkl": _pickle(tensors), "byteorder": b"little", "version": b"3\n"}
    entries |= {f"data/{i}": x.tobytes() for i, x in enumerate(tensors.values())}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return file.getvalue()


def _pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the opcodes that rebuild an ordered dictionary of tensors with one storage each."""
    empty = b"ccollections\nOrderedDict\n)R"
    items = b"".join(_plain_pickle(k) + _tensor(i, x) for i, (k, x) in enumerate(tensors.items()))
    return b"\x80\x02" + empty + b"(" + items + b"u."


def _tensor(number: int, x: np.ndarray) -> bytes:
    names = [name for name, dtype in STORAGES.items() if dtype == x.dtype]
    if not names:
        raise UserError(f"PyTorch has no tensors of type {x.dtype}")
    strides = tuple(math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim))
    storage = b"".join(
        [
            b"(" + _plain_pickle("storage"),
            f"ctorch\n{names[0]}\n".encode(),
            *map(_plain_pickle, (str(number), "cpu", x.size)),
            b"tQ",
        ]
    )
    view = b"".join(map(_plain_pickle, (0, x.shape, strides, False)))
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + hooks + b"tR"


def _plain_pickle(value: Any) -> bytes:
    """Return the opcodes of a string, a number or a tuple, without the frame around them."""
    return pickle.dumps(value, protocol=2)[2:-1]

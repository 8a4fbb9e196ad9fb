"""Variables, files and pickles in PyTorch's formats for the tests of several modules."""

import contextlib
import pickle
import struct
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
from models_helpers import random_like

from ipwd_jax import convert
from ipwd_jax.checkpoint import load_network
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch import files, import_file
from ipwd_jax.pytorch.names import to_torch
from ipwd_jax.pytorch.networks import Fit, template_of

MEGABYTE = 2**20

# Networks


def template(name="resnet8", classes=10, channels=3):
    """Return the shapes and types of the variables of a network."""
    return template_of(Fit(name, classes, channels))


def variables(name="resnet8", classes=10, channels=3):
    """Return random variables of a network, whose variances are positive."""
    return random_like(template(name, classes, channels))


def tensors_of(torch, *arguments):
    """Return the `variables` of a network as a state dict of PyTorch."""
    return {k: torch.from_numpy(x) for k, x in to_torch(variables(*arguments)).items()}


def imported(workdir, *arguments, which="last"):
    """Return the variables of the network that was imported into a work directory."""
    return jax.device_get(load_network(workdir, which, template(*arguments))[0])


def assert_same(actual, expected):
    """Check that two trees of arrays have the same structure and equal numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Files that are refused


def assert_refused(path, *words, **arguments):
    """Check that importing `path` fails with these words and leaves nothing behind."""
    workdir = path.parent / "refused"
    before = sorted(path.parent.iterdir())
    with pytest.raises(UserError) as error:
        import_file(path, workdir, **arguments)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert sorted(path.parent.iterdir()) == before


@contextlib.contextmanager
def memory_below(limit):
    """Fail if the block has allocated `limit` bytes or more at any one time, used or not."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak / MEGABYTE:.0f} MB"


def error_of(path, capsys, *options, limit=100 * MEGABYTE):
    """Return why the command line refuses to import `path`, within `limit` bytes of memory."""
    workdir = path.parent / "refused"
    with memory_below(limit), pytest.raises(SystemExit) as end:
        convert.main(["import", str(path), f"--workdir={workdir}", *options])
    assert end.value.code == 2 and not workdir.exists()
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    return message


# Files and the pickles in them


def zip_of(data_pkl, path, storages=(), byteorder=b"little"):
    """Write the newer format of `torch.save` around a pickle and the bytes of its storages."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/byteorder", byteorder)
        for i, storage in enumerate(storages):
            archive.writestr(f"archive/data/{i}", storage)
    return path


def legacy_of(data_pkl, path, storages=()):
    """Write the older format of `torch.save`, with float32 storages."""
    header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    parts = [*(pickle.dumps(x, 2) for x in header), data_pkl]
    parts.append(pickle.dumps([str(i) for i in range(len(storages))], 2))
    parts += [struct.pack("<q", len(storage) // 4) + storage for storage in storages]
    path.write_bytes(b"".join(parts))
    return path


def text(value):
    """Return the pickle instruction that makes a string."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def function(name):
    """Return the pickle instruction that finds a function by its module and name."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode()


def view(numel, size, stride, offset=0, key="0"):
    """Return the pickle instructions for a view of storage `key`, which has `numel` float32s."""
    plain = files._plain_pickle
    storage = b"(" + plain("storage") + b"ctorch\nFloatStorage\n"
    storage += plain(key) + plain("cpu") + plain(numel) + b"tQ"
    arguments = b"".join(map(plain, (offset, size, stride, False, None)))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + arguments + b"tR"


def state_dict(views):
    """Return a pickle of a dictionary whose values are given by their instructions in `views`."""
    return b"\x80\x02}(" + b"".join(text(name) + x for name, x in views.items()) + b"u."

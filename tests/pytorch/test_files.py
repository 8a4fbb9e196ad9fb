"""Files of `torch.save` and safetensors are read and written, and damaged ones are refused."""

import argparse
import collections
import importlib
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from pytorch_helpers import (
    MEGABYTE,
    assert_refused,
    assert_same,
    error_of,
    tensors_of,
    variables,
    zip_of,
)

from ipwd_jax.errors import UserError
from ipwd_jax.pytorch import files
from ipwd_jax.pytorch.names import to_torch
from ipwd_jax.pytorch.state_dicts import unwrap

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"]
DTYPES += ["uint8", "bool"]

# What PyTorch writes


def with_counters(tensors, torch):
    counter = torch.tensor(7)
    return tensors | {"bn1.num_batches_tracked": counter}


def parameters(tensors, torch):
    return {k: torch.nn.Parameter(x, requires_grad=x.ndim > 1) for k, x in tensors.items()}


def wrapped(tensors, torch):
    return {
        "epoch": 240,
        "model": {f"module.{k}": x for k, x in tensors.items()},
        "accuracy": torch.tensor([73.5]),
        "best_acc": np.float64(74.25),
        "opt": argparse.Namespace(trial="1", lr=0.05, milestones=[150, 180], sizes={1, 2}),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
        "scheduler": {"milestones": collections.Counter([150, 180])},
        "more": [torch.float16, torch.device("cuda", 0), torch.Size([1]), np.arange(3.0)],
    }


def self_supervised(tensors, torch):
    tensors = {f"backbone.{k}": x for k, x in tensors.items()}
    return {"state_dict": tensors | {"proj_head.0.weight": torch.ones(2, 2)}}


def shared(tensors, torch):
    """All of one storage, behind offsets, and transposed."""
    storage = torch.cat([torch.zeros(5), *(x.T.reshape(-1) for x in tensors.values())])
    tensors, offset = dict(tensors), 5
    for name, x in tensors.items():
        view = storage[offset : offset + x.numel()].view(x.T.shape).T
        tensors[name], offset = view, offset + x.numel()
    return tensors


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("content", [with_counters, parameters, wrapped, self_supervised, shared])
def test_files_of_torch_give_the_same_arrays(content, legacy, torch, tmp_path):
    path = tmp_path / "net.pth"
    expected = to_torch(variables())
    torch.save(content(tensors_of(torch), torch), path, _use_new_zipfile_serialization=not legacy)
    tensors, metadata = unwrap(files.load(path))
    assert_same(tensors, expected)
    if content is wrapped:
        assert metadata == {"epoch": 240, "accuracy": 73.5, "best_acc": 74.25}


def test_other_objects_are_read_as_plain_data(torch, tmp_path):
    torch.save(wrapped({}, torch), tmp_path / "a.pth")
    tree = files.load(tmp_path / "a.pth")
    assert tree["opt"] == {"trial": "1", "lr": 0.05, "milestones": [150, 180], "sizes": {1, 2}}
    assert tree["scheduler"]["milestones"] == {150: 1, 180: 1}
    assert tree["more"][:3] == ["torch.float16", "cuda:0", (1,)]
    np.testing.assert_array_equal(tree["more"][3], [0, 1, 2])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_of_tensors(dtype, legacy, torch, tmp_path):
    x = torch.arange(-3, 9).reshape(3, 4).to(getattr(torch, dtype))
    tensors = {"x": x, "column": x[:, 1], "scalar": x[0, 0], "empty": x[:0], "T": x.T}
    torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    for name, actual in files.load(tmp_path / "a.pth").items():
        assert str(actual.dtype) == dtype and actual.shape == tensors[name].shape
        np.testing.assert_array_equal(actual.astype(float), tensors[name].double().numpy())


# Safetensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_safetensors(dtype, torch, tmp_path):
    tensors = {k: x.to(getattr(torch, dtype)) for k, x in tensors_of(torch).items()}
    importlib.import_module("safetensors.torch").save_file(tensors, tmp_path / "net.safetensors")
    read = files.load(tmp_path / "net.safetensors")
    assert {str(x.dtype) for x in read.values()} == {dtype}
    assert_same(
        {k: x.astype(np.float32) for k, x in read.items()},
        {k: x.float().numpy() for k, x in tensors.items()},
    )


def test_safetensors_round_trip(tmp_path):
    tensors = to_torch(variables()) | {"bn1.num_batches_tracked": np.zeros((), np.int64)}
    files.save(tmp_path / "a.safetensors", tensors)
    assert_same(safetensors.numpy.load_file(tmp_path / "a.safetensors"), tensors)
    assert_same(files.load(tmp_path / "a.safetensors"), tensors)


def safetensors_of(path, header, data=b"", length=None):
    header = json.dumps(header).encode()
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header + data)
    return path


@pytest.mark.parametrize(
    ("entries", "length"),
    [
        ([((2,), 0, 8)], 2**40),
        ([((2,), 0, 8)], 90_000_000),
        ([((2_000_000, 64), 0, 8)], None),
        ([((2_000_000, 64), 0, 512_000_000)], None),
        ([((2**62, 2**62), 0, 8)], None),
        ([((2,), 0, 8), ((2,), 0, 8)], None),
        ([((2,), 8, 0)], None),
    ],
)
def test_safetensors_that_announce_more_than_they_have(entries, length, tmp_path, capsys):
    header = {
        f"{i}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        for i, (shape, start, end) in enumerate(entries)
    }
    path = safetensors_of(tmp_path / "a.safetensors", header, bytes(8), length)
    assert "was not written by safetensors" in error_of(path, capsys)


# Files that are refused


def test_exports_refuse_to_overwrite(tmp_path):
    (tmp_path / "a.pth").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        files.save(tmp_path / "a.pth", {})
    assert (tmp_path / "a.pth").read_text() == "mine"
    with pytest.raises(UserError, match=r"must end in \.pth, \.pt or \.safetensors"):
        files.save(tmp_path / "a.onnx", {})


def test_big_endian_files(tmp_path):
    assert_refused(zip_of(b"\x80\x02}.", tmp_path / "a.pth", byteorder=b"big"), "big-endian")
    header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}]
    (tmp_path / "b.pth").write_bytes(b"".join(pickle.dumps(x, 2) for x in header))
    assert_refused(tmp_path / "b.pth", "big-endian")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_files_cut_short(legacy, torch, tmp_path):
    torch.save(tensors_of(torch), tmp_path / "a", _use_new_zipfile_serialization=not legacy)
    whole = (tmp_path / "a").read_bytes()
    path = tmp_path / "a.pth"
    for size in (1, 10, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert_refused(path, str(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<html>404</html>", "was not written by torch.save: it starts with b'<html>40'"),
        (pickle.dumps({"a": 1}), "a pickle, but not one that torch.save wrote"),
        (b"\x80\x02" + struct.pack("<q", 0), "cannot be read"),
        (b"PK\x03\x04", "cannot be read"),
    ],
)
def test_other_files(content, words, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    assert_refused(tmp_path / "a.pth", words, str(tmp_path / "a.pth"))


def test_files_that_are_not_there(tmp_path):
    assert_refused(tmp_path / "none.pth", "No such file")
    assert_refused(zip_of(b"\x80\x02}.", tmp_path / "empty.pth"), "no state dict")


def test_archives_that_announce_more_than_they_have(tmp_path, capsys):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", b"1234")
        archive.filelist[1].file_size = archive.filelist[1].compress_size = 2**31
    assert "its parts claim 2147483652 bytes, but the file has" in error_of(path, capsys)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/byteorder", bytes(200 * MEGABYTE))
    assert "it is compressed" in error_of(path, capsys)

"""Nothing that a pickle names is executed, and the steps of reading it are limited."""

import os
import pickle

import numpy as np
import pytest
from pytorch_helpers import (
    MEGABYTE,
    assert_refused,
    function,
    memory_below,
    state_dict,
    view,
    zip_of,
)

from ipwd_jax.errors import UserError
from ipwd_jax.pytorch import files, pickles


class Command:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_runs_a_command_is_refused(legacy, torch, tmp_path):
    marker = tmp_path / "marker"
    harm = Command(os.system, f"touch {marker}")
    path = tmp_path / "evil.pth"
    torch.save({"model": harm}, path, _use_new_zipfile_serialization=not legacy)
    assert_refused(path, f"{os.system.__module__}.system", "not executed", "state_dict()")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("call", [(eval, "1/0"), (getattr, "a", "b"), (__import__, "os")])
def test_functions_that_are_not_listed(call, protocol, tmp_path):
    path = zip_of(pickle.dumps(Command(*call), protocol), tmp_path / "evil.pth")
    assert_refused(path, f".{call[0].__name__}, which", "not executed")


def test_a_pickled_module_is_refused_by_its_name(torch, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert_refused(tmp_path / "module.pth", "torch.nn.modules.linear.Linear", "state_dict()")


@pytest.mark.parametrize("state", [b"}", b"(}}X\x0b\x00\x00\x00__setstate__K\x01st"])
@pytest.mark.parametrize(
    "name",
    [
        "torch.Size",
        "torch._utils._rebuild_tensor_v2",
        "torch.FloatStorage",
        "torch.float32",
        "collections.OrderedDict",
        "argparse.Namespace",
        "numpy.dtype",
    ],
)
def test_no_pickle_changes_how_the_next_is_read(name, state, tmp_path):
    code = b"\x80\x02" + function(name) + state + b"b."
    assert_refused(zip_of(code, tmp_path / "evil.pth"), "cannot be read")


COPY = b"]q\x00(" + b"N" * 50 + b"e" + function("torch.Size") + b"h\x00\x85R"


@pytest.mark.parametrize("more", [b"]" * 100, COPY], ids=["instructions", "copies"])
def test_the_steps_of_a_pickle_are_counted(more, tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "_MOST_INSTRUCTIONS", 100)
    path = zip_of(b"\x80\x04](" + more + b"e.", tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"more than 100 steps.*save model\.state_dict"):
        files.load(path)


def test_a_high_memo_index_does_no_harm(tmp_path):
    data_pkl = state_dict({"a": view(6, (2, 3), (3, 1)) + b"r\xff\xff\xff\x7f"})
    path = zip_of(data_pkl, tmp_path / "a.pth", [np.arange(6, dtype=np.float32).tobytes()])
    with memory_below(MEGABYTE):
        assert files.load(path)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]

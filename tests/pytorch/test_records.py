"""A tensor neither leaves its storage nor repeats the numbers in it."""

import numpy as np
import pytest
from pytorch_helpers import assert_refused, error_of, legacy_of, state_dict, template, view, zip_of

from ipwd_jax.pytorch import files
from ipwd_jax.pytorch.names import torch_shapes


def test_tensors_stay_in_their_storage(tmp_path):
    good = files._pickle({"x": np.zeros((2, 3), np.float32)})
    view = b"K\x00K\x02K\x03\x86"  # offset 0, shape (2, 3)
    assert view in good
    storage = np.arange(6, dtype=np.float32).tobytes()
    path = zip_of(good, tmp_path / "good.pth", [storage])
    assert files.load(path)["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for bad in (b"K\x01K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x02K\x03\x86", b"K\x00K\x02K\x09\x86"):
        zip_of(good.replace(view, bad), tmp_path / "bad.pth", [storage])
        assert_refused(tmp_path / "bad.pth", "reaches beyond its storage")
    zip_of(good, tmp_path / "bad.pth", [storage[:-4]])
    assert_refused(tmp_path / "bad.pth", "20 bytes instead of 24")


@pytest.mark.parametrize("write", [zip_of, legacy_of])
def test_a_tensor_that_repeats_its_numbers(write, tmp_path, capsys):
    views = {
        name: view(64, shape, (0,) * len(shape)) for name, shape in torch_shapes(template()).items()
    }
    data_pkl = state_dict(views | {"fc.weight": view(64, (2_000_000, 64), (0, 1))})
    path = write(data_pkl, tmp_path / "a.pth", [bytes(256)])
    assert path.stat().st_size < 10_000
    assert "repeats the 64 elements that the file has for it" in error_of(path, capsys)
    path = write(state_dict({"fc.weight": view(64, (2_000_000, 64), (0, 1))}), path, [bytes(256)])
    assert "the tensor 'fc.weight' of shape (2000000, 64) repeats" in error_of(path, capsys)

"""Data that does not fit into memory is refused before it is decoded."""

import numpy as np
import pytest
from data_helpers import TFDS, arrays, fails, load, write_images

from ipwd_jax.data import memory


class TestMemory:
    """Data that does not fit is refused before it is decoded."""

    @pytest.fixture(autouse=True)
    def little(self, monkeypatch):
        monkeypatch.setattr(memory, "available", lambda: 1000)

    @pytest.mark.parametrize(("size", "side"), [(0, 20), (20_000, 9)])
    def test_folder(self, tmp_path, size, side):
        write_images(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png", side=side)
        assert len(load(f"folder:{tmp_path}", image_size=9, test_fraction=0.5).train.labels) == 2
        needs = "4.47 GiB" if size else "0.00 GiB"
        words = ["4 images", needs, "--config.data.streaming", "--config.data.image_size"]
        fails(words, f"folder:{tmp_path}", image_size=size)

    def test_numpy_file(self, tmp_path):
        images, labels = arrays()
        np.savez_compressed(tmp_path / "x.npz", train_images=0 * images, train_labels=labels)
        assert (tmp_path / "x.npz").stat().st_size < 1000
        fails(["x.npz need", "are available"], f"numpy:{tmp_path}/x.npz")

    def test_tfds(self):
        fails(["12 images", "config.data.streaming"], "tfds:tiny", dir=str(TFDS))


def test_what_a_container_uses_already_is_not_available(tmp_path, monkeypatch):
    files = {
        "memory.max": 2**24,
        "memory.current": 9 * 2**20,
        "memory.stat": "inactive_file 60\nactive_file 4",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    group = str(tmp_path), "memory.max", "memory.current", ("inactive_file", "active_file")
    monkeypatch.setattr(memory, "_GROUPS", [group])
    assert memory.available() == 2**24 - 9 * 2**20 + 64
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() > 2**24 - 9 * 2**20 + 64


def test_memory_of_this_machine():
    assert 2**20 < memory.available() < 2**50

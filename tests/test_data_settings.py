"""Settings of the data are used or refused, and so is data that they do not fit."""

import numpy as np
import pytest
from PIL import Image
from test_sources import TFDS, arrays, fails, load

from ipwd_jax import config as config_lib
from ipwd_jax import data, train
from ipwd_jax.data import memory
from ipwd_jax.data.base import TEST_FRACTION
from ipwd_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("digits", {"image_size": 32}),
        ("digits", {"dir": "/data"}),
        ("digits", {"test_fraction": 0.3}),
        ("digits", {"threads": 2}),
        ("numpy:x.npz", {"train_split": "train"}),
        ("numpy:x.npz", {"dir": "/data"}),
        ("cifar10", {"test_split": "test"}),
        ("cifar100", {"test_fraction": 0.1}),
        ("tfds:tiny", {"download": True}),
        ("tfds:tiny", {"test_fraction": 0.3}),
        ("tfds:tiny", {"image_size": 8}),
        ("folder:x", {"dir": "/data"}),
        ("folder:x", {"threads": 2}),
        ("folder:x", {"streaming": True, "image_size": 8, "crop_padding": 0, "download": True}),
        ("tfds:tiny", {"streaming": True, "image_size": 8, "crop_padding": 0,
                       "test_fraction": 0.3}),
    ],
)  # fmt: skip
def test_settings_that_a_source_does_not_use_are_refused(name, settings):
    setting, value = list(settings.items())[-1]
    kind = name.partition(":")[0]
    fails([f"config.data.{setting} is {value!r}", f"{kind} does not use"], name, **settings)


@pytest.mark.parametrize(
    ("name", "hint"), [("cifar", "cifar10"), ("Digits", "digits"), ("tfds", "tfds:NAME")]
)
def test_unknown_source(name, hint):
    fails([f"data set {name!r}", f"Did you mean '{hint}"], name)


def write(root, *places, side=6):
    for place in places:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side)).save(root / place)


def test_test_settings_count_only_where_images_are_held_out(tmp_path):
    write(tmp_path, *(f"{s}/{c}/{i}.png" for s in ("train", "val") for c in "ab" for i in "12"))
    fails(["test_fraction is 0.5", "val"], f"folder:{tmp_path}", test_fraction=0.5)
    fails(["test_split is 'b'", "'train'"], f"folder:{tmp_path}/train", test_split="b")
    fails(["(0, 0.5]", "found 0.6"], f"folder:{tmp_path}/train", test_fraction=0.6)


def test_every_setting_of_the_data_is_used_or_refused():
    defaults = config_lib.default().data
    of_all = {"name", "streaming", "mean", "std", "crop_padding", "flip"}
    assert set(data.USED_BY) | of_all == set(defaults)
    assert all(defaults[setting] == data._UNSET.get(setting, TEST_FRACTION)
               for setting in data.USED_BY)  # fmt: skip


class TestMemory:
    """Data that does not fit is refused before it is decoded."""

    @pytest.fixture(autouse=True)
    def little(self, monkeypatch):
        monkeypatch.setattr(memory, "available", lambda: 1000)

    @pytest.mark.parametrize(("size", "side"), [(0, 20), (20_000, 9)])
    def test_folder(self, tmp_path, size, side):
        write(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png", side=side)
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


def test_memory_of_this_machine():
    assert 2**20 < memory.available() < 2**50


@pytest.mark.parametrize(("padding", "fits"), [(5, True), (6, False), (50, False)])
def test_crops_must_show_something(padding, fits, tmp_path):
    config = config_lib.default()
    config.data.crop_padding = padding
    dataset = data.from_arrays(*arrays(shape=(8, 6, 3)))
    if fits:
        data.check_augmentation(dataset, config)
        return
    with pytest.raises(UserError, match=r"8x6 pixels.* below 6"):
        train.run(config, tmp_path / "run", dataset)

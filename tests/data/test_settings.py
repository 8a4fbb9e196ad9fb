"""Every setting of the data is used or refused."""

import pytest
from data_helpers import arrays, fails, write_images

from ipwd_jax import config as config_lib
from ipwd_jax import data, train
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


def test_test_settings_count_only_where_images_are_held_out(tmp_path):
    write_images(
        tmp_path, *(f"{s}/{c}/{i}.png" for s in ("train", "val") for c in "ab" for i in "12")
    )
    fails(["test_fraction is 0.5", "val"], f"folder:{tmp_path}", test_fraction=0.5)
    fails(["test_split is 'b'", "'train'"], f"folder:{tmp_path}/train", test_split="b")
    fails(["(0, 0.5]", "found 0.6"], f"folder:{tmp_path}/train", test_fraction=0.6)


def test_every_setting_of_the_data_is_used_or_refused():
    defaults = config_lib.default().data
    of_all = {
        "name",
        "streaming",
        "long_tail",
        "validation_fraction",
        "mean",
        "std",
        "crop_padding",
        "flip",
    }
    of_all |= set(config_lib.STUDENTS_ALONE)
    assert set(data.USED_BY) | of_all == set(defaults)


def test_settings_that_a_data_set_in_their_place_does_not_use_are_named(tmp_path, capsys):
    config, dataset = config_lib.default(), data.from_arrays(*arrays())
    assert data.given(dataset, config.data) is dataset
    assert capsys.readouterr().err == ""
    config.data.update({"image_size": 32, "mean": (0.5,)})
    data.given(dataset, config.data)
    assert "config.data.image_size, config.data.mean have no effect" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"must be a Dataset, .*found tuple"):
        data.given(arrays(), config.data)
    config.data.streaming = True
    with pytest.raises(UserError, match=r"streaming is True, but .* in memory; set it to False"):
        train.run(config, tmp_path / "run", dataset)


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

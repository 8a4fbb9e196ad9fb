"""Data sets of arrays are checked, measured, split and identified."""

import numpy as np
import pytest
from data_helpers import arrays

from ipwd_jax import data
from ipwd_jax.data.base import hold_out, long_tailed
from ipwd_jax.errors import UserError


def test_statistics_are_those_of_the_training_pixels():
    images, labels = arrays(60, shape=(5, 4, 2))
    dataset = data.from_arrays(images, labels, images[:3], labels[:3])
    pixels = images.reshape(-1, 2) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=0), rtol=1e-6)
    assert dataset.class_names == ("0", "1", "2")


def test_grey_images_get_a_channel_and_a_constant_channel_has_deviation_one():
    dataset = data.from_arrays(np.zeros((6, 4, 4), np.uint8), np.arange(6) % 2, test_fraction=0.5)
    assert dataset.train.images.shape[1:] == (4, 4, 1) and dataset.std == 1


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3, 0.4, 0.5])
def test_hold_out_takes_its_share_of_every_class(fraction):
    labels = np.array([0] * 10 + [1] * 20 + [2] * 2 + [3], np.int32)
    stay, held = hold_out(data.Split(np.arange(33), labels), fraction)
    wanted = [round(10 * fraction), round(20 * fraction), 1, 0]
    assert np.bincount(held.labels, minlength=4).tolist() == wanted
    assert sorted([*stay.images, *held.images]) == list(range(33))


def test_the_long_tail_is_that_of_the_literature():
    labels = np.tile(np.arange(100, dtype=np.int32), 500)
    tail = long_tailed(data.Split(np.arange(50_000), labels), 100)
    sizes = np.bincount(tail.labels)
    assert len(tail.labels) == 10_847  # CIFAR-100-LT with an imbalance factor of 0.01
    assert sizes[0] == 500 and sizes[-1] == 5 and (np.diff(sizes) <= 0).all()
    np.testing.assert_array_equal(tail.images[tail.labels == 99], 99 + 100 * np.arange(5))


def test_no_class_of_a_long_tail_is_empty():
    """49 * 49 ** -1 is less than 1 in floating point."""
    split = data.Split(np.arange(196), np.repeat(np.arange(4, dtype=np.int32), 49))
    assert np.bincount(long_tailed(split, 49.0).labels).tolist() == [49, 13, 3, 1]


@pytest.mark.parametrize("ratio", [0.5, 501])
def test_a_long_tail_needs_a_sensible_ratio(ratio):
    split = data.Split(np.arange(1_000), np.repeat(np.arange(2, dtype=np.int32), 500))
    with pytest.raises(UserError, match=rf"in 1\.\.500 for this data; found {ratio:g}"):
        long_tailed(split, ratio)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_images": np.zeros((12, 6, 6, 3))}, ["uint8", "float64", "255 * x"]),
        ({"train_images": np.zeros((0, 6, 6, 3), np.uint8)}, ["(0, 6, 6, 3)"]),
        ({"train_images": np.zeros((12, 3, 6, 6), np.uint8)}, ["transpose(0, 2, 3, 1)"]),
        ({"test_images": np.zeros((12, 1, 6, 9), np.uint8)}, ["test", "(12, 1, 6, 9)"]),
        ({"train_labels": np.zeros(12)}, ["12 integers", "float64"]),
        ({"train_labels": np.zeros(3, int)}, ["12 integers", "(3,)"]),
        ({"train_labels": np.arange(12) - 1}, ["start at 0", "-1"]),
        ({"train_labels": np.arange(12) % 3 + 2**32}, ["32 bits", "4294967296"]),
        ({"mean": (0.5,) * 3, "std": (0.1, 0.1, np.nan)}, ["std must be above 0", "nan"]),
        ({"train_labels": np.zeros(12, int)}, ["1 classes", "at least 2"]),
        ({"train_labels": np.arange(12) % 3 * 2}, ["no training image of the classes [1, 3]"]),
        ({"test_labels": np.full(12, 7)}, ["none of them: [7]"]),
        ({"test_images": np.zeros((12, 5, 6, 3), np.uint8)}, ["(6, 6, 3)", "(5, 6, 3)"]),
        ({"class_names": ["a", "b", "c", "d"]}, ["4 classes", "[3]"]),
        ({"mean": (0.5,), "std": (0.1,)}, ["3 channels", "[0.5]"]),
        ({"mean": [127.0] * 3, "std": [60.0] * 3}, ["in 0..1", "division by 255", "127"]),
        ({"mean": 0.5}, ["3 channels", "mean [0.5]"]),
        ({"test_images": None}, ["test labels, but no test images"]),
        ({"class_names": []}, ["0 classes"]),
    ],
)
def test_wrong_arrays(change, words):
    images, labels = arrays()
    good = {
        "train_images": images,
        "train_labels": labels,
        "test_images": images,
        "test_labels": labels,
    }
    with pytest.raises(UserError) as error:
        data.from_arrays(**{**good, **change})
    for word in words:
        assert word in str(error.value), str(error.value)


def test_class_names_may_be_an_array():
    names = data.from_arrays(*arrays(), class_names=np.array(["ant", "bee", "cat"])).class_names
    assert names == ("ant", "bee", "cat") and {type(name) for name in names} == {str}


@pytest.mark.parametrize("shape", [(6, 6, 2), (6, 6, 7), (4, 4, 2), (3, 9, 1), (1, 6, 4)])
def test_channels_may_be_any_number(shape):
    assert data.from_arrays(*arrays(shape=shape)).train.images.shape[1:] == shape


def test_statistics_of_many_images_are_those_of_all(monkeypatch):
    images, labels = arrays(60)
    whole = data.from_arrays(images, labels)
    monkeypatch.setattr(data.base, "_PIXELS_AT_ONCE", 100)
    assert data.fingerprint(data.from_arrays(images, labels)) == data.fingerprint(whole)


def test_fingerprint_sees_every_part():
    images, labels = arrays()
    prints = {data.fingerprint(data.from_arrays(images, labels, images, labels))}
    other = images.copy()
    other[5, 1, 2, 0] ^= 1
    prints.add(data.fingerprint(data.from_arrays(other, labels, images, labels)))
    prints.add(data.fingerprint(data.from_arrays(images, labels, other, labels)))
    prints.add(data.fingerprint(data.from_arrays(images, labels[::-1], images, labels)))
    assert len(prints) == 4

"""The digits of scikit-learn and files of NumPy give the arrays that they hold."""

import numpy as np
from data_helpers import arrays, fails, load, same

from ipwd_jax import data


def test_digits():
    dataset = load("digits")
    assert dataset.train.images.shape[1:] == (8, 8, 1) and len(dataset.class_names) == 10
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (1438, 359)
    share = np.bincount(dataset.test.labels) / (
        np.bincount(dataset.test.labels) + np.bincount(dataset.train.labels)
    )
    assert (abs(share - 0.2) < 0.01).all()
    assert dataset.train.images.max() == 255
    assert data.fingerprint(dataset) == "a31070271876a7e1"


class TestNumpyFile:
    def test_arrays_come_back(self, tmp_path):
        images, labels = arrays()
        np.savez(
            tmp_path / "set.npz",
            train_images=images,
            train_labels=labels,
            test_images=images[::-1],
            test_labels=labels[::-1],
            class_names=["ant", "bee", "cat"],
        )
        dataset = load(f"numpy:{tmp_path}/set.npz")
        assert same(dataset, data.from_arrays(images, labels, images[::-1], labels[::-1]))
        assert dataset.class_names == ("ant", "bee", "cat") and dataset.name == "set"

    def test_what_is_wrong_is_said(self, tmp_path):
        images, labels = arrays()
        fails(["no file", "nope.npz"], "numpy:nope.npz")
        (tmp_path / "text.npz").write_text("hello")
        fails(["text.npz", "cannot be read"], f"numpy:{tmp_path}/text.npz")
        np.savez(tmp_path / "lacks.npz", images=images)
        fails(["lacks", "train_labels", "['images']"], f"numpy:{tmp_path}/lacks.npz")
        np.savez(
            tmp_path / "half.npz", train_images=images, train_labels=labels, test_images=images
        )
        fails(["test_images and test_labels"], f"numpy:{tmp_path}/half.npz")
        np.savez(
            tmp_path / "own.npz", train_images=images, train_labels=labels, test_images=images,
            test_labels=labels,
        )  # fmt: skip
        fails(["test_fraction is 0.3", "own.npz"], f"numpy:{tmp_path}/own.npz", test_fraction=0.3)
        np.savez(tmp_path / "pickle.npz", train_images=images, train_labels=np.array([{}, None]))
        fails(["pickle.npz", "allow_pickle"], f"numpy:{tmp_path}/pickle.npz")

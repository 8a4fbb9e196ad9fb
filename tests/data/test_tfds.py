"""A prepared data set of TFDS is read into memory without TensorFlow."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from data_helpers import TFDS, arrays, fails, load, same

from ipwd_jax import data
from ipwd_jax.data import tfds
from ipwd_jax.errors import UserError


def test_arrays_come_back_in_the_order_of_their_ids_without_tensorflow():
    images, labels = arrays()
    dataset = load("tfds:tiny", dir=str(TFDS))
    assert same(dataset, data.from_arrays(images[:9], labels[:9], images[9:], labels[9:]))
    assert dataset.class_names == ("ant", "bee", "cat")
    code = (
        "import sys; from ipwd_jax import config, data; c = config.default().data;"
        f"c.name, c.dir = 'tfds:tiny', {str(TFDS)!r};"
        "data.load(c); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_record_that_is_damaged_while_it_is_streamed_is_named(tmp_path):
    shutil.copytree(TFDS, tmp_path / "copy")
    settings = {"streaming": True, "image_size": 8, "crop_padding": 0, "dir": f"{tmp_path}/copy"}
    train = load("tfds:tiny", **settings).train.images
    records = next(tmp_path.glob("copy/tiny/*/tiny-train*"))
    records.write_bytes(records.read_bytes()[:200] + bytes(len(records.read_bytes()) - 200))
    with pytest.raises(UserError, match=r"tfds:tiny train: sample \d+ cannot be read"):
        list(train.batches(np.arange(9).reshape(3, 3)))


def test_slices():
    assert len(load("tfds:tiny", dir=str(TFDS), train_split="train[:6]").train.labels) == 6


def test_what_is_wrong_is_said(tmp_path):
    fails(["'trian'", "Did you mean 'train'"], "tfds:tiny", dir=str(TFDS), train_split="trian")
    fails(["cannot be read"], "tfds:tiny", dir=str(TFDS), train_split="train[oops]")
    fails(["mnistt", "Did you mean 'mnist'"], "tfds:mnistt", dir=str(tmp_path))
    command = f"python -m ipwd_jax.data.prepare mnist {tmp_path}"
    fails(["not prepared", "ipwd_jax[tfds]", command], "tfds:mnist", dir=str(tmp_path))
    shutil.copytree(TFDS, tmp_path / "copy")
    info = next(tmp_path.glob("copy/tiny/*/dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    fails(["tfrecord", f"{tmp_path}/copy_array_record"], "tfds:tiny", dir=f"{tmp_path}/copy")
    info.write_text(info.read_text().replace("tfrecord", "array_record"))
    next(info.parent.glob("tiny-test*")).write_bytes(b"damaged")
    fails(["'test'", "cannot be read"], "tfds:tiny", dir=f"{tmp_path}/copy")
    fails(["mnist:9.9.9", "cannot be opened"], "tfds:mnist:9.9.9", dir=str(tmp_path))


def test_numbers_of_another_type_are_not_cut_off(monkeypatch):
    builder = SimpleNamespace(name="satellite")

    class Source(list):
        def __getitems__(self, rows):
            return [self[row] for row in rows]

    source = Source([{"image": np.full((4, 4, 13), 300.0, np.float32), "label": 0}])
    with pytest.raises(UserError, match="satellite has images of float32"):
        tfds._decode(builder, source, "image", "label", 1)


def test_a_test_split_without_labels_is_not_chosen():
    for name, chosen in (("imagenet2012", "validation"), ("other", "test")):
        splits = dict.fromkeys(("train", "validation", "test"))
        builder = SimpleNamespace(name=name, info=SimpleNamespace(splits=splits))
        assert tfds.choose_test_split(builder, "") == chosen
        assert tfds.choose_test_split(builder, "train") == "train"

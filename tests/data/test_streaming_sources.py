"""What is streamed from folders and from TFDS is split and refused as in memory."""

import io
import shutil
from unittest import mock

import numpy as np
import pytest
from data_helpers import SIZE, TFDS, config, encode, noise, run, write_image
from PIL import Image

from ipwd_jax import data
from ipwd_jax.data import decode
from ipwd_jax.data import records as records_lib
from ipwd_jax.errors import UserError


def assert_same_samples(records, wanted, class_names):
    assert records.class_names == class_names
    assert records.labels.dtype == np.int32
    assert records.labels.tolist() == wanted.labels.tolist()
    for index, image in enumerate(wanted.images):
        file = io.BytesIO(records.read(index))
        assert np.array_equal(np.asarray(Image.open(file)), image)


class TestFolder:
    def make(self, root):
        places = ["train/bee/1.png", "train/ant/2.png", "train/ant/10.png", "train/bee/x/0.jpeg",
                  "train/ant/.hidden.png", "train/ant/notes.txt", "val/ant/1.png",
                  "val/bee/1.png"]  # fmt: skip
        for place, image in zip(places, noise(len(places)), strict=True):
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            content = b"text" if place.endswith("txt") else encode(image, "PNG")
            (root / place).write_bytes(content)

    def test_same_samples_as_in_memory(self, tmp_path):
        self.make(tmp_path)
        dataset = data.load(config(f"folder:{tmp_path}"))
        for split, wanted in (("train", dataset.train), ("val", dataset.test)):
            records = records_lib.folder_records(tmp_path, split)
            assert_same_samples(records, wanted, dataset.class_names)

    def test_fingerprint_sees_names_and_sizes_but_not_where(self, tmp_path):
        self.make(tmp_path / "one")
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        first, second = (records_lib.folder_records(tmp_path / x, "train") for x in ("one", "two"))
        assert first.fingerprint == second.fingerprint and len(first.fingerprint) == 8
        file = tmp_path / "two/train/ant/2.png"
        file.write_bytes(file.read_bytes() + b"\0")
        longer = records_lib.folder_records(tmp_path / "two", "train")
        file.rename(file.with_name("3.png"))
        renamed = records_lib.folder_records(tmp_path / "two", "train")
        assert len({r.fingerprint for r in (first, longer, renamed)}) == 3

    def test_what_is_wrong_is_said(self, tmp_path):
        self.make(tmp_path)
        with pytest.raises(UserError, match=r"no folder 'trian'.*\['train', 'val'\]"):
            records_lib.folder_records(tmp_path, "trian")
        with pytest.raises(UserError, match="nowhere"):
            records_lib.folder_records(tmp_path / "nowhere", "train")
        (tmp_path / "val/cat").mkdir()
        with pytest.raises(UserError, match="cat has no image files"):
            records_lib.folder_records(tmp_path, "val")
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="no class folders"):
            records_lib.folder_records(tmp_path, "empty")


def streamed(name, **settings):
    return config(name, **{"streaming": True, "image_size": SIZE, "crop_padding": 0, **settings})


class TestLoad:
    """Streamed data is split, named and refused as the same data in memory is."""

    def make(self, root, *places):
        for place, image in zip(places, noise(len(places)), strict=True):
            write_image(root / place, Image.fromarray(image))

    @pytest.mark.parametrize(("folder", "settings"), [
        ("", {}),
        ("", {"test_fraction": 0.5}),
        ("train/", {"test_fraction": 0.3}),
        ("first/", {"train_split": "first"}),
        ("", {"validation_fraction": 0.25, "long_tail": 2.0}),
    ])  # fmt: skip
    def test_the_same_samples_are_held_out(self, tmp_path, folder, settings):
        places = [f"{folder}{'ab'[i % 2]}/{i}.png" for i in range(10)]
        self.make(tmp_path, *places, f"{folder}a/.ipynb_checkpoints/0.png")
        resident = data.load(config(f"folder:{tmp_path}", **settings))
        dataset = data.load(streamed(f"folder:{tmp_path}", **settings))
        assert (dataset.name, dataset.class_names) == (resident.name, resident.class_names)
        assert dataset.evaluated.keys() == resident.evaluated.keys()
        for split in ("train", *dataset.evaluated):
            wanted, images = getattr(resident, split), getattr(dataset, split).images
            assert getattr(dataset, split).labels.tolist() == wanted.labels.tolist()
            for index, image in enumerate(wanted.images):
                file = io.BytesIO(images.records.read(index))
                assert np.array_equal(np.asarray(Image.open(file)), image)
        fraction = 0.1 if "test_fraction" in settings else 0.5
        settings = {**settings, "test_fraction": fraction}
        other = data.load(streamed(f"folder:{tmp_path}", **settings))
        assert data.fingerprint(other) != data.fingerprint(dataset)

    @pytest.mark.parametrize(("splits", "wanted"), [
        (("val", "validation"), "val"), (("test", "val"), "test"), (("validation",), "validation"),
    ])  # fmt: skip
    def test_the_same_folder_is_tested_on(self, tmp_path, splits, wanted):
        self.make(tmp_path, *(f"{s}/{c}/1.png" for s in ("train", *splits) for c in "ab"))
        for made in (config, streamed):
            dataset = data.load(made(f"folder:{tmp_path}"))
            tested = dataset.test.images
            if dataset.test.streamed:
                assert f"/{wanted}/a/" in tested.records.describe(0)
            else:
                assert np.array_equal(tested[0], noise()[2 + 2 * splits.index(wanted)])

    @pytest.mark.parametrize(("places", "settings", "words"), [
        ([], {}, "no class folders"),
        (["train/1.png"], {}, "no class folders"),
        (["a/1.png", "a/2.png"], {}, "1 classes; at least 2"),
        (["train/a/1.png", "val/a/1.png"], {}, "1 classes; at least 2"),
        (["a/1.png", "b/1.png"], {}, "single image"),
        (["a/1.png", "a/2.png", "b/1.png"], {"test_fraction": 0.7}, r"\(0, 0.5\], found 0.7"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png"], {}, r"only: \['b'\]"),
        (["train/a/1.png", "train/b/1.png"], {"test_split": "val"}, "no folder 'val'"),
        (["a/1.png", "a/2.png", "b/1.png"], {"test_split": "b"}, "no folder 'train'"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png"],
         {"test_fraction": 0.3}, "test_fraction is 0.3"),
        (["a/1.png", "a/2.png", "b/1.png"], {"mean": (0.5,)}, "3 channels"),
        (["a/1.png", "a/2.png", "b/1.png"], {"std": (0.2, 0.2, 0.0)}, "std must be above 0"),
    ])  # fmt: skip
    def test_what_is_wrong_is_said_as_in_memory(self, tmp_path, places, settings, words):
        self.make(tmp_path, *places)
        for made in (config, streamed):
            with pytest.raises(UserError, match=words):
                data.load(made(f"folder:{tmp_path}", **settings))

    def test_no_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"no folder .*nowhere"):
            data.load(streamed(f"folder:{tmp_path}/nowhere"))

    def test_classes_of_a_slice(self):
        settings = {"dir": str(TFDS), "train_split": "train[:2]"}
        for made in (config, streamed):
            with pytest.raises(UserError, match="3 classes, but no training image of the"):
                data.load(made("tfds:tiny", **settings))

    @pytest.mark.parametrize("module", ["simplejpeg", "cv2"])
    def test_a_faster_decoder_does_not_make_other_data(self, tmp_path, monkeypatch, module):
        self.make(tmp_path, "a/1.png", "a/2.png", "b/1.png")
        before = data.fingerprint(data.load(streamed(f"folder:{tmp_path}")))
        found = decode._optional
        monkeypatch.setattr(decode, "_optional", lambda n: None if n == module else found(n))
        assert data.fingerprint(data.load(streamed(f"folder:{tmp_path}"))) == before

    def test_flip_is_honoured(self, tmp_path):
        self.make(tmp_path, *(f"{'ab'[i % 2]}/{i}.png" for i in range(10)))
        index, both = np.arange(8).reshape(2, 4), []
        for flip in (True, False):
            images = data.load(streamed(f"folder:{tmp_path}", flip=flip)).train.images
            both.append(np.concatenate(list(images.batches(index, 0, 0, train=True))))
            kept = images.take(np.array([3, 5]))
            (batch,) = kept.batches(np.array([[1]]), 0, 0, train=True)
            wanted = decode.decode_train(images.records.read(5), (0, 0, 1), SIZE, None, flip)
            assert np.array_equal(batch[0], wanted)
        mirrored = [decode._draw((0, 0, i))[-1] < 0.5 for i in range(8)]
        assert set(mirrored) == {True, False}
        for flipped, upright, is_mirrored in zip(*both, mirrored, strict=True):
            assert np.array_equal(flipped, upright[:, ::-1] if is_mirrored else upright)


class TestTfds:
    def test_same_samples_as_in_memory(self):
        dataset = data.load(config("tfds:tiny", dir=str(TFDS)))
        for split, wanted in (("train", dataset.train), ("test", dataset.test)):
            records = records_lib.tfds_records("tiny", str(TFDS), split)
            assert_same_samples(records, wanted, dataset.class_names)
        (batch,) = run(records, [[0, 1, 2]])
        assert batch.shape == (3, SIZE, SIZE, 3)

    def test_slices_and_fingerprints(self):
        prints = set()
        for split, size in (("train", 9), ("train[:6]", 6), ("train[3:]", 6), ("train+test", 12)):
            records = records_lib.tfds_records("tiny", str(TFDS), split)
            assert len(records.labels) == size
            prints.add(records.fingerprint)
        assert len(prints) == 4
        assert records_lib.tfds_records("tiny", str(TFDS), "train").fingerprint in prints

    def test_labels_of_a_large_split_are_read_once(self, tmp_path, monkeypatch):
        monkeypatch.setattr(records_lib, "_LABELS_TO_KEEP", 10)
        shutil.copytree(TFDS, tmp_path / "tfds")
        spy = mock.Mock(wraps=records_lib._read_labels)
        monkeypatch.setattr(records_lib, "_read_labels", spy)

        def labels(split):
            return records_lib.tfds_records("tiny", str(tmp_path / "tfds"), split).labels.tolist()

        wanted = labels("train+test")
        assert labels("train+test") == wanted
        assert spy.call_count == 1
        (kept,) = tmp_path.rglob("ipwd_jax_labels_*")
        kept.write_bytes(kept.read_bytes()[:-50])
        assert labels("train+test") == wanted
        assert labels("train+test") == wanted
        assert spy.call_count == 2
        kept.unlink()
        kept.mkdir()  # nothing can be written there
        with pytest.warns(UserWarning, match="reads all labels again"):
            assert labels("train+test") == wanted
        labels("train")
        assert not [path for path in kept.parent.iterdir() if path.name.startswith(".")]

    @pytest.mark.parametrize(
        ("name", "split", "words"),
        [
            ("tiny", "trian", "Did you mean 'train'"),
            ("tiny", "train[oops]", "cannot be read"),
            ("mnistt", "train", "Did you mean 'mnist'"),
            ("mnist", "train", "not prepared in .*ipwd_jax.data.prepare mnist"),
            ("mnist:9.9.9", "train", "cannot be opened"),
        ],
    )
    def test_what_is_wrong_is_said(self, name, split, words):
        with pytest.raises(UserError, match=words):
            records_lib.tfds_records(name, str(TFDS), split)

"""Every source of data: the arrays it gives, and what it says when it cannot."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ipwd_jax import config as config_lib
from ipwd_jax import data
from ipwd_jax.data import cifar
from ipwd_jax.data.base import hold_out
from ipwd_jax.errors import UserError

TFDS = Path(__file__).parent / "data" / "tfds"


def load(name, **settings):
    config = config_lib.default().data
    config.update({"name": name, **settings})
    return data.load(config)


def fails(words, name, **settings):
    with pytest.raises(UserError) as error:
        load(name, **settings)
    for word in words:
        assert word in str(error.value), str(error.value)


def arrays(size=12, classes=3, shape=(6, 6, 3)):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (size, *shape), np.uint8), np.arange(size) % classes


def same(a, b):
    return all(
        np.array_equal(getattr(a, split).images, getattr(b, split).images)
        and np.array_equal(getattr(a, split).labels, getattr(b, split).labels)
        for split in ("train", "test")
    )


class TestArrays:
    def test_statistics_are_those_of_the_training_pixels(self):
        images, labels = arrays(60, shape=(5, 4, 2))
        dataset = data.from_arrays(images, labels, images[:3], labels[:3])
        pixels = images.reshape(-1, 2) / 255
        np.testing.assert_allclose(dataset.mean, pixels.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(dataset.std, pixels.std(axis=0), rtol=1e-6)
        assert dataset.class_names == ("0", "1", "2")

    def test_grey_images_get_a_channel_and_a_constant_channel_has_deviation_one(self):
        dataset = data.from_arrays(
            np.zeros((6, 4, 4), np.uint8), np.arange(6) % 2, test_fraction=0.5
        )
        assert dataset.train.images.shape[1:] == (4, 4, 1) and dataset.std == 1

    @pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3, 0.4, 0.5])
    def test_hold_out_takes_its_share_of_every_class(self, fraction):
        labels = np.array([0] * 10 + [1] * 20 + [2] * 2 + [3], np.int32)
        stay, held = hold_out(data.Split(np.arange(33), labels), fraction)
        wanted = [round(10 * fraction), round(20 * fraction), 1, 0]
        assert np.bincount(held.labels, minlength=4).tolist() == wanted
        assert sorted([*stay.images, *held.images]) == list(range(33))

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
            ({"mean": (0.5,) * 3, "std": (0.1, 0.1, np.nan)}, ["std above 0", "nan"]),
            ({"train_labels": np.zeros(12, int)}, ["1 classes", "at least 2"]),
            ({"train_labels": np.arange(12) % 3 * 2}, ["without a training image: [1, 3]"]),
            ({"test_labels": np.full(12, 7)}, ["none of them: [7]"]),
            ({"test_images": np.zeros((12, 5, 6, 3), np.uint8)}, ["(6, 6, 3)", "(5, 6, 3)"]),
            ({"class_names": ["a", "b", "c", "d"]}, ["4 classes", "[3]"]),
            ({"mean": (0.5,), "std": (0.1,)}, ["3 channels", "[0.5]"]),
        ],
    )
    def test_wrong_arrays(self, change, words):
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

    @pytest.mark.parametrize("shape", [(6, 6, 2), (6, 6, 7), (4, 4, 2), (3, 9, 1), (1, 6, 4)])
    def test_channels_may_be_any_number(self, shape):
        assert data.from_arrays(*arrays(shape=shape)).train.images.shape[1:] == shape

    def test_statistics_of_many_images_are_those_of_all(self, monkeypatch):
        images, labels = arrays(60)
        whole = data.from_arrays(images, labels)
        monkeypatch.setattr(data.base, "_PIXELS_AT_ONCE", 100)
        assert data.fingerprint(data.from_arrays(images, labels)) == data.fingerprint(whole)

    def test_fingerprint_sees_every_part(self):
        images, labels = arrays()
        prints = {data.fingerprint(data.from_arrays(images, labels, images, labels))}
        other = images.copy()
        other[5, 1, 2, 0] ^= 1
        prints.add(data.fingerprint(data.from_arrays(other, labels, images, labels)))
        prints.add(data.fingerprint(data.from_arrays(images, labels, other, labels)))
        prints.add(data.fingerprint(data.from_arrays(images, labels[::-1], images, labels)))
        assert len(prints) == 4


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


def cifar_files(name):
    """A made-up archive's files, and the arrays that they hold."""
    folder, train, test, names, label_bytes = cifar._LAYOUT[name]
    rng = np.random.default_rng(0)
    files, splits = {}, []
    for parts in (train, test):
        images, labels = [], []
        for part in parts:
            image = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
            label = np.arange(4) % 2
            coarse = np.full((4, label_bytes - 1), 19)
            pixels = image.transpose(0, 3, 1, 2).reshape(4, -1)
            record = np.concatenate([coarse, label[:, None], pixels], axis=1).astype(np.uint8)
            files[f"{folder}/{part}"] = record.tobytes()
            images.append(image)
            labels.append(label)
        splits += [np.concatenate(images), np.concatenate(labels)]
    files[f"{folder}/{names}"] = b"apple\npear\n\n"
    return files, data.from_arrays(*splits)


@pytest.fixture(params=["cifar10", "cifar100"])
def archive(request, tmp_path, monkeypatch):
    """A made-up official archive on a "server", its arrays, and an empty local folder."""
    name = request.param
    files, expected = cifar_files(name)
    server = tmp_path / "server"
    server.mkdir()
    path = server / f"{name.replace('cifar', 'cifar-')}-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for file, content in files.items():
            info = tarfile.TarInfo(file)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(cifar, "URL", server.as_uri())
    counts = len(expected.train.labels), len(expected.test.labels)
    monkeypatch.setattr(cifar, "COUNTS", counts)
    monkeypatch.setitem(cifar.SHA256, name, hashlib.sha256(path.read_bytes()).hexdigest())
    return name, path, expected, tmp_path / "local"


class TestCifar:
    def test_archive_is_fetched_once_and_read(self, archive):
        name, path, expected, local = archive
        fails([f"{name} is not in", "--config.data.download", path.name], name, dir=str(local))
        dataset = load(name, dir=str(local), download=True)
        assert same(dataset, expected) and dataset.class_names == ("apple", "pear")
        np.testing.assert_allclose(dataset.mean, cifar.STATISTICS[name][0])
        np.testing.assert_allclose(
            load(name, dir=str(local), mean=(0.1, 0.2, 0.3)).mean, (0.1, 0.2, 0.3)
        )
        path.unlink()
        assert same(load(name, dir=str(local)), expected)

    def test_unpacked_folder_is_read(self, archive):
        name, path, expected, local = archive
        with tarfile.open(path) as tar:
            tar.extractall(local, filter="data")
        assert same(load(name, dir=str(local)), expected)
        assert same(load(name, dir=str(local / cifar._LAYOUT[name][0])), expected)
        cut = next(local.glob("*/*test*.bin"))
        whole = cut.read_bytes()
        cut.write_bytes(whole[: len(whole) // 2])  # two whole records
        fails([cut.name, "4 images", "are needed"], name, dir=str(local))
        next(local.glob("*/*test*.bin")).unlink()
        fails(["not the whole", "test"], name, dir=str(local))

    def test_wrong_bytes_are_refused_and_leave_nothing(self, archive):
        name, path, _, local = archive
        path.write_bytes(path.read_bytes()[:-7])
        fails(["SHA-256", "by hand"], name, dir=str(local), download=True)
        assert list(local.iterdir()) == []
        shutil.copy(path, local)
        fails(["damaged", "Delete it"], name, dir=str(local))

    def test_no_server(self, archive):
        name, path, _, local = archive
        path.unlink()
        fails(["could not be fetched", "by hand"], name, dir=str(local), download=True)
        assert list(local.iterdir()) == []


class TestTfds:
    def test_arrays_come_back_in_the_order_of_their_ids_without_tensorflow(self):
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

    def test_slices(self):
        assert len(load("tfds:tiny", dir=str(TFDS), train_split="train[:6]").train.labels) == 6

    def test_what_is_wrong_is_said(self, tmp_path):
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

    def test_preparing_needs_tensorflow(self, tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "ipwd_jax.data.prepare", "mnist", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1 and done.stderr.startswith("error: preparing a data set needs")


class TestFolder:
    def write(self, path, image=None, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = image or Image.fromarray(np.full((6, 6, 3), 200, np.uint8))
        image.save(path, **options)

    def test_train_and_val_folders(self, tmp_path):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (6, 5, 4, 3), np.uint8)
        places = ["train/bee/1.png", "train/ant/2.png", "train/ant/10.png", "val/bee/x/1.png",
                  "val/ant/3.png", "train/ant/notes.txt"]  # fmt: skip
        for place, image in zip(places[:5], pixels, strict=False):
            self.write(tmp_path / place, Image.fromarray(image))
        (tmp_path / places[5]).write_text("no image")
        dataset = load(f"folder:{tmp_path}")
        assert dataset.class_names == ("ant", "bee")
        assert np.array_equal(dataset.train.images, pixels[[2, 1, 0]])
        assert dataset.train.labels.tolist() == [0, 0, 1]
        assert np.array_equal(dataset.test.images, pixels[[4, 3]])

    def test_odd_files(self, tmp_path):
        frames = [Image.new("P", (6, 6), i) for i in (1, 2)]
        self.write(tmp_path / "a/animated.gif", frames[0], save_all=True, append_images=frames[1:])
        self.write(tmp_path / "a/grey.png", Image.new("L", (6, 6), 7))
        self.write(tmp_path / "a/print.jpg", Image.new("CMYK", (6, 6), (0, 0, 0, 0)))
        turned = Image.fromarray(np.arange(108, dtype=np.uint8).reshape(6, 6, 3))
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        self.write(tmp_path / "b/turned.png", turned, exif=exif)
        self.write(tmp_path / "b/alpha.png", Image.new("RGBA", (6, 6), (9, 8, 7, 255)))
        dataset = load(f"folder:{tmp_path}", test_fraction=0.5)
        images = np.concatenate([dataset.train.images, dataset.test.images])
        assert images.shape == (5, 6, 6, 3)
        wanted = [np.full((6, 6, 3), 7), np.full((6, 6, 3), 255), np.asarray(turned)[::-1, ::-1],
                  np.full((6, 6, 3), (9, 8, 7))]  # fmt: skip
        for image in wanted:
            assert any(np.array_equal(image, x) for x in images)

    def test_sixteen_bits_become_eight(self, tmp_path):
        grey = np.array([[0, 255, 256], [1000, 40000, 65535]], np.uint16)
        for name in "ab":
            self.write(tmp_path / name / "1.png", Image.fromarray(grey))
            self.write(tmp_path / name / "2.png", Image.fromarray(grey))
        dataset = load(f"folder:{tmp_path}", test_fraction=0.5)
        assert np.array_equal(dataset.train.images[0, :, :, 0], [[0, 0, 1], [3, 156, 255]])
        self.write(tmp_path / "a/3.tiff", Image.fromarray(np.ones((2, 3), np.float32)))
        fails(["3.tiff", "mode F"], f"folder:{tmp_path}")

    def test_what_is_no_image_is_left_out(self, tmp_path):
        for name in "ab":
            for i in range(2):
                self.write(tmp_path / name / f"{i}.png")
            (tmp_path / name / "._0.png").write_bytes(b"not an image")
            (tmp_path / name / "album.jpg").mkdir()
        assert len(load(f"folder:{tmp_path}", test_fraction=0.5).train.labels) == 2

    def test_sizes_are_made_equal_on_request(self, tmp_path):
        stripes = np.zeros((10, 30, 3), np.uint8)
        stripes[:, 10:20] = 255  # the middle third is what a centre square keeps
        for i in range(2):
            self.write(tmp_path / f"a/{i}.png", Image.fromarray(stripes))
            self.write(tmp_path / f"b/{i}.png")
        fails(["2 sizes", "(6, 6)", "(10, 30)", "image_size"], f"folder:{tmp_path}")
        dataset = load(f"folder:{tmp_path}", image_size=10, test_fraction=0.5)
        assert dataset.train.images.shape == (2, 10, 10, 3)
        assert (dataset.train.images[0] == 255).all()

    def test_what_is_wrong_is_said(self, tmp_path):
        fails(["no folder"], f"folder:{tmp_path}/nowhere")
        fails(["no class folders"], f"folder:{tmp_path}")
        self.write(tmp_path / "train/a/1.png")
        (tmp_path / "train/b").mkdir()
        fails(["train/b", "no image files"], f"folder:{tmp_path}")
        self.write(tmp_path / "train/a/2.png")  # so that one can be held out
        (tmp_path / "train/b/broken.jpg").write_bytes(b"\xff\xd8 not a picture")
        fails(["broken.jpg", "cannot be read"], f"folder:{tmp_path}")
        self.write(tmp_path / "train/b/broken.jpg")
        self.write(tmp_path / "val/a/1.png")
        self.write(tmp_path / "val/c/1.png")
        fails(["only", "['b', 'c']"], f"folder:{tmp_path}")
        fails(["no folder 'exam'", "['train', 'val']"], f"folder:{tmp_path}", test_split="exam")

    def test_hidden_folders_are_left_out_at_any_depth(self, tmp_path):
        for place in ("a/1.png", "a/x/2.png", "b/1.png", "b/2.png"):
            self.write(tmp_path / place)
        wanted = load(f"folder:{tmp_path}", test_fraction=0.5)
        for place in (".ipynb_checkpoints/a/1.png", "a/.ipynb_checkpoints/1-checkpoint.png",
                      "a/x/.trash/y/3.png"):  # fmt: skip
            self.write(tmp_path / place)
        assert same(load(f"folder:{tmp_path}", test_fraction=0.5), wanted)

    def test_links_that_lead_nowhere_are_told(self, tmp_path, capsys):
        for place in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            self.write(tmp_path / place)
        (tmp_path / "b/2.png").rename(tmp_path / "b/3.png")
        (tmp_path / "b/2.png").symlink_to("3.png")
        load(f"folder:{tmp_path}")
        assert capsys.readouterr().err == ""
        (tmp_path / "b/3.png").unlink()
        (tmp_path / "c").symlink_to("gone")
        load(f"folder:{tmp_path}")
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: links") and f"left out: 2, {tmp_path}" in line

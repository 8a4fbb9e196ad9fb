"""Folders of images are read whatever lies in them, and what cannot be read is named."""

import gc
import os
import pathlib

import numpy as np
from data_helpers import fails, load, same, write_image
from PIL import Image


def test_train_and_val_folders(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 5, 4, 3), np.uint8)
    places = ["train/bee/1.png", "train/ant/2.png", "train/ant/10.png", "val/bee/x/1.png",
              "val/ant/3.png", "train/ant/notes.txt"]  # fmt: skip
    for place, image in zip(places[:5], pixels, strict=False):
        write_image(tmp_path / place, Image.fromarray(image))
    (tmp_path / places[5]).write_text("no image")
    dataset = load(f"folder:{tmp_path}")
    assert dataset.class_names == ("ant", "bee")
    assert np.array_equal(dataset.train.images, pixels[[2, 1, 0]])
    assert dataset.train.labels.tolist() == [0, 0, 1]
    assert np.array_equal(dataset.test.images, pixels[[4, 3]])


def test_folders_of_splits_are_not_taken_for_classes(tmp_path):
    for split in ("training", "testing"):
        for name in "ab":
            for i in range(2):
                write_image(tmp_path / split / name / f"{i}.png")
    fails(["looks like a split", "--config.data.train_split"], f"folder:{tmp_path}")
    splits = {"train_split": "training", "test_split": "testing"}
    assert load(f"folder:{tmp_path}", **splits).class_names == ("a", "b")
    splits["test_split"] = "training"
    fails(["test_split is 'training', like the training split"], f"folder:{tmp_path}", **splits)


def test_a_third_split_is_named(tmp_path, capsys):
    for split in ("train", "test", "val"):
        for name in "ab":
            for i in range(2):
                write_image(tmp_path / split / name / f"{i}.png")
    load(f"folder:{tmp_path}")
    assert "has the folder 'val' too, which is not used" in capsys.readouterr().err
    load(f"folder:{tmp_path}", test_split="val")
    assert capsys.readouterr().err == ""
    (tmp_path / "test").rename(tmp_path / "Test")
    (tmp_path / "val").rename(tmp_path / "Eval")
    load(f"folder:{tmp_path}")
    words = capsys.readouterr().err
    assert "has the folder 'Eval' too" in words and "are images held out" in words


def test_the_training_split_is_not_tested_on(tmp_path):
    for split, count in (("train", 4), ("val", 6)):
        for name in "ab":
            for i in range(count):
                write_image(tmp_path / split / name / f"{i}.png")
    dataset = load(f"folder:{tmp_path}", train_split="val", test_fraction=0.5)
    assert [len(x.labels) for x in (dataset.train, dataset.test)] == [6, 6]  # of `val` alone


def test_odd_files(tmp_path):
    frames = [Image.new("P", (6, 6), i) for i in (1, 2)]
    write_image(tmp_path / "a/animated.gif", frames[0], save_all=True, append_images=frames[1:])
    write_image(tmp_path / "a/grey.png", Image.new("L", (6, 6), 7))
    write_image(tmp_path / "a/print.jpg", Image.new("CMYK", (6, 6), (0, 0, 0, 0)))
    turned = Image.fromarray(np.arange(108, dtype=np.uint8).reshape(6, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    write_image(tmp_path / "b/turned.png", turned, exif=exif)
    write_image(tmp_path / "b/alpha.png", Image.new("RGBA", (6, 6), (9, 8, 7, 255)))
    dataset = load(f"folder:{tmp_path}", test_fraction=0.5)
    images = np.concatenate([dataset.train.images, dataset.test.images])
    assert images.shape == (5, 6, 6, 3)
    wanted = [np.full((6, 6, 3), 7), np.full((6, 6, 3), 255), np.asarray(turned)[::-1, ::-1],
              np.full((6, 6, 3), (9, 8, 7))]  # fmt: skip
    for image in wanted:
        assert any(np.array_equal(image, x) for x in images)


def test_sixteen_bits_become_eight(tmp_path):
    grey = np.array([[0, 255, 256], [1000, 40000, 65535]], np.uint16)
    for name in "ab":
        write_image(tmp_path / name / "1.png", Image.fromarray(grey))
        write_image(tmp_path / name / "2.png", Image.fromarray(grey))
    dataset = load(f"folder:{tmp_path}", test_fraction=0.5)
    assert np.array_equal(dataset.train.images[0, :, :, 0], [[0, 0, 1], [3, 156, 255]])
    write_image(tmp_path / "a/3.tiff", Image.fromarray(np.ones((2, 3), np.float32)))
    fails(["3.tiff", "mode F"], f"folder:{tmp_path}")


def test_what_is_no_image_is_left_out(tmp_path):
    for name in "ab":
        for i in range(2):
            write_image(tmp_path / name / f"{i}.png")
        (tmp_path / name / "._0.png").write_bytes(b"not an image")
        (tmp_path / name / "album.jpg").mkdir()
    assert len(load(f"folder:{tmp_path}", test_fraction=0.5).train.labels) == 2


def test_sizes_are_made_equal_on_request(tmp_path):
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 255  # the middle third is what a centre square keeps
    for i in range(2):
        write_image(tmp_path / f"a/{i}.png", Image.fromarray(stripes))
        write_image(tmp_path / f"b/{i}.png")
    fails(["2 sizes", "(6, 6)", "(10, 30)", "image_size"], f"folder:{tmp_path}")
    dataset = load(f"folder:{tmp_path}", image_size=10, test_fraction=0.5)
    assert dataset.train.images.shape == (2, 10, 10, 3)
    assert (dataset.train.images[0] == 255).all()


def test_what_is_wrong_is_said(tmp_path):
    fails(["no folder"], f"folder:{tmp_path}/nowhere")
    fails(["no class folders"], f"folder:{tmp_path}")
    write_image(tmp_path / "train/a/1.png")
    (tmp_path / "train/b").mkdir()
    fails(["train/b", "no image files"], f"folder:{tmp_path}")
    write_image(tmp_path / "train/a/2.png")  # so that one can be held out
    (tmp_path / "train/b/broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    fails(["broken.jpg", "cannot be read"], f"folder:{tmp_path}")
    write_image(tmp_path / "train/b/broken.jpg")
    write_image(tmp_path / "val/a/1.png")
    write_image(tmp_path / "val/c/1.png")
    fails(["only", "['b', 'c']"], f"folder:{tmp_path}")
    fails(["no folder 'exam'", "['train', 'val']"], f"folder:{tmp_path}", test_split="exam")


def test_hidden_folders_are_left_out_at_any_depth(tmp_path):
    for place in ("a/1.png", "a/x/2.png", "b/1.png", "b/2.png"):
        write_image(tmp_path / place)
    wanted = load(f"folder:{tmp_path}", test_fraction=0.5)
    for place in (".ipynb_checkpoints/a/1.png", "a/.ipynb_checkpoints/1-checkpoint.png",
                  "a/x/.trash/y/3.png"):  # fmt: skip
        write_image(tmp_path / place)
    assert same(load(f"folder:{tmp_path}", test_fraction=0.5), wanted)


def test_links_to_folders_are_followed(tmp_path):
    for place in ("more/1.png", "b/1.png", "b/2.png", "b/3.png"):
        write_image(tmp_path / place)
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "data/a/more").symlink_to("../../more")
    (tmp_path / "data/a/again").symlink_to(".")
    (tmp_path / "data/a/less").symlink_to("../../more")
    (tmp_path / "data/b").symlink_to("../b")
    write_image(tmp_path / "data/a/2.png")
    dataset = load(f"folder:{tmp_path}/data", test_fraction=0.5)
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    assert np.bincount(labels).tolist() == [2, 3]


def test_links_that_lead_nowhere_are_told(tmp_path, capsys):
    for place in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        write_image(tmp_path / place)
    (tmp_path / "b/2.png").rename(tmp_path / "b/3.png")
    (tmp_path / "b/2.png").symlink_to("3.png")
    load(f"folder:{tmp_path}")
    assert capsys.readouterr().err == ""
    (tmp_path / "b/3.png").unlink()
    (tmp_path / "c").symlink_to("gone")
    load(f"folder:{tmp_path}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 2 broken links") and f"among them {tmp_path}" in line


def test_a_file_that_cannot_be_read_is_closed(tmp_path, monkeypatch):
    raised = []
    monkeypatch.setattr("sys.unraisablehook", raised.append)
    for place in ("a/1.png", "b/1.png", "b/2.png"):
        write_image(tmp_path / place)
    (tmp_path / "a/2.png").symlink_to("/proc/self/mem")  # can be opened, but not read
    fails(["2.png cannot be read as an image"], f"folder:{tmp_path}")
    gc.collect()  # would close a file that was left open, with a warning
    assert not raised


def test_names_that_are_not_utf_8(tmp_path):
    """A class needs another one; a file does not."""
    odd = os.fsdecode(b"caf\xe9")
    for place in ("a/0.png", f"a/{odd}.png", "b/0.png", "b/1.png"):
        write_image(tmp_path / place)
    for settings in ({}, {"streaming": True, "image_size": 8, "crop_padding": 0}):
        assert len(load(f"folder:{tmp_path}", test_fraction=0.5, **settings).class_names) == 2
    (tmp_path / "b").rename(tmp_path / odd)
    fails(["not UTF-8", "'caf\\udce9'", "rename them"], f"folder:{tmp_path}")


def test_a_class_called_train(tmp_path):
    for name in ("bus", "train"):
        for i in range(2):
            write_image(tmp_path / f"{name}/{i}.png")
    fails(["train has no class folders", "train_split=."], f"folder:{tmp_path}")
    dataset = load(f"folder:{tmp_path}", train_split=".", test_fraction=0.5)
    assert dataset.class_names == ("bus", "train")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "is_dir", denied)
    fails(["cannot be read", "Permission denied"], f"folder:{tmp_path}")

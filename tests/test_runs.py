"""Use from Python: configs, finished runs, and the classifiers that they leave."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, settings
from PIL import Image

import ipwd_jax
from ipwd_jax import train
from ipwd_jax.errors import UserError
from ipwd_jax.runs import Classifier


@pytest.fixture(scope="module")
def workdir(squares, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "student"
    train.run(settings(), workdir, squares)
    return workdir


def test_a_finished_run(workdir, squares):
    run = ipwd_jax.load_run(workdir)
    assert run.result == json.loads((workdir / "result.json").read_text())
    assert run.config.weighting.name == "ipwd" and run.config.teacher.name == "tiny_net"
    assert run.data["class_names"] == ["0", "1"] and run.data["image_shape"] == [8, 8, 1]
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert run.history[-1]["test_top1"] == run.result["last"]["top1"]
    samples = run.samples()
    np.testing.assert_array_equal(samples["label"], squares.train.labels)
    assert np.average(samples["weight"]) == pytest.approx(run.result["weights"]["weight_mean"])
    assert samples["class_mass"].sum() == pytest.approx(40, rel=1e-5)
    teacher = ipwd_jax.load_run(next(workdir.parent.glob("*tiny_net*")))
    probabilities = teacher.classifier().predict(squares.train.images).probabilities
    np.testing.assert_allclose(samples["class_mass"], probabilities.sum(axis=0), rtol=1e-4)
    last = teacher.predictions()["last_logits"]
    np.testing.assert_allclose(run.predictions()["teacher_logits"], last, atol=1e-5)
    with pytest.raises(UserError, match=r"has no samples\.npz"):
        teacher.samples()


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_classifier_has_the_logits_of_the_run(which, workdir, squares, caplog):
    student = ipwd_jax.load_run(workdir).classifier(which)
    assert not caplog.records  # Orbax warns if a checkpoint is read otherwise than it was written
    logits = ipwd_jax.load_run(workdir).predictions()[f"{which}_logits"]
    np.testing.assert_allclose(student.logits(squares.test.images), logits, atol=1e-5)
    found = student.predict(squares.test.images, batch_size=7)
    np.testing.assert_allclose(found.probabilities, jax.nn.softmax(logits), atol=1e-5)
    assert found.labels.tolist() == logits.argmax(axis=1).tolist()
    assert found.names == [str(label) for label in found.labels]


def test_the_network_is_compiled_once_for_each_number_of_images(workdir, squares, monkeypatch):
    student, traced, logits = ipwd_jax.load_student(workdir), [], Classifier.logits

    def counted(self, images):
        traced.append(len(images))
        return logits(self, images)

    monkeypatch.setattr(Classifier, "logits", counted)
    for count in (1, 1, 2, 1, 2):
        student.predict(squares.test.images[:count])
    assert traced == [1, 2]


def test_files_and_pillow_images_are_those_of_the_arrays(workdir, squares, tmp_path):
    student, image = ipwd_jax.load_student(workdir), squares.test.images[3]
    pillow = Image.fromarray(image[..., 0])
    pillow.save(tmp_path / "a.png")
    expected = student.predict(image).probabilities
    paths = (path for path in [tmp_path / "a.png"])
    for same in (pillow, tmp_path / "a.png", str(tmp_path / "a.png"), paths, [image, pillow]):
        for row in student.predict(same).probabilities:
            np.testing.assert_allclose(row, expected[0], atol=1e-6)
    pillow.resize((40, 40), Image.Resampling.BOX).convert("RGB").save(tmp_path / "large.png")
    large = student.predict(tmp_path / "large.png").probabilities
    np.testing.assert_allclose(large, expected, atol=0.1)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), r"found uint8 and \(8, 8, 3\)"),
        (np.zeros((8, 8, 1)), "found float64"),
        ([], "the list is empty"),
        ("missing.png", "missing.png cannot be read: No such file"),
        (str(ROOT / "README.md"), "README.md cannot be read as an image"),
        (None, "found a value of type NoneType"),
        (b"bytes", "a Pillow image or an array, found a value of type int"),
        ([Image.new("F", (8, 8))], "has the Pillow mode F, whose pixels have an unknown range"),
    ],
)
def test_images_that_cannot_be_classified(images, words, workdir):
    with pytest.raises(UserError, match=words):
        ipwd_jax.load_student(workdir).predict(images)


def test_arrays_of_jax_are_like_those_of_numpy(workdir, squares):
    student, images = ipwd_jax.load_student(workdir), squares.test.images[:2]
    expected = student.predict(images).probabilities
    for given in (jnp.asarray(images), [jnp.asarray(image) for image in images]):
        np.testing.assert_array_equal(student.predict(given).probabilities, expected)


def test_a_bad_file_is_named_whether_or_not_images_were_streamed(workdir):
    student = ipwd_jax.load_student(workdir)
    for streamed in (False, True):
        classifier = dataclasses.replace(student, centre_crop=streamed)
        with pytest.raises(UserError, match=r"README\.md cannot be read as an image"):
            classifier.predict(ROOT / "README.md")


def test_folders_that_hold_no_run(workdir, tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        ipwd_jax.load_run(tmp_path)
    shutil.copytree(workdir, tmp_path / "older")
    noted = json.loads((tmp_path / "older/config.json").read_text())
    del noted["data"]
    (tmp_path / "older/config.json").write_text(json.dumps(noted))
    with pytest.raises(UserError, match="run its command again"):
        ipwd_jax.load_student(tmp_path / "older")
    (tmp_path / "older/result.json").write_text('{"last": ')
    with pytest.raises(UserError, match=r"older/result\.json cannot be read"):
        ipwd_jax.load_run(tmp_path / "older")
    noted["config"]["model"]["name"] = "mine"
    shutil.copytree(workdir, tmp_path / "own")
    (tmp_path / "own/config.json").write_text(json.dumps({"data": {"image_shape": []}, **noted}))
    with pytest.raises(UserError, match=r"'mine', which is not .* ipwd_jax\.load_config"):
        ipwd_jax.load_student(tmp_path / "own")
    for damaged in ("{", '{"config": []}'):
        (tmp_path / "older/config.json").write_text(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            ipwd_jax.load_run(tmp_path / "older")


def test_configs_of_files():
    config = ipwd_jax.load_config(
        ROOT / "configs/digits_ipwd.py", epochs=3, optimizer__learning_rate=0.2, seeds=(0, 1)
    )
    assert (config.epochs, config.optimizer.learning_rate, config.seeds) == (3, 0.2, (0, 1))
    other = ipwd_jax.load_config(f"{ROOT / 'configs/digits_ipwd.py'}:resnet14,resnet8")
    assert other.teacher.name == "resnet14"
    with pytest.raises(UserError, match=r"Did you mean config\.epochs"):
        ipwd_jax.load_config(ROOT / "configs/digits_ipwd.py", epoch=3)
    with pytest.raises(UserError, match=r"config\.epochs cannot be 'many'"):
        ipwd_jax.load_config(ROOT / "configs/digits_ipwd.py", epochs="many")
    with pytest.raises(UserError, match=r"none\.py cannot be run"):
        ipwd_jax.load_config("none.py")


@pytest.mark.parametrize(
    ("body", "words"),
    [("1 / 0", "fails: ZeroDivisionError"), ("return None", "returns None, not the config")],
)
def test_configs_of_files_that_fail(body, words, tmp_path):
    (tmp_path / "mine.py").write_text(f"def get_config():\n    {body}\n")
    with pytest.raises(UserError, match=words):
        ipwd_jax.load_config(tmp_path / "mine.py")


def test_a_file_may_define_a_network_whose_annotations_are_strings(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "import flax.linen as nn\n"
        "from ipwd_jax.config import default\n\n"
        "class Net(nn.Module):\n    classes: int\n\n"
        "def get_config():\n    return default()\n"
    )
    assert ipwd_jax.load_config(tmp_path / "mine.py").model.name == "resnet8x4"


def test_pillow_images_are_treated_like_files(workdir, tmp_path):
    """Also if they are to be turned, as photos of a telephone are, or printed in CMYK."""
    student = ipwd_jax.load_student(workdir)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "print.jpg")
    for classifier in (student, dataclasses.replace(student, centre_crop=True)):
        for file in (tmp_path / "turned.jpg", tmp_path / "print.jpg"):
            expected = classifier.predict(file).probabilities
            found = classifier.predict(Image.open(file)).probabilities
            np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(UserError, match="mode F"):
        student.predict(Image.fromarray(np.ones((8, 8), np.float32)))
    four = dataclasses.replace(student, image_shape=(8, 8, 4))
    with pytest.raises(UserError, match="images of 4 channels"):
        four.predict(tmp_path / "turned.jpg")
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        student.predict(np.zeros((1, *student.image_shape), np.uint8), batch_size=0)


def test_everything_that_the_package_names_is_there():
    for name in ipwd_jax._EXPORTED:
        assert getattr(ipwd_jax, name) is not None
    assert "resnet8" in ipwd_jax.networks() and "kd" in ipwd_jax.terms()
    assert "ipwd" in ipwd_jax.weightings()
    with pytest.raises(AttributeError):
        _ = ipwd_jax.nothing

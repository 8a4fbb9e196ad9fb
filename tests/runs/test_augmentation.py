"""Runs whose images are distorted and mixed: what they learn from, and what is refused."""

import itertools

import numpy as np
import pytest
from data_helpers import arrays, write_images
from helpers import rows, settings, stopped_after, teacher_folder
from PIL import Image

from ipwd_jax import data, losses, train, workdir
from ipwd_jax.errors import UserError

ALL = {"data__rand_augment": 2, "data__mixup": 0.4, "data__cutmix": 1.0}


@pytest.fixture(scope="module")
def mixed(squares, tmp_path_factory):
    """The folder of a run of IPWD with all augmentations, beside its teacher."""
    workdir = tmp_path_factory.mktemp("runs") / "mixed"
    train.run(settings(**ALL), workdir, squares)
    return workdir


def assert_same_predictions(a, b):
    there, here = np.load(a / "predictions.npz"), np.load(b / "predictions.npz")
    for name in there:
        np.testing.assert_array_equal(there[name], here[name])


def test_resumes_bitwise(squares, mixed):
    config = settings(**ALL)
    config.checkpoint.every_seconds = 0.0
    with stopped_after(saves=2):
        train.run(config, mixed.parent / "stopped", squares)
    train.run(config, mixed.parent / "stopped", squares)
    assert_same_predictions(mixed, mixed.parent / "stopped")


def test_student_without_them_shares_the_teacher(squares, mixed):
    teacher = teacher_folder(mixed.parent, "tiny_net")
    train.run(settings(), mixed.parent / "plain", squares)
    assert teacher_folder(mixed.parent, "tiny_net") == teacher
    assert rows(mixed)[-1]["train_loss"] != rows(mixed.parent / "plain")[-1]["train_loss"]


def test_answers_are_not_cached(squares, mixed):
    assert workdir.chosen(mixed, "teacher.view_cache") == "off"
    config = settings(**ALL, teacher__view_cache="all")
    with pytest.raises(UserError, match="mixed or distorted have more views"):
        train.run(config, mixed.parent / "cached", squares)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss__kd": 0.0, "loss__dkd": 1.0, "weighting__terms": ("dkd",)}, "loss term dkd is not"),
        ({"loss__crd": 1.0}, "the loss term crd is not defined for images"),
        ({"weighting__name": "wsld"}, "weighting.name=wsld is not defined for images"),
    ],
)
def test_what_is_not_defined_for_mixed_images_is_refused(squares, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train.run(settings(data__mixup=0.2, **changes), tmp_path / "run", squares)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weighting", ["uniform", "constant", "ipwd"])
def test_what_is_defined_for_mixed_images_is_accepted(squares, tmp_path, weighting):
    """MixUp with plain distillation, above all."""
    config = settings(data__mixup=0.2, weighting__name=weighting)
    if weighting != "ipwd":
        config.loss.cls = 0.0
    assert "0.9 kd" in next(train.planned(config, tmp_path / "run", squares))


class Rotating(losses.TERMS["kd"]):
    """A user's term that sees rotations and checks nothing itself."""

    rotations = True


@pytest.mark.parametrize("streamed", [True, False])
def test_what_cannot_be_rotated_is_refused_before_the_teacher_is_trained(
    streamed, tmp_path, monkeypatch
):
    monkeypatch.setitem(losses.TERMS, "rotating", Rotating)
    config, dataset = settings(), None
    config.loss.rotating, config.terms.rotating = 1.0, losses.hyper_parameters("kd")
    if streamed:
        for split, name in itertools.product(("train", "test"), "ab"):
            write_images(tmp_path / "images", f"{split}/{name}/1.png", f"{split}/{name}/2.png")
        of_folder = {"name": f"folder:{tmp_path / 'images'}", "image_size": 8, "streaming": True}
        config.data.update({**of_folder, "crop_padding": 0})
        config.batch_size = config.teacher.batch_size = 4
    else:
        dataset = data.from_arrays(*arrays(40, shape=(8, 12, 3)))
        config.data.streaming = False
    words = "streamed images do not allow" if streamed else "needs square ones, found 8x12"
    with pytest.raises(UserError, match=f"the loss term rotating .*{words}"):
        train.run(config, tmp_path / "run", dataset)
    assert not list(tmp_path.rglob("metrics.csv"))


def test_rotations_are_not_distorted(squares, tmp_path):
    config = settings(data__rand_augment=1, loss__sskd=1.0, first_stage__epochs=1)
    config.first_stage.loss.sskd, config.first_stage.optimizer.milestones = 1.0, ()
    with pytest.raises(UserError, match="sskd sees four rotations"):
        train.run(config, tmp_path / "run", squares)


def test_images_must_have_colours_or_be_grey(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 2), np.uint8)
    labels = np.arange(20) % 2
    dataset = data.from_arrays(images, labels, images, labels, name="two")
    with pytest.raises(UserError, match="have 2 channels"):
        train.run(settings(data__rand_augment=1), tmp_path / "run", dataset)


def test_streamed_images_are_distorted_but_not_mixed(tmp_path):
    for i in range(40):
        folder = tmp_path / "images" / ("train" if i < 30 else "test") / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    changes = {"data__streaming": True, "data__crop_padding": 0, "data__image_size": 8}
    changes |= {"data__name": f"folder:{tmp_path / 'images'}", "epochs": 1}
    with pytest.raises(UserError, match="streamed images are not all at hand"):
        train.run(settings(**changes, data__mixup=0.2), tmp_path / "mixed")
    losses = []
    for operations in (0, 2):
        config = settings(**changes, data__rand_augment=operations)
        train.run(config, tmp_path / f"distorted{operations}")
        losses.append(rows(tmp_path / f"distorted{operations}")[-1]["train_loss"])
    assert losses[0] != losses[1]

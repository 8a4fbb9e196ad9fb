"""Training on images that are decoded during training."""

import jax
import numpy as np
import pytest
from data_helpers import write_two_classes
from helpers import settings, stopped_after

from ipwd_jax import data, train
from ipwd_jax.data import streaming, views
from ipwd_jax.errors import UserError

CRLD = {"loss__kd": 0.0, "loss__crld": 1.0, "weighting__terms": ("crld",)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write 40 training and 12 test images of two classes, as PNG files of different sizes."""
    root = tmp_path_factory.mktemp("images")
    write_two_classes(root)
    return root


def streamed(root, **changes):
    config = settings(teacher__view_cache="auto", **changes)
    config.data.update({"name": f"folder:{root}", "streaming": True, "image_size": 8})
    config.data.crop_padding = 0
    return config


def logits(workdir):
    return np.load(workdir / "predictions.npz")["last_logits"]


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("streamed") / "whole"
    train.run(streamed(root), workdir)
    return workdir


def test_it_resumes_to_the_sample(root, whole):
    config = streamed(root, checkpoint__every_seconds=0.0)
    for saves in (1, 2):
        with stopped_after(saves):
            train.run(config, whole.parent / "pieces")
    train.run(config, whole.parent / "pieces")
    np.testing.assert_array_equal(logits(whole.parent / "pieces"), logits(whole))


def test_a_strong_view_is_made_of_another_crop(root, tmp_path, monkeypatch):
    """The weak view is what it is without a strong one, and training resumes bitwise."""
    config = streamed(root, **CRLD, teacher__name="tiny_net", checkpoint__every_seconds=0.0)
    seen = []
    strong = views.strong

    def spy(how, key, epoch, data, index, streamed=None):
        seen.append(streamed)
        return strong(how, key, epoch, data, index, streamed)

    monkeypatch.setattr(views, "strong", spy)
    train.run(config, tmp_path / "whole")
    assert seen and all(crops is not None and crops.ndim == 4 for crops in seen)
    for saves in (1, 2):
        with stopped_after(saves):
            train.run(config, tmp_path / "pieces")
    train.run(config, tmp_path / "pieces")
    np.testing.assert_array_equal(logits(tmp_path / "pieces"), logits(tmp_path / "whole"))
    images, index = data.load(config.data).train.images, np.arange(40).reshape(5, 8)
    one, two = (list(images.batches(index, 3, 1, True, crops)) for crops in (1, 2))
    for single, double in zip(one, two, strict=True):
        assert double.shape == (8, 2, 8, 8, 3)
        np.testing.assert_array_equal(double[:, 0], single)
        assert (double[:, 1] != single).any()


@pytest.mark.parametrize(
    "setting",
    ["teacher__look_ahead", pytest.param("steps_per_call", marks=pytest.mark.slow)],
)
def test_calls_of_several_steps(setting, root, whole):
    train.run(streamed(root, **{setting: 2}), whole.parent / setting)
    np.testing.assert_allclose(logits(whole.parent / setting), logits(whole), atol=2e-5)


def test_equal_to_the_same_images_in_memory(root, tmp_path, monkeypatch):
    """Random crops and flips are switched off in both runs."""
    batches = streaming.batches

    def plain(records, index, **keys):
        return batches(records, index, **{**keys, "train": False})

    monkeypatch.setattr(streaming, "batches", plain)
    config = streamed(root)
    config.data.flip = False
    train.run(config, tmp_path / "streamed" / "run")
    dataset = data.load(config.data)
    arrays = [
        np.concatenate(list(split.images.batches(np.arange(len(split.labels)).reshape(-1, 4))))
        for split in (dataset.train, dataset.test)
    ]
    resident = data.from_arrays(
        arrays[0], dataset.train.labels, arrays[1], dataset.test.labels,
        mean=dataset.mean, std=dataset.std,
    )  # fmt: skip
    config.data.update({"name": "arrays", "streaming": False, "image_size": 0})
    config.teacher.view_cache = "off"
    train.run(config, tmp_path / "resident" / "run", resident)
    streamed_logits = logits(tmp_path / "streamed" / "run")
    np.testing.assert_array_equal(logits(tmp_path / "resident" / "run"), streamed_logits)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"image_size": 0}, "needs config.data.image_size"),
        ({"name": "cifar100"}, "works for folder:PATH and tfds:NAME only, found 'cifar100'"),
        ({"test_split": "testing"}, "no folder 'testing'"),
        ({"crop_padding": 4}, "crop_padding is 4, but .* set --config.data.crop_padding=0"),
        ({"download": True}, "download is True, which data from folder does not use"),
        ({"dir": "/data"}, "dir is '/data', which data from folder does not use"),
        ({"test_fraction": 0.3}, "test_fraction is 0.3, but nothing is held out"),
    ],
)
def test_wrong_settings(changes, hint, root):
    config = streamed(root)
    config.data.update(changes)
    with pytest.raises(UserError, match=hint):
        data.load(config.data)


def test_what_a_run_cannot_use_is_refused_at_once(root, tmp_path):
    config = streamed(root)
    config.data.image_size = 200_000
    with pytest.raises(UserError, match="decoded images of 200000x200000 pixels"):
        train.run(config, tmp_path / "run")
    config = streamed(root)
    dataset = data.load(config.data)
    config.data.flip = False
    with pytest.raises(UserError, match="flip is False, but the streamed images were opened"):
        train.run(config, tmp_path / "run", dataset)
    config = streamed(root)
    config.data.crop_padding = 1
    with pytest.raises(UserError, match="random resized crops"):
        train.run(config, tmp_path / "run", dataset)
    assert not (tmp_path / "run").exists()


def test_terms_that_need_views_are_refused(root, tmp_path):
    config = streamed(root, loss__sskd=1.0)
    with pytest.raises(UserError, match="which streamed images do not allow"):
        train.run(config, tmp_path / "run")
    config = streamed(root)
    config.teacher.view_cache = "all"
    with pytest.raises(UserError, match="more views than a run draws"):
        train.run(config, tmp_path / "run")


def test_a_damaged_image_is_named(root, tmp_path):
    (tmp_path / "train").mkdir()
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(4):
                (folder / f"{i}.png").write_bytes((root / split / name / f"{i}.png").read_bytes())
    (tmp_path / "train" / "dog" / "2.png").write_bytes(b"no image")
    config = streamed(tmp_path, teacher__name="", loss__kd=0.0, weighting__name="uniform")
    config.batch_size = 4
    with pytest.raises(UserError, match=r"dog/2\.png"):
        train.run(config, tmp_path / "run")
    assert jax.device_count()  # JAX still answers

"""Random combinations of settings: each is refused before anything is trained, or trains.

What trains can be stopped and resumed, and trains each seed of a program as if it were alone, to
the same bits.
"""

import json
import random

import jax
import numpy as np
import pytest
from helpers import rows, settings, stopped_after
from PIL import Image

from ipwd_jax import data, losses, train
from ipwd_jax.errors import UserError

# Each setting with its values, and the probability that it is not left at its default.
OPTIONS = {
    "data__flip": (0.5, (False,)),
    "data__rand_augment": (0.15, (1, 2)),
    "data__mixup": (0.08, (0.3,)),
    "data__cutmix": (0.08, (1.0,)),
    "data__validation_fraction": (0.2, (0.25,)),
    "data__long_tail": (0.2, (3.0,)),
    "batch_size": (0.3, (7, 20)),
    "teacher__view_cache": (0.4, ("off", "all", "drawn")),
    "teacher__look_ahead": (0.25, (2, 3)),
    "teacher__train_mode": (0.15, (True,)),
    "teacher__fold": (0.2, (True,)),
    "teacher__which": (0.2, ("best",)),
    "teacher__label_smoothing": (0.1, (0.1,)),
    "weighting__ratio": (0.3, ("B",)),
    "weighting__standardize": (0.3, (False,)),
    "weighting__clip": (0.3, (1.5,)),
    "weighting__batch_normalize": (0.3, (True,)),
    "weighting__average": (0.3, (0.5,)),
    "weighting__start_epoch": (0.3, (1,)),
    "terms__cls__source": (0.5, ("detached", "network")),
    "steps_per_call": (0.4, (1, 2, 3)),
    "seeds": (0.3, ((0, 1),)),
    "share_order": (0.1, (True,)),
    "precision": (0.2, ("bfloat16",)),
    "optimizer__name": (0.4, ("adamw", "adam", "lion", "lamb")),
    "optimizer__schedule": (0.3, ("cosine",)),
    "trainable": (0.15, (("student/fc",), ("student/features",))),
    "model__classifier_bias": (0.1, (False,)),
    "sync_batch_norm": (0.15, (False,)),
    "patience": (0.2, (1,)),
    "eval_every_epochs": (0.2, (2,)),
    "log_every_steps": (0.2, (1, 2)),
}


def combination(draw):
    """Return a config with some of the options, some loss terms and a weighting."""
    changes = {
        path: draw.choice(values)
        for path, (share, values) in OPTIONS.items()
        if draw.random() < share
    }
    config = settings(optimizer__milestones=(1,), teacher__optimizer__milestones=(), **changes)
    config.first_stage.optimizer.milestones = ()
    config.optimizer.learning_rate = 0.01 if config.optimizer.name == "sgd" else 0.001
    config.terms.crd.update({"feat_dim": 4, "negatives": 6})
    config.terms.fitnet.layer = 1
    config.checkpoint.every_seconds = 0.0
    terms = draw.sample(sorted(losses.TERMS.keys() - {"ce", "cls"}), draw.choice((1, 1, 2, 3)))
    config.loss.update({"kd": 0.0, "cls": 0.0, **dict.fromkeys(terms, 0.1)})
    config.weighting.name = draw.choice(["uniform", *losses.WEIGHTINGS])
    config.weighting.terms = [t for t in terms if losses.TERMS[t].per_sample] or ["ce"]
    config.loss.cls = float(config.weighting.name == "ipwd")
    if draw.random() < 0.3:
        config.first_stage.epochs, config.first_stage.loss[terms[0]] = 1, 0.1
    return config


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Return the same kind of images in memory and streamed: grey noise, brighter by class."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    labels = np.arange(68) % 4
    images = (rng.integers(0, 120, (68, 8, 8, 3)) + 40 * labels[:, None, None, None]).astype(
        np.uint8
    )
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = folder / ("train" if i < 48 else "test") / str(label) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    config = settings(data__name=f"folder:{folder}", data__image_size=8, data__crop_padding=0)
    config.data.streaming = True
    return data.from_arrays(images[:48], labels[:48], images[48:], labels[48:]), config.data


def left(folder):
    """Return what a run has left except for the time that it took."""
    result = json.loads((folder / "result.json").read_text())
    history = [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(folder)]
    predictions = dict(np.load(folder / "predictions.npz"))
    assert np.isfinite(predictions["last_logits"]).all()
    return result["last"], result["best"], history, {k: v.tobytes() for k, v in predictions.items()}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(60))
def test_refused_at_once_or_the_same_after_a_stop_and_alone(number, datasets, tmp_path):
    draw = random.Random(number)
    config, (dataset, streamed) = combination(draw), datasets
    if draw.random() < 0.3:
        config.data, dataset = streamed.copy_and_resolve_references(), None
    try:
        train.run(config, tmp_path / "whole", dataset)
    except UserError:
        assert not list(tmp_path.rglob("metrics.csv"))  # not even of the teacher
        return
    try:
        with stopped_after(draw.choice((1, 2, 3))):
            train.run(config, tmp_path / "pieces", dataset)
    except pytest.fail.Exception:  # it ended before
        pass
    train.run(config, tmp_path / "pieces", dataset)
    seeds = [f"_seed{seed}" for seed in config.seeds] or [""]
    for seed in seeds:
        assert left(tmp_path / f"pieces{seed}") == left(tmp_path / f"whole{seed}")
    if config.seeds:
        config.seed = config.seeds[0 if config.share_order else 1]
        config.seeds, config.share_order = (), False
        train.run(config, tmp_path / "alone", dataset)
        assert left(tmp_path / "alone") == left(tmp_path / f"whole_seed{config.seed}")
    jax.clear_caches()

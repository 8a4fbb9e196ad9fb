"""Runs whose networks also see a strong view of each image, and what is refused there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import settings

from ipwd_jax import data, models, parallel, train, workdir
from ipwd_jax.assemble import assemble
from ipwd_jax.data import views
from ipwd_jax.data.resident import resident
from ipwd_jax.errors import UserError
from ipwd_jax.image_checks import check_images
from ipwd_jax.losses import TERMS
from ipwd_jax.state import augment_key
from ipwd_jax.teacher import from_variables

CRLD = {"loss__kd": 0.0, "loss__crld": 1.0, "weighting__terms": ("crld",)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def run(name, squares, folder, **changes):
    """Train a run with CRLD weighted by IPWD, and return its logits on the test set."""
    train.run(settings(**CRLD, **changes), folder / name, squares)
    return np.load(folder / name / "predictions.npz")["last_logits"]


@pytest.mark.slow
def test_the_cache_answers_for_the_weak_view_alone(squares, folder):
    expected = run("online", squares, folder, teacher__view_cache="off")
    found = run("cached", squares, folder, teacher__view_cache="all")
    assert workdir.chosen(folder / "cached", "teacher.view_cache") == "cached"
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_a_teacher_that_looks_ahead_gives_the_same(squares, folder):
    changes = {"teacher__view_cache": "off", "loss__srrl": 0.1}
    expected, found = (
        run(f"ahead{n}", squares, folder, teacher__look_ahead=n, **changes) for n in (0, 2)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_the_step_runs_the_student_on_the_weak_and_then_on_the_strong_view(squares):
    """Running statistics, cross-entropy and accuracy, compared with two passes of the network."""
    config = settings(**CRLD, loss__cls=0.0, weighting__name="uniform")
    network = models.create("tiny_net", 2)
    variables = jax.jit(network.init)(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))
    experiment = assemble(config, squares, from_variables(config, variables, squares))
    initial = experiment.begin(0, experiment.initial_state(seed=0))
    before = jax.device_get(initial.network())
    here = resident(squares, squares.train)
    index, mask, _ = next(iter(experiment.batches(0, 0)))
    (after,) = experiment.train_step(0)(
        (parallel.replicate(initial),), parallel.replicate(here), experiment.teacher.inputs,
        (index,), (mask,), (None,),
    )  # fmt: skip
    how, key = experiment.step_spec(0).augmentation, augment_key(jax.random.key(0))
    here, sample = jax.tree.map(jnp.asarray, here), jnp.asarray(index.reshape(-1))
    both = jax.jit(
        lambda: (
            views.load(how, key, 0, here, sample).images,
            views.strong(how, key, 0, here, sample),
        )
    )
    apply = jax.jit(functools.partial(network.apply, train=True, mutable=["batch_stats"]))
    stats, losses, logits = before["batch_stats"], [], []
    for images in both():
        outputs, updated = apply({"params": before["params"], "batch_stats": stats}, images)
        stats = updated["batch_stats"]
        logits.append(outputs.logits)
        log_p = jax.nn.log_softmax(outputs.logits)
        losses.append(-log_p[jnp.arange(len(sample)), here.labels[sample]].mean())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        after.batch_stats["student"],
        stats,
    )
    metrics = {name: float(average.compute()) for name, average in after.metrics.items()}
    np.testing.assert_allclose(metrics["ce"], sum(losses), rtol=1e-5)
    right = logits[0].argmax(axis=1) == here.labels[sample]
    np.testing.assert_allclose(metrics["top1"], right.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__rand_augment": 1}, "rand_augment would distort the other view too"),
        ({"data__mixup": 0.2}, "the loss term crld is not defined for images"),
        ({"loss__sskd": 1.0}, "the loss term sskd with rotations of it"),
    ],
)
def test_settings_that_do_not_go_with_it(squares, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train.run(settings(**CRLD, **changes), tmp_path / "run", squares)
    assert not (tmp_path / "run").exists()


def test_images_that_it_cannot_be_made_of(squares):
    two = data.from_arrays(np.zeros((10, 8, 8, 2), np.uint8), np.arange(10) % 2, name="two")
    with pytest.raises(UserError, match=r"the loss term crld compares .*have 2 channels"):
        check_images(settings(), {"crld": TERMS["crld"]()}, two)

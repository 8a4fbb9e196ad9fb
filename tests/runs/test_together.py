"""Several steps per call, a teacher that looks ahead, and a shared order give the same numbers."""

import json

import jax
import numpy as np
import pytest
from helpers import settings

import ipwd_jax
from ipwd_jax import models, packing, parallel, report, train
from ipwd_jax.assemble import assemble
from ipwd_jax.data.resident import resident
from ipwd_jax.errors import UserError
from ipwd_jax.teacher import compare, from_variables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("together")


def logits(workdir):
    return np.load(workdir / "predictions.npz")["last_logits"]


def run(name, dataset, folder, **changes):
    changes = {"teacher__view_cache": "off", **changes}
    train.run(settings(**changes), folder / name, dataset)
    return logits(folder / name)


@pytest.fixture(scope="module")
def alone(squares, folder):
    return {
        seed: run(f"alone_{seed}", squares, folder, seed=seed, teacher__seed=0) for seed in (0, 1)
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher__look_ahead": 2},
        pytest.param({"steps_per_call": 2}, marks=pytest.mark.slow),
        pytest.param({"steps_per_call": 50}, marks=pytest.mark.slow),
    ],
    ids=["look_ahead", "two", "epoch"],
)
def test_steps_of_one_call_are_those_of_several(changes, alone, squares, folder):
    name = "_".join(f"{key}{value}" for key, value in changes.items())
    np.testing.assert_allclose(run(name, squares, folder, **changes), alone[0], atol=2e-5)


@pytest.mark.slow
def test_looking_ahead_keeps_the_classifier_whole(squares, folder):
    """Also beside a term that rotates the images, so that all other answers have more rows."""
    changes = {f"loss__{term}": 0.1 for term in ("srrl", "cat_kd", "sskd")}
    changes |= {"first_stage__epochs": 1, "first_stage__loss__sskd": 1.0}
    changes["first_stage__optimizer__milestones"] = ()
    for ahead in (0, 2):
        run(f"ahead_{ahead}", squares, folder, teacher__look_ahead=ahead, **changes)
    found, expected = (logits(folder / f"ahead_{ahead}") for ahead in (2, 0))
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.slow
def test_a_loop_on_the_device_gives_the_same(alone, squares, folder, monkeypatch):
    scan = jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", lambda *a, unroll=1, **k: scan(*a, **k))
    actual = run("scanned", squares, folder, steps_per_call=3)
    np.testing.assert_allclose(actual, alone[0], atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"optimizer__name": "adamw"}, marks=pytest.mark.slow),
        pytest.param(
            {"loss__crd": 0.1, "loss__sskd": 0.1, "terms__crd__negatives": 6},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sgd", "adamw", "terms"],
)
def test_parameters_in_one_vector_give_the_same(changes, alone, squares, folder, monkeypatch):
    """As on a GPU; the checkpoints have the parameters by name all the same."""
    name = "_".join(["vector", *map(str, changes.values())])
    expected = run(f"{name}_leaves", squares, folder, **changes) if changes else alone[0]
    monkeypatch.setattr(packing, "vectors_pay", lambda: True)
    actual = run(name, squares, folder, steps_per_call=3, **changes)
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    found, usual = (
        ipwd_jax.load_student(folder / run).variables["params"] for run in (name, "alone_0")
    )
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, usual)


def test_seeds_that_share_the_order_ask_the_teacher_once(squares):
    network = models.create("tiny_net", 2)
    variables = jax.jit(network.init)(jax.random.key(0), squares.train.images[:1])

    def convolutions(**changes):
        config = settings(seeds=(0, 1), teacher__view_cache="off", **changes)
        experiment = assemble(config, squares, from_variables(config, variables, squares))
        states = tuple(experiment.begin(0, experiment.initial_state(seed)) for seed in (0, 1))
        batches = [next(experiment.batches(seed, 0)) for seed in (0, 1)]
        assert np.array_equal(batches[0][0], batches[1][0]) == config.share_order
        data = parallel.replicate(resident(squares, squares.train))
        given = (
            parallel.replicate(states),
            data,
            experiment.teacher.inputs,
            *zip(*batches, strict=True),
        )
        program = experiment.train_step(0).lower(*given).compile().as_text()
        return program.count(" convolution(")

    assert convolutions() - convolutions(share_order=True) == 2  # those of one answer


@pytest.mark.slow
def test_seeds_that_share_the_order(alone, squares, folder):
    config = settings(seeds=(0, 1), share_order=True, teacher__view_cache="off")
    train.run(config, folder / "shared", squares)
    np.testing.assert_allclose(logits(folder / "shared_seed0"), alone[0], atol=2e-5)
    other = logits(folder / "shared_seed1")
    assert np.abs(other - alone[0]).max() > 1e-3 and np.abs(other - alone[1]).max() > 1e-4
    noted = json.loads((folder / "shared_seed1" / "config.json").read_text())
    assert noted["config"]["share_order"] is True


def test_a_teacher_that_rounds_says_by_how_much(alone, squares, folder):
    config = settings(teacher__fold=True, teacher__view_cache="off", precision="bfloat16", epochs=1)
    result = train.run(config, folder / "rounded", squares)
    assert 1e-4 < result["teacher"]["logits_error"] < 0.03
    assert result["teacher"]["same_class"] > 0.9
    assert "% error relative to float32" in report.summary(result)
    assert "logits_error" not in json.loads((folder / "alone_0/result.json").read_text())["teacher"]


def test_errors_of_logits_by_hand():
    exact = np.array([[3.0, 4.0], [0.0, 5.0]])
    assert compare(exact, exact) == {"logits_error": 0.0, "same_class": 1.0}
    found = compare(exact + np.array([[2.0, 0.0], [0.0, 0.0]]), exact)
    assert found == {"logits_error": pytest.approx((4 / 50) ** 0.5), "same_class": 0.5}


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"seeds": (1, 1)}, "must not name a seed twice"),
        ({"share_order": True}, "needs several config.seeds"),
        ({"teacher__look_ahead": 4, "teacher__train_mode": True}, "excludes fold and look_ahead"),
    ],
)
def test_refused(changes, hint, squares, folder):
    with pytest.raises(UserError, match=hint):
        run("refused", squares, folder, **changes)

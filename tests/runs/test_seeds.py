"""Each of several seeds in one program has bitwise the same results as if it ran alone."""

import json

import numpy as np
import pytest
from helpers import rows, settings, stopped_after

from ipwd_jax import checkpoint, report, train
from ipwd_jax.errors import UserError

CHANGES = {"epochs": 3, "teacher__view_cache": "off"}


def config(**changes):
    """Return the config of three epochs, the last of which is not the best."""
    result = settings(**{**CHANGES, **changes})
    result.optimizer.milestones = (1,)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("seeds")


@pytest.fixture(scope="module")
def alone(squares, folder):
    for seed in (0, 1):
        train.run(config(seed=seed), folder / f"alone_seed{seed}", squares)
    return folder


TIMES = {"images_per_second", "train_seconds"}


def left(workdir):
    """Return everything that a run writes for its users and that does not depend on the clock."""
    history = [{k: v for k, v in row.items() if k not in TIMES} for row in rows(workdir)]
    result = json.loads((workdir / "result.json").read_text())
    result = {k: v for k, v in result.items() if k not in TIMES}
    predictions = {k: v.tolist() for k, v in np.load(workdir / "predictions.npz").items()}
    return {"rows": history, "result": result, "predictions": predictions}


def assert_as_alone(folder, name, alone, seeds=(0, 1)):
    for seed in seeds:
        there, here = left(alone / f"alone_seed{seed}"), left(folder / f"{name}_seed{seed}")
        for what in there:
            assert here[what] == there[what], (seed, what)


def test_best_epoch_predictions_history_and_weights(alone, squares, folder):
    result = train.run(config(seeds=(0, 1)), folder / "both", squares)
    assert_as_alone(folder, "both", alone)
    assert all(seed["best"]["epoch"] > 0 for seed in result["seeds"])
    scores = train.evaluate_run(config(seeds=(0, 1)), folder / "both", squares)
    assert [s["best"]["epoch"] for s in scores["seeds"]] == [
        s["best"]["epoch"] for s in result["seeds"]
    ]
    assert "seeds 0, 1" in report.summary(scores)


def test_a_seed_that_is_ahead_is_waited_for(alone, squares, folder, monkeypatch, capsys):
    with stopped_after(5):
        stopped = config(seed=0, checkpoint__every_seconds=0.0)
        train.run(stopped, folder / "ahead_seed0", squares)
    newest = {int(p.name) for p in (folder / "ahead_seed0" / "checkpoints").glob("[0-9]*")}
    assert max(newest) == 5
    removed = []
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_set_aside", lambda self, d: removed.extend(d))
        train.run(config(seeds=(0, 1)), folder / "ahead", squares)
    assert not removed
    output = capsys.readouterr().out
    assert "Seed 1 first catches up from step 0 to 5" in output
    assert f"Resuming at step 5 of {folder / 'ahead_seed0'}" in output
    assert_as_alone(folder, "ahead", alone)


def test_the_first_seed_of_a_shared_order_is_binding(squares, folder):
    changes = {"share_order": True, "teacher__view_cache": "drawn"}
    with stopped_after(1):
        train.run(config(seeds=(0, 1), **changes), folder / "shared", squares)
    with pytest.raises(UserError, match=r"config.seeds\[0\]: 0 there, 1 here"):
        train.run(config(seeds=(1, 0), **changes), folder / "shared", squares)

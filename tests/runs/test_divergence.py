"""A network that has diverged ends its run, is not saved, and cannot be a teacher."""

import json
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from helpers import settings

from ipwd_jax import checkpoint, models, recorder, train, workdir
from ipwd_jax.errors import Interrupted, UserError
from ipwd_jax.loop import Loop
from ipwd_jax.report.load import load
from ipwd_jax.state import network_shapes


def labels_only(**changes):
    config = settings(teacher__name="", loss__kd=0.0, loss__cls=0.0, loss__ce=1.0, **changes)
    config.weighting.name = "uniform"
    return config


def test_a_last_step_that_goes_wrong_ends_the_run(squares, tmp_path):
    """The loss of the only step is finite, but the parameters after it are not."""
    config = labels_only(epochs=1, batch_size=40, optimizer__learning_rate=1e38)
    config.optimizer.momentum = 0.0
    with pytest.raises(UserError) as error:
        train.run(config, tmp_path, squares)
    for words in ("after step 1 (epoch 1) of stage 'main'", "not finite", "params/student"):
        assert words in str(error.value)
    assert "Last good checkpoint: none" in str(error.value)
    assert not (tmp_path / "result.json").exists()
    assert (
        json.loads((tmp_path / "failed.json").read_text())["reason"] == f"UserError: {error.value}"
    )
    with pytest.raises(UserError, match=r"first epoch.* It failed: UserError: after step 1 "):
        load(tmp_path)


def test_a_failure_is_noted_until_the_run_is_trained_again(squares, tmp_path, monkeypatch):
    config = labels_only(epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "train", mock.Mock(side_effect=RuntimeError("no memory")))
        with pytest.raises(RuntimeError):
            train.run(config, tmp_path, squares)
        assert workdir.failure(tmp_path) == "RuntimeError: no memory"
        patch.setattr(Loop, "train", mock.Mock(side_effect=Interrupted(15)))
        with pytest.raises(Interrupted):  # a stop is no failure
            train.run(config, tmp_path, squares)
    assert not (tmp_path / "failed.json").exists()
    train.run(config, tmp_path, squares)
    assert (tmp_path / "result.json").exists() and not workdir.failure(tmp_path)


def test_a_network_that_does_not_learn_is_reported():
    """One epoch after the other: too early to tell, at chance, better, and worse again."""
    labels = np.repeat(np.arange(4), 25)
    history = []
    run = SimpleNamespace(
        stage=SimpleNamespace(pretrains=False),
        experiment=SimpleNamespace(dataset=SimpleNamespace(train=SimpleNamespace(labels=labels))),
        now=SimpleNamespace(position=SimpleNamespace(history=history)),
    )
    said = []
    for epoch, top1 in enumerate((25.0, 26.0, 26.0, 80.0, 39.0), 1):
        history.append({"stage": "main", "epoch": epoch, "train_top1": top1})
        said.append([kind for kind, _ in recorder._warnings(run, history[-1])])
    assert said == [[], [], ["chance"], [], ["collapse"]]


def test_a_run_that_does_not_learn_says_so_once(squares, tmp_path, capsys):
    config = labels_only(epochs=4, optimizer__learning_rate=1e-30)
    train.run(config, tmp_path, squares)
    lines = capsys.readouterr().err.splitlines()
    assert sum("epoch 3 ends" in line and "does not seem to learn" in line for line in lines) == 1
    assert not any("epoch 4 ends" in line for line in lines)


def test_no_checkpoint_after_a_bad_step(squares, tmp_path):
    config = labels_only(epochs=2, checkpoint__every_seconds=0.0)
    config.optimizer.learning_rate = 1e38
    with pytest.raises(UserError, match="Last good checkpoint: none"):
        train.run(config, tmp_path, squares)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_a_teacher_that_has_diverged_is_refused(squares, tmp_path):
    config = settings()
    train.run(config, tmp_path / "student", squares, teacher_only=True)
    (folder,) = tmp_path.glob("*tiny_net*")
    template = network_shapes(models.create("tiny_net", 2), (8, 8, 1))
    variables, _ = checkpoint.load_network(folder, "last", template)
    leaves, tree = jax.tree.flatten(jax.device_get(variables))
    leaves[0] = np.full_like(leaves[0], np.nan)
    bad = tmp_path / "bad"
    bad.mkdir()
    checkpoint.save_network(bad, jax.tree.unflatten(tree, leaves))
    (bad / "config.json").write_text(json.dumps({"config": {}, "checksums": {}}))
    (bad / "result.json").write_text("{}")
    with pytest.raises(UserError, match="bad/checkpoints/0/last has diverged: 1 of its arrays"):
        train.run(settings(teacher__workdir=str(bad)), tmp_path / "other", squares)
    assert not (tmp_path / "other").exists()

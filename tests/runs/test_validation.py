"""Validation images that choose the best epoch, through `train.run` and the report."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import rows, settings, squares, stopped_after

import ipwd_jax
from ipwd_jax import data, train
from ipwd_jax.checkpoint import load_network, newest, saved_arrays
from ipwd_jax.errors import UserError

# The second epoch is better than the first.
CHANGES = {"data__validation_fraction": 0.25, "epochs": 5, "batch_size": 8}
CHANGES |= {"loss__ce": 1.0, "loss__kd": 0.1, "loss__cls": 0.0, "weighting__name": "uniform"}
CHANGES |= {"optimizer__milestones": (), "checkpoint__every_seconds": 0.0}


def misleading():
    """Return `squares` with a test set whose labels are wrong, so that it chooses bad epochs."""
    dataset = squares()
    return dataclasses.replace(
        dataset, test=data.Split(dataset.test.images, 1 - dataset.test.labels)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, with its teacher beside it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.run(settings(**CHANGES), folder, misleading())
    return folder


def accuracies(folder, name):
    return [float(row[f"{name}_top1"]) for row in rows(folder)]


def best_network(folder):
    template = saved_arrays(newest(folder) / "best")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(template))
    return load_network(folder, "best", shapes)[0]


def test_the_validation_set_chooses_the_best_epoch(finished):
    of_validation, of_test = (accuracies(finished, name) for name in ("validation", "test"))
    best = 1 + int(np.argmax(of_validation))
    assert best != 1 + int(np.argmax(of_test))
    result = json.loads((finished / "result.json").read_text())
    for which, epoch in (("best", best), ("last", 5)):
        assert result[which]["epoch"] == epoch
        assert result[which]["top1"] == pytest.approx(of_test[epoch - 1])
        assert result[which]["validation_top1"] == pytest.approx(of_validation[epoch - 1])


def test_nothing_is_trained_on_it(finished, tmp_path):
    """The run is that of the remaining images, and so is its teacher's."""
    dataset = misleading()
    rest, held = data.base.hold_out(dataset.train, 0.25)
    assert (len(rest.labels), len(held.labels)) == (30, 10)
    assert len(np.unique(np.concatenate([rest.images, held.images]), axis=0)) == 40
    alone = dataclasses.replace(dataset, train=rest)
    train.run(settings(**{**CHANGES, "data__validation_fraction": 0.0}), tmp_path / "run", alone)
    for name in ("train_loss", "test_nll"):
        for row, wanted in zip(rows(finished), rows(tmp_path / "run"), strict=True):
            assert row[name] == wanted[name]
    with pytest.raises(UserError, match="was trained on other data"):
        teacher = next(path for path in (tmp_path).glob("squares_tiny_net_*"))
        config = settings(teacher__workdir=str(teacher), **CHANGES)
        next(train.planned(config, tmp_path / "other", dataset))


def test_it_is_the_same_after_a_stop(finished, tmp_path):
    folder = tmp_path / "run"
    for saves in (2, 4):
        with stopped_after(saves):
            train.run(settings(**CHANGES), folder, misleading())
    train.run(settings(**CHANGES), folder, misleading())
    jax.tree.map(np.testing.assert_array_equal, best_network(folder), best_network(finished))
    assert accuracies(folder, "validation") == accuracies(finished, "validation")


def test_patience_waits_for_it(finished, tmp_path):
    config = settings(patience=1, **CHANGES)
    train.run(config, tmp_path / "run", misleading())
    seen = accuracies(finished, "validation")
    stop = next((i for i in range(1, 5) if seen[i] <= max(seen[:i])), 4)
    assert len(rows(tmp_path / "run")) == stop + 1


def test_the_plan_and_the_report_say_so(finished, capsys):
    plan = next(train.planned(settings(**CHANGES), finished.with_name("planned"), misleading()))
    assert "30 training, 20 test and 10 validation images" in plan
    ipwd_jax.write_report([finished], finished.with_name("report.html"))
    text = finished.with_name("report.html").read_text()
    assert "highest accuracy on validation images" in text
    assert "top-1 accuracy on the validation images" in text
    assert "validation_top1" in ipwd_jax.summary(json.loads((finished / "result.json").read_text()))


def test_settings_of_the_training_set_are_honoured_for_data_from_python(tmp_path):
    """They were ignored before."""
    config = settings(data__long_tail=4.0, data__validation_fraction=0.2)
    plan = next(train.planned(config, tmp_path / "run", squares()))
    assert "20 training, 20 test and 5 validation images" in plan  # of 20 + 5 after the tail


def test_two_validation_sets_are_refused(tmp_path):
    dataset = dataclasses.replace(squares(), validation=squares().test)
    with pytest.raises(UserError, match="has validation images already"):
        train.run(settings(**CHANGES), tmp_path / "run", dataset)
    config = settings(**{**CHANGES, "data__validation_fraction": 0.0})
    assert "validation_top1" in train.run(config, tmp_path / "run", dataset)["best"]

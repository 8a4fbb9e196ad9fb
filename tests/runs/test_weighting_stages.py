"""A weighting and a stage do not change what they do not concern."""

import jax
import numpy as np
import pytest
from helpers import rows, settings

from ipwd_jax import recorder, report, train
from ipwd_jax.loop import Loop


def with_first_stage(term, **changes):
    config = settings(epochs=1, teacher__view_cache="off", **changes)
    config.loss.update({"ce": 1.0, "kd": 0.0, term: 1.0})
    config.first_stage.epochs = 1
    config.first_stage.loss[term] = 1.0
    config.terms.fitnet.layer = 1
    config.weighting.terms = (term,)
    return config


def test_a_first_stage_is_the_same_whatever_the_weighting(
    squares,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.setattr(recorder, "_FEW", 1.1)
    found = {}
    for weighting in ("uniform", "constant"):
        config = with_first_stage("ft")
        config.first_stage.trainable = ("terms/ft/paraphraser",)
        config.weighting.update({"name": weighting, "constant": 7.0})
        train.run(config, tmp_path / weighting, squares)
        first, main = rows(tmp_path / weighting)
        found[weighting] = first["train_ft"], first["train_loss"], float(main["train_ft"])
        if weighting != "uniform":
            assert first["weight_mean"] == "" and float(main["weight_mean"]) > 1
    assert found["uniform"][:2] == found["constant"][:2]
    assert found["constant"][2] > 5 * found["uniform"][2]
    shown = capsys.readouterr()
    header, row = (shown.out.splitlines()[i] for i in (-2, -1))
    column = slice(header.index("weights to"), header.index("weights to") + len("weights to"))
    assert row[column].strip() == "7"
    warnings = [line for line in shown.err.splitlines() if "effective sample size of" in line]
    assert len(warnings) == 1 and "few samples decide the weighted loss" in warnings[0]


def test_a_weighted_pskd_keeps_its_part_of_the_labels(squares, tmp_path):
    """In the only step, 0.8 of the loss is the past prediction's part, which is the label."""
    found = {}
    for weighting in ("uniform", "constant"):
        config = settings(epochs=1, batch_size=40, teacher__name="")
        config.loss.update({"ce": 0.0, "kd": 0.0, "cls": 0.0, "pskd": 1.0})
        config.weighting.update({"name": weighting, "constant": 7.0, "terms": ("pskd",)})
        train.run(config, tmp_path / weighting, squares)
        found[weighting] = float(rows(tmp_path / weighting)[0]["train_pskd"])
    assert found["constant"] == pytest.approx((0.2 + 7 * 0.8) * found["uniform"], rel=1e-5)


def test_only_the_terms_that_are_named_are_weighted(squares, tmp_path):
    """One step from the same parameters: the weights multiply KD, and nothing else."""
    found = {}
    for weighting in ("uniform", "constant"):
        config = settings(epochs=1, batch_size=40, teacher__view_cache="off")
        config.weighting.update({"name": weighting, "constant": 7.0, "terms": ("kd",)})
        train.run(config, tmp_path / weighting, squares)
        (row,) = rows(tmp_path / weighting)
        found[weighting] = {name: float(row[f"train_{name}"]) for name in ("ce", "cls", "kd")}
    once = found["uniform"]
    assert found["constant"] == pytest.approx({**once, "kd": 7 * once["kd"]}, rel=1e-6)


def test_a_stage_leaves_a_separate_network_alone_that_it_does_not_train(
    squares,
    tmp_path,
    monkeypatch,
):
    """The first stage changes neither parameters nor statistics of the network that IPWD* adds."""
    config = with_first_stage("fitnet")
    config.terms.cls.source = "network"
    seen = []

    def look(self):
        now = self.runs[0].now
        if "network" in now.state.params["heads"]:
            heads = (now.state.params["heads"], now.state.batch_stats["heads"])
            seen.append((now.position.stage, jax.device_get(heads)))
        return False

    monkeypatch.setattr(Loop, "_must_save", look)
    train.run(config, tmp_path / "student", squares)
    first = [heads for stage, heads in seen if stage == 0]
    main = [heads for stage, heads in seen if stage == 1]
    assert len(first) == 3
    same = jax.tree.map(np.array_equal, first[0], first[-1])
    assert all(jax.tree.leaves(same))
    stats = first[0][1]["network"]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(stats["bn1"]["mean"]))
    same = jax.tree.map(np.array_equal, first[0], main[-1])
    assert not any(jax.tree.leaves(same))


def test_undefined_metrics_of_seeds_are_shown_as_such(squares, tmp_path):
    """With two classes, two of the four groups by the teacher's mass are empty."""
    result = train.run(settings(seeds=(0, 1), epochs=1), tmp_path / "run", squares)
    assert result["seeds"][0]["last"]["recall_group3"] is None
    text = report.summary(result)
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["recall_group3"].split()[1:3] == ["undefined", "undefined"]
    assert "+-" in lines["top1"] and "nan" not in text
    again = train.run(settings(seeds=(0, 1), epochs=1), tmp_path / "run", squares)
    assert report.summary(again) == text
    alone = report.summary(result["seeds"][0])
    assert "undefined" in alone and "nan" not in alone


def test_evaluation_counts_the_epochs_of_the_main_stage(squares, tmp_path):
    config = with_first_stage("fitnet")
    config.first_stage.epochs = 2
    result = train.run(config, tmp_path / "student", squares)
    scores = train.evaluate_run(config, tmp_path / "student", squares)
    assert scores["last"]["epoch"] == result["last"]["epoch"] == 1

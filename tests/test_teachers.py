"""Trained teachers with names: stored, listed, used by a run, and refused if they do not fit.

All runs go through `train.run`, with a tiny network.
"""

import hashlib
import json
import shutil

import numpy as np
import pytest
from helpers import settings, squares
from ml_collections import ConfigDict

from ipwd_jax import data, models, teachers, train, validate, workdir
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch.convert import load_variables
from ipwd_jax.teachers.__main__ import main

ALONE = {"loss__ce": 1.0, "loss__kd": 0.0, "loss__cls": 0.0, "weighting__name": "uniform"}
NAME = "tiny_net@squares-2ep"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "teacher"
    train.run(settings(**ALONE, teacher__name="", optimizer__milestones=()), workdir, squares())
    return workdir


@pytest.fixture
def folder(run, tmp_path, monkeypatch):
    """The folder of a package that has one teacher."""
    folder = tmp_path / "package"
    monkeypatch.setattr(teachers, "_FOLDER", folder)
    folder.mkdir()
    teachers.add(run, NAME, folder)
    return folder


def config(**changes):
    return settings(**{"teacher__pretrained": NAME, "epochs": 1} | changes)


def test_a_run_with_a_named_teacher(run, folder, tmp_path, capsys):
    """The teacher is imported once, is that of the run up to float16, and is not trained."""
    result = train.run(config(), tmp_path / "runs/student", squares())
    out = capsys.readouterr().out
    assert f"{NAME}, in {tmp_path / 'runs' / NAME}" in out and "Training tiny_net" in out
    assert out.count("Training") == 1
    trained = json.loads((run / "result.json").read_text())
    assert result["teacher"]["top1"] == pytest.approx(trained["last"]["top1"], abs=6)
    ours, theirs = (load_variables(path) for path in (tmp_path / "runs" / NAME, run))
    kernel = np.asarray(theirs["params"]["fc"]["kernel"])
    expected = kernel.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(ours["params"]["fc"]["kernel"], expected)
    for name, of_layer in theirs["batch_stats"].items():
        for key, value in of_layer.items():
            np.testing.assert_array_equal(ours["batch_stats"][name][key], value)
    other = train.run(config(seed=1), tmp_path / "runs/other", squares())
    assert other["teacher"] == result["teacher"]
    assert "Finished already" not in capsys.readouterr().out


def test_the_plan_counts_no_training_of_it(folder, tmp_path):
    plan = "\n".join(train.planned(config(), tmp_path / "runs/student", squares()))
    assert "tiny_net (" in plan and f"{NAME}, in" in plan and "of the teacher," not in plan
    assert not (tmp_path / "runs").exists()


def test_they_are_listed_with_their_accuracy(run, folder, capsys):
    main()
    row = capsys.readouterr().out.splitlines()[1].split()
    top1 = json.loads((run / "result.json").read_text())["last"]["top1"]
    assert row == [NAME, "tiny_net", "squares", "2", f"{top1:.2f}"]
    assert teachers.about(NAME)["config"]["epochs"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher__pretrained": "tiny_net@squares-3ep"}, "Did you mean 'tiny_net@squares-2ep'"),
        ({"teacher__pretrained": "nowhere.pth"}, "neither a file nor a teacher"),
        ({"teacher__name": "resnet8"}, "is a tiny_net, but config.teacher.name is 'resnet8'"),
        ({"teacher__workdir": "runs/a"}, "an empty config.teacher.workdir"),
        ({"teacher__name": "", **ALONE}, "needs config.teacher.name"),
    ],
)
def test_mistakes_are_named_before_data_is_read(folder, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train.run(config(data__name="numpy:nowhere", **changes), tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_what_does_not_fit_is_refused(run, folder, tmp_path):
    two = squares()
    others = data.from_arrays(
        255 - two.train.images, two.train.labels, two.test.images, two.test.labels, name="others"
    )
    for command in (train.run, lambda *given: next(train.planned(*given))):
        with pytest.raises(UserError, match="trained on other data"):
            command(config(), tmp_path / "a/student", others)
    assert not (tmp_path / "a").exists()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/result.json").write_text("{}")
    (tmp_path / "damaged/config.json").write_text("{")
    damaged = config(teacher__workdir=str(tmp_path / "damaged"), teacher__pretrained="")
    with pytest.raises(UserError, match=r"damaged/config\.json cannot be read"):
        train.run(damaged, tmp_path / "student", two)
    shutil.copytree(run, tmp_path / f"b/{NAME}")
    with pytest.raises(UserError, match="was not imported from"):
        train.run(config(), tmp_path / "b/student", two)
    file = folder / f"{NAME}.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match="is damaged: its SHA-256"):
        train.run(config(), tmp_path / "c/student", two)
    with pytest.raises(UserError, match="exists already"):
        teachers.add(run, NAME, folder)


def test_a_file_can_be_named(folder, tmp_path):
    """Its data is not known, so any is accepted."""
    file = shutil.copy(folder / f"{NAME}.safetensors", tmp_path / "own.safetensors")
    train.run(config(teacher__pretrained=str(file)), tmp_path / "runs/student", squares())
    noted = json.loads((tmp_path / "runs/own/config.json").read_text())
    assert noted["checksums"] == {}


@pytest.mark.parametrize("name", teachers.names())
def test_those_of_the_package(name):
    about, file = teachers.about(name), teachers._FOLDER / f"{name}.safetensors"
    assert file.stat().st_size < 16e6
    assert hashlib.sha256(file.read_bytes()).hexdigest() == about["sha256"]
    variables = load_variables(file, about["network"])
    assert models.create(about["network"], classes=1) and variables["params"]
    assert about["last"]["epoch"] == about["config"]["epochs"]
    validate.validate(ConfigDict(about["config"]))  # also if settings were added since


def test_a_file_is_read_as_the_network_that_the_config_names(folder, tmp_path, monkeypatch):
    """Others can have the same tensors; and the path can begin with `~`."""
    monkeypatch.setitem(models.NETWORKS, "twin", models.NETWORKS["tiny_net"])
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(folder / f"{NAME}.safetensors", tmp_path / "own.safetensors")
    named = config(teacher__pretrained="~/own.safetensors", teacher__name="twin")
    train.run(named, tmp_path / "runs/student", squares())
    again = config(teacher__pretrained="", teacher__workdir="~/runs/own", teacher__name="twin")
    again.model.pretrained = "~/runs/student"
    train.run(again, tmp_path / "other/student", squares())
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["student"]


def test_an_imported_teacher_is_not_taken_for_one_that_was_trained(folder, tmp_path):
    train.run(config(), tmp_path / "student", squares())
    noted = json.loads((tmp_path / NAME / "config.json").read_text())
    assert not workdir.holds(tmp_path / NAME, ConfigDict(noted["config"]), noted["checksums"])

"""Terms, networks, weightings and data sources that a user's config file adds."""

import contextlib
import csv
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, stopped_after
from PIL import Image

from ipwd_jax import (
    assemble,
    cli,
    config,
    convert,
    data,
    losses,
    models,
    train,
    validate,
    workdir,
)
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch import files

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("own_*.py"))
REGISTRIES = (losses.TERMS, losses.WEIGHTINGS, models.NETWORKS, data.SOURCES, data.USED_BY)


@pytest.fixture(autouse=True)
def registries():
    """Remove what a test has added to the registries."""
    with kept():
        yield


@contextlib.contextmanager
def kept():
    """Restore the registries at the end of the block."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def module(name):
    """Import the config file of an example."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


# From the command line


def command(name, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "ipwd_jax.main", f"--config=examples/{name}.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("own_data", "train_ce"),
        pytest.param("own_network", "train_at", marks=pytest.mark.slow),
        pytest.param("own_term", "train_logit_gap", marks=pytest.mark.slow),
        pytest.param("own_weighting", "weight_mean", marks=pytest.mark.slow),
    ],
)
def test_runs_from_the_command_line(name, column, tmp_path):
    one_epoch = ("--config.epochs=1", "--config.teacher.epochs=1")
    done = command(name, *one_epoch, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row[column]) > 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["name"] == name and result["last"]["epoch"] == 1


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("own_term", "terms.logit_gap.scael=2", "Did you mean config.terms.logit_gap.scale?"),
        ("own_weighting", "weighting.sharpnes=2", "Did you mean config.weighting.sharpness?"),
        ("own_network", "model.name=plaim", "Did you mean 'plain'?"),
        ("own_data", "data.name=some_digit:3,5", "Did you mean 'some_digits:DIGITS'?"),
    ],
)
def test_wrong_names_end_with_one_line(name, wrong, words, tmp_path):
    done = command(name, f"--config.{wrong}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert words in done.stderr.splitlines()[-1] and not (tmp_path / "run").exists()


def test_every_example_has_tests():
    assert EXAMPLES == ["own_data", "own_network", "own_term", "own_weighting"]
    for name in EXAMPLES:
        config = module(name).get_config()
        validate.validate(config)
        assert config.name == name


# In a run


def together(**changes):
    """Return a config with the term, the network and the weighting of the examples."""
    for name in ("own_term", "own_weighting", "own_network"):
        made = module(name).get_config()
    made.update({"epochs": 2, "batch_size": 16})
    made.teacher.update({"epochs": 1, "batch_size": 16})
    made.loss.update({"ce": 0.5, "kd": 0.5, "at": 0.0, "logit_gap": 0.1})
    made.weighting.update({"name": "trust", "terms": ("kd", "logit_gap"), "average": 0.5})
    made.update_from_flattened_dict(changes)
    return made


@pytest.fixture(scope="module")
def whole(squares, tmp_path_factory):
    """Return the work directory of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with kept():
        train.run(together(), folder, squares)
    return folder


def test_resumes_bitwise(whole, squares):
    pieces = whole.with_name("pieces")
    changes = {"checkpoint.every_seconds": 0.0}
    with stopped_after(1):
        train.run(together(**changes), pieces, squares)
    result = train.run(together(**changes), pieces, squares)
    assert result["weights"] == json.loads((whole / "result.json").read_text())["weights"]
    for name in ("last_logits", "best_logits"):
        logits = (np.load(folder / "predictions.npz")[name] for folder in (whole, pieces))
        np.testing.assert_array_equal(*logits)


def test_a_network_that_is_not_known_here_is_exported_with_its_config(whole, tmp_path, capsys):
    file = tmp_path / "plain.pth"
    with pytest.raises(SystemExit):
        convert.main(["export", str(whole), str(file)])
    message = capsys.readouterr().err
    assert "'plain'" in message and "--config=FILE" in message and not file.exists()
    own = f"--config={ROOT / 'examples' / 'own_network.py'}"
    convert.main(["export", str(whole), str(file), own])
    tensors = files.load(file)
    assert tensors["conv2.weight"].shape == (64, 32, 3, 3) and "bn2.running_var" in tensors
    convert.main(["import", str(file), f"--workdir={tmp_path / 'again'}", own])
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert (result["network"], result["classes"]) == ("plain", 2)
    image = tmp_path / "grey.png"
    Image.new("L", (8, 8), 90).save(image)
    capsys.readouterr()
    cli.predict([str(whole), str(image), own])
    assert re.fullmatch(rf"{image}: \d \d+\.\d%, \d \d+\.\d%\n", capsys.readouterr().out)


def test_a_config_that_cannot_be_run_is_said_to_be(whole, tmp_path, capsys):
    (tmp_path / "own.py").write_text("import nothing_like_it")
    with pytest.raises(SystemExit):
        convert.main(["export", str(whole), "x.pth", f"--config={tmp_path / 'own.py'}"])
    assert "own.py cannot be run: ModuleNotFoundError" in capsys.readouterr().err


# What does not fit is refused before anything is trained


def with_term(**attributes):
    losses.TERMS["mine"] = type("Mine", (losses.Term,), {"__module__": __name__, **attributes})
    made = config.default()
    made.model.name = "wrn_10_1"
    made.loss.mine = 1.0
    return made


def refusal(made, dataset):
    with pytest.raises(UserError) as error:
        validate.validate(made)
        assemble.assemble(made, dataset, None)
    return str(error.value)


def test_a_term_returns_what_it_says(squares):
    scalar = {"__call__": lambda self, student, teacher, batch: jnp.mean(student.logits)}
    rows = {"__call__": lambda self, student, teacher, batch: jnp.mean(student.logits, axis=1)}
    assemble.assemble(with_term(**rows), squares, None)
    assemble.assemble(with_term(**scalar, per_sample=False), squares, None)
    assert "Mine must return" in refusal(with_term(**scalar), squares)
    assert "returns (2,)" in refusal(with_term(**rows, per_sample=False), squares)


def test_hyper_parameters_that_a_term_refuses(squares):
    def check(self):
        super(losses.TERMS["mine"], self).__post_init__()
        if self.power > 2:
            raise ValueError(f"power must not be above 2, found {self.power}")

    fields = {"__annotations__": {"power": float}, "power": 1.0, "__post_init__": check}
    made = with_term(**fields)
    made.terms.mine.power = 3.0
    assert refusal(made, squares) == "config.terms.mine: power must not be above 2, found 3.0"


def test_fields_are_settings_and_have_defaults():
    losses.TERMS["mine"] = type(
        "Mine", (losses.Term,), {"__module__": __name__, "__annotations__": {"power": float}}
    )
    with pytest.raises(ValueError, match=r"'power' of the loss term 'mine' needs a default"):
        config.default()


def test_a_tuple_of_a_term_has_elements_of_one_type():
    fields = {"__annotations__": {"layers": tuple}, "layers": (1, 2)}
    made = with_term(**fields)
    made.terms.mine.layers = (1.5,)
    with pytest.raises(UserError, match=r"config\.terms\.mine\.layers must be a tuple of whole"):
        validate.validate(made)


@pytest.mark.parametrize(
    ("source", "words"),
    [("netwrok", "source of the head 'extra' of mine 'netwrok'"), ("detached", None)],
)
def test_heads_of_a_term(source, words):
    made = with_term(heads={"extra": source})
    if words is None:
        validate.validate(made)
        made.loss.cls = 1.0
        losses.TERMS["mine"].heads = {"cls": source}
        words = "head 'cls' has the source 'backbone' in the term cls and 'detached' in mine"
    with pytest.raises(UserError, match=words):
        validate.validate(made)


def weighting(**attributes):
    kind = type("Mine", (losses.Weighting,), {"__module__": __name__, **attributes})
    losses.WEIGHTINGS["mine"] = dataclasses.dataclass(frozen=True)(kind)


def test_a_weighting_returns_what_it_says(squares):
    def made():
        of_run = config.default()
        of_run.model.name = "wrn_10_1"
        of_run.weighting.update({"name": "mine", "terms": ("ce",)})
        return of_run

    weighting(weights=lambda self, student, teacher, batch: (student.logits[:, 0], {}))
    assemble.assemble(made(), squares, None)
    weighting(weights=lambda self, student, teacher, batch: (student.logits, {}))
    assert "the weights (2, 2)" in refusal(made(), squares)
    weighting(weights=lambda self, student, teacher, batch: (batch.mask, {}), memory=("seen",))
    assert "for the weights, seen; found the weights (2,)" in refusal(made(), squares)
    weighting(teacher_taps=("logits",))
    assert "config.weighting.name=mine needs a teacher" in refusal(made(), squares)
    weighting(heads=lambda self: {"kd": "compares the distilled head"})
    assert "name=mine compares the distilled head, which nothing trains" in refusal(made(), squares)


@pytest.mark.parametrize("field", ["clip", "constant", "terms"])
def test_fields_of_weightings_are_not_taken_twice(field):
    weighting(**{"__annotations__": {field: float}, field: 7.0})
    with pytest.raises(ValueError, match=rf"'{field}' of the weighting 'mine'"):
        config.default()


def test_a_config_may_be_older_than_a_weighting():
    old = config.default()
    weighting(__annotations__={"power": float}, power=1.0)
    validate.validate(old)
    old.weighting.name = "mine"
    with pytest.raises(UserError, match=r"config\.weighting\.power is missing"):
        validate.validate(old)


def test_a_teacher_is_the_same_whatever_its_students_add(tmp_path):
    teacher = config.default()
    before = workdir.identity(teacher, {"data": "1"})
    workdir_of_it = tmp_path / "teacher"
    workdir_of_it.mkdir()
    workdir.claim(workdir_of_it, teacher, {"data": "1"})
    (workdir_of_it / "result.json").write_text("{}")
    module("own_term"), module("own_weighting")
    with_own = config.default()
    assert {"logit_gap", "sharpness"} <= {*with_own.terms, *with_own.weighting}
    assert workdir.identity(with_own, {"data": "1"}) == before
    assert workdir.holds(workdir_of_it, with_own, {"data": "1"})
    with_own.loss.logit_gap = 1.0
    assert not workdir.holds(workdir_of_it, with_own, {"data": "1"})

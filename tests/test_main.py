"""The command line: help, wrong flags, and the commands that the documentation shows."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ipwd_jax import config as config_lib

ROOT = Path(__file__).parents[1]
DIGITS = "--config=configs/digits_ipwd.py"


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "ipwd_jax.main", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_explains_the_command():
    text = command("--help").stdout
    for word in (DIGITS, "--workdir", "--mode", "<train|teacher|eval>", "--config.data.download"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config=FILE is missing"),
        (["--config=nope.py"], "nope.py does not exist"),
        ([DIGITS, "--config.losss.kd=1"], "unknown setting config.losss.kd. Did you mean"),
        ([DIGITS, "--config.loss.ks=1"], "config.loss has: ab, at, cc, ce, cls, crd, dkd, fitnet"),
        ([DIGITS, "--config.epochs=many"], "--config.epochs=many: invalid literal for int()"),
        ([DIGITS, "--confgi=x"], "Did you mean: config"),
        ([f"{DIGITS}:resnet20"], "takes TEACHER,STUDENT after the colon, found 'resnet20'"),
        ([DIGITS, "--config.model.name=resnet9"], "unknown network 'resnet9'"),
        ([DIGITS, "--mode=trian"], "<train|teacher|eval>"),
        ([DIGITS, "--mode=eval", "--workdir=/nonexistent/run"], "no checkpoint in /nonexistent"),
        ([DIGITS, "extra"], "unexpected argument 'extra'"),
    ],
)
def test_mistakes_end_with_one_line_and_a_status(arguments, words):
    done = command(*arguments)
    assert done.returncode in (1, 2)
    assert words in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_valid(path):
    scope = {}
    exec(compile(path.read_text(), path, "exec"), scope)
    config = scope["get_config"]()
    config_lib.validate(config)
    assert config.name and f"--config=configs/{path.name}" in scope["__doc__"]


def get_config(name, *arguments):
    scope = {}
    exec((ROOT / "configs" / name).read_text(), scope)
    return scope["get_config"](*arguments)


def test_cifar_config_has_the_settings_of_the_paper():
    config = get_config("cifar_ipwd.py")
    assert (config.teacher.name, config.model.name) == ("resnet32x4", "resnet8x4")
    assert (config.epochs, config.batch_size) == (240, 64)
    assert config.optimizer.to_dict() == {
        "learning_rate": 0.05, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4,
        "schedule": "step", "milestones": (150, 180, 210), "decay": 0.1,
    }  # fmt: skip
    assert {k: v for k, v in config.loss.items() if v} == {"ce": 0.1, "kd": 0.9, "cls": 1.0}
    assert config.terms.kd.temperature == 4 and config.weighting.name == "ipwd"
    assert (config.data.crop_padding, config.data.flip) == (4, True)
    other = get_config("cifar_ipwd.py", "resnet110,resnet32")
    assert (other.teacher.name, other.model.name) == ("resnet110", "resnet32")
    assert get_config("cifar_ipwd.py", "vgg13,MobileNetV2").optimizer.learning_rate == 0.01


def test_cifar_teacher_is_the_one_that_students_look_for():
    student = get_config("cifar_ipwd.py", "resnet110,resnet32")
    teacher = get_config("cifar_teacher.py", "resnet110")
    assert teacher.to_dict() == config_lib.teacher_config(student).to_dict()


class TestDocumentation:
    README = (ROOT / "README.md").read_text()

    def test_continuous_integration_runs_the_test_command(self):
        (line,) = re.findall(r"^pip install .*pytest$", self.README, re.M)
        assert line in (ROOT / ".ci" / "run").read_text().replace("pip install -q", "pip install")

    def test_files_that_it_names_exist(self):
        for name in re.findall(r"(?:configs|ipwd_jax|tests)/[\w/]+\.\w+", self.README):
            assert (ROOT / name).exists(), name

    def test_requirements_and_extras_are_those_of_the_project(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert {"cuda12", "cuda13", "test", "colab", "torch"} <= project[
            "optional-dependencies"
        ].keys()
        lines = (ROOT / "requirements.txt").read_text()
        for package in ("jax[cuda12]", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets"):
            assert re.search(rf"^{re.escape(package)}$", lines, re.M), package

"""The command line: help, wrong flags, and the commands that the documentation shows."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import module_of

from ipwd_jax import config as config_lib
from ipwd_jax import losses, validate

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


@pytest.mark.parametrize("flag", ["--help", "-?", "--helpfull"])
def test_help_explains_the_command(flag):
    done = command(flag)
    assert done.returncode == 0 and not done.stderr
    for word in (DIGITS, "--workdir", "--mode", "<train|teacher|eval>", "--config.data.download"):
        assert (word in done.stdout) or flag == "--helpfull"
    assert "--workdir" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config=FILE is missing"),
        (["--config=nope.py"], "nope.py does not exist"),
        ([DIGITS, "--config.losss.kd=1"], "unknown setting config.losss.kd. Did you mean"),
        ([DIGITS, "--config.loss.ks=1"], f"config.loss has: {', '.join(sorted(losses.TERMS))}.\n"),
        ([DIGITS, "--config.epochs=many"], "--config.epochs=many: invalid literal for int()"),
        ([DIGITS, "--confgi=x"], "Did you mean: config"),
        ([f"{DIGITS}:resnet20"], "takes TEACHER,STUDENT after the colon, found 'resnet20'"),
        ([DIGITS, "--config.model.name=resnet9"], "unknown network 'resnet9'"),
        ([DIGITS, "--mode=trian"], "<train|teacher|eval>"),
        (["--config=configs/sweeps/digits.py"], "has no function get_config"),
        ([DIGITS, "--config.terms.at.p=0"], "config.terms.at has no settings"),
        ([DIGITS, "--mode=eval", "--workdir=/nonexistent/run"], "no checkpoint in /nonexistent"),
        ([DIGITS, "extra"], "unexpected argument 'extra'"),
        ([DIGITS, "--num_processes=2"], "--num_processes and --process_id need --distributed"),
        ([DIGITS, "--mode=eval", "--dry_run"], "--dry_run and --extend are for whole runs, not"),
        ([DIGITS, "--mode=teacher", "--extend"], "not for --mode=teacher"),
        ([DIGITS, "--distributed"], "Use --distributed under srun, mpirun or in"),
        (["--config=nope.py", "--config.epochs=3"], "nope.py does not exist"),
        (["--config=configs"], "configs cannot be read"),
        ([DIGITS, "--config.seeds=(0.5,1)"], "config.seeds must be a tuple of whole numbers"),
        ([DIGITS, "--config.optimizer.milestones=abc"], "config.optimizer.milestones must be"),
        ([DIGITS, "--config.optimizer.learning_rate=nan"], "learning_rate must be finite, found"),
    ],
)
def test_mistakes_end_with_one_line_and_a_status(arguments, words):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and words in done.stderr
    assert len(done.stderr.splitlines()) == 1 or "config.loss has: " in done.stderr


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def get_config(:", "FILE, line 1: SyntaxError: "),
        ("import ipwd_jaxx", "FILE, line 1: ModuleNotFoundError: No module named 'ipwd_jaxx'"),
        ("def get_config():\n    return ten", "FILE, line 2: NameError: name 'ten' is not defined"),
        ("def get_config():\n    return 1 + 'a'", "FILE, line 2: TypeError: unsupported operand"),
        ("def get_config():\n    return {}['a']", "FILE, line 2: KeyError: 'a'"),
        ("def get_config():\n    open('/nonexistent')", "FILE, line 2: FileNotFoundError: "),
        ("def get_config():\n    pass", "get_config() of FILE returns None, not the config"),
        ("def got_config():\n    pass", "get_config"),
        (
            "from ml_collections import ConfigDict as get_config",
            "is missing; start from ipwd_jax.config",
        ),
    ],
)
def test_mistakes_in_a_config_file_are_named_with_their_line(body, words, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(body + "\n")
    done = command(f"--config={path}", *(["--config.seed=3"] if "line 2" in words else []))
    line = done.stderr.splitlines()[-1]
    assert (
        "Traceback" not in done.stderr
        and line.startswith("error: ")
        and words.replace("FILE", str(path)) in line
    )
    assert done.returncode == 2


def test_a_config_file_that_leaves_keeps_its_status(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("raise SystemExit(7)\n")
    assert command(f"--config={path}").returncode == 7


def test_an_interrupt_before_the_run_is_no_traceback(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("raise KeyboardInterrupt\n")
    done = command(f"--config={path}")
    assert done.returncode == 130 and "Traceback" not in done.stderr and "stopped" in done.stderr


def test_slow_imports_are_made_where_an_interrupt_is_caught():
    code = "import sys, ipwd_jax.main; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_valid(path):
    module = module_of(path)
    config = module.get_config(*({"own_data": ["photos"]}.get(path.stem, [])))
    validate.validate(config)
    assert config.name and f"--config=configs/{path.name}" in module.__doc__


def get_config(name, *arguments):
    return module_of(ROOT / "configs" / name).get_config(*arguments)


def test_cifar_config_has_the_settings_of_the_paper():
    config = get_config("cifar_ipwd.py")
    assert (config.teacher.name, config.model.name) == ("resnet32x4", "resnet8x4")
    assert (config.epochs, config.batch_size) == (240, 64)
    assert config.optimizer.to_dict() == {
        "name": "sgd", "b1": None, "b2": None, "eps": None,
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
    expected = config_lib.teacher_config(student).to_dict()
    assert teacher.to_dict() == {**expected, "name": "cifar100_resnet110"}  # found by its settings


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

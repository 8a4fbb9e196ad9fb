"""The short command hands its arguments to the modules, and classifies images."""

import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from helpers import ROOT, settings
from PIL import Image

import ipwd_jax
from ipwd_jax import cli, train


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ipwd-jax", *arguments])
    cli.main()


@pytest.mark.parametrize(
    ("command", "argument"),
    [
        ("ipwd-jax train", "--[no]dry_run"),
        ("ipwd-jax eval", "--workdir"),
        ("ipwd-jax predict", "--top"),
        ("ipwd-jax report", "--baseline"),
        ("ipwd-jax sweep", "--minutes"),
        ("ipwd-jax export", "--which"),
        ("ipwd-jax import", "--network"),
        ("python -m ipwd_jax.models", "NAME"),
        ("python -m ipwd_jax.losses", "TEACHER STUDENT"),
        ("python -m ipwd_jax.data.prepare", "DIR"),
        ("python -m ipwd_jax.teachers", "teachers that come with the package"),
    ],
)
def test_every_command_has_help(command, argument):
    program, *arguments = command.split()
    path = sys.executable if program == "python" else Path(sys.executable).with_name(program)
    done = subprocess.run(
        [path, *arguments, "--help"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert argument in done.stdout


def test_an_unknown_command(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "trian")
    assert "unknown command 'trian'; valid: train, eval" in capsys.readouterr().err
    run(monkeypatch)
    assert "ipwd-jax predict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("ipwd_jax.report.__main__.write_report", ["report", "run"]),
        ("ipwd_jax.convert.export_file", ["export", "run", "student.pth"]),
        ("ipwd_jax.runs.load_student", ["predict", "run", "a.png"]),
    ],
)
def test_an_interrupt_of_what_does_not_resume(function, arguments, monkeypatch, capsys):
    monkeypatch.setattr(function, mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match="130"):
        run(monkeypatch, *arguments)
    assert capsys.readouterr().err == "\nstopped\n"


def test_output_that_nothing_reads(tmp_path):
    command = ["sweep", "--config=configs/sweeps/digits.py", f"--out={tmp_path}", "--dry_run"]
    with subprocess.Popen(
        [sys.executable, "-m", "ipwd_jax.cli", *command],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 128 + signal.SIGPIPE)


def test_predict(squares, tmp_path, monkeypatch, capsys):
    config = settings(teacher__name="", loss__kd=0.0, loss__cls=0.0, weighting__name="uniform")
    train.run(config, tmp_path / "run", squares)
    image = squares.test.images[0]
    Image.fromarray(image[..., 0]).save(tmp_path / "a.png")
    capsys.readouterr()
    run(monkeypatch, "predict", str(tmp_path / "run"), str(tmp_path / "a.png"), "--top=1")
    found = ipwd_jax.load_student(tmp_path / "run").predict(image)
    shown = f"a.png: {found.names[0]} {found.probabilities.max():.1%}\n"
    assert capsys.readouterr().out.endswith(shown)
    for arguments, words in ((["none"], "config.json is missing"), (["run", "--top=0"], "found 0")):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, "predict", str(tmp_path / arguments[0]), "a.png", *arguments[1:])
        assert words in capsys.readouterr().err

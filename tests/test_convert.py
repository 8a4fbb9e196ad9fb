"""`python -m ipwd_jax.convert` imports and exports PyTorch's checkpoints."""

import subprocess
import sys
from pathlib import Path

import pytest
from pytorch_helpers import variables

from ipwd_jax import convert
from ipwd_jax.pytorch import files
from ipwd_jax.pytorch.names import to_torch

ROOT = Path(__file__).parents[1]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "ipwd_jax.convert", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_command_line(tmp_path):
    path = tmp_path / "net.pth"
    files.save(path, to_torch(variables()))
    done = command("import", path, f"--workdir={tmp_path / 'net'}", "--network=resnet8")
    assert done.stdout.splitlines() == [
        "resnet8, 10 classes, 78,042 parameters",
        f"Written to {tmp_path / 'net'}",
    ]
    assert done.returncode == 0 and not done.stderr
    done = command("export", tmp_path / "net", path)
    assert done.returncode == 2
    assert done.stderr == f"error: {path} exists already; delete it or choose another name\n"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The work directory of an imported network."""
    folder = tmp_path_factory.mktemp("imported")
    files.save(folder / "net.pth", to_torch(variables()))
    options = [f"--workdir={folder / 'net'}", "--network=resnet8"]
    convert.main(["import", str(folder / "net.pth"), *options])
    return folder / "net"


def exported(workdir, file, capsys):
    """What the command prints to its two streams, and its exit status."""
    status = 0
    try:
        convert.main(["export", str(workdir), str(file)])
    except SystemExit as end:
        status = end.code
    return *capsys.readouterr(), status


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_the_suffix_selects_the_format(suffix, imported, tmp_path, capsys):
    file = tmp_path / f"net{suffix}"
    done = exported(imported, file, capsys)
    assert done == (f"resnet8 written to {file}\n", "", 0)
    assert "fc.weight" in files.load(file)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("net.h5", "must end in one of .pth, .pt, .safetensors, .stablehlo, .onnx, found"),
        ("net.stablehlo", "A .pth, .pt or .safetensors file needs neither"),
    ],
)
def test_what_an_export_refuses(name, words, imported, tmp_path, capsys):
    out, error, status = exported(imported, tmp_path / name, capsys)
    assert status == 2 and not out
    assert error.startswith("error: ") and words in error
    assert not list(tmp_path.iterdir())

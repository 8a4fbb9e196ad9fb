"""`python -m ipwd_jax.convert` imports and exports PyTorch's checkpoints."""

import subprocess
import sys
from pathlib import Path

from pytorch_helpers import variables

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

"""Nothing but a download that was asked for uses the network."""

import json
import subprocess
import sys

from helpers import ROOT

# Python reports each use of a socket as an audit event, whichever module it is used by.
BLOCKED = """
import sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"):
        raise AssertionError(f"the network is used: {event} {arguments[:2]}")
sys.addaudithook(refuse)
from ipwd_jax import cli
cli.main()
"""


def test_a_run_and_its_report(tmp_path):
    """Also, `config.deterministic` reaches the compiler."""

    def command(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", BLOCKED, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run = tmp_path / "run"
    command(
        "train", "--config=configs/digits_ipwd.py:resnet8,resnet8", f"--workdir={run}",
        "--config.epochs=1", "--config.teacher.epochs=1", "--config.deterministic",
    )  # fmt: skip
    assert "deterministic_ops=true" in json.loads((run / "result.json").read_text())["xla_flags"]
    assert "Written to" in command("report", str(run))

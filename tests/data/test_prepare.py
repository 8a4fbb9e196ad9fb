"""`python -m ipwd_jax.data.prepare` says what it needs."""

import subprocess
import sys


def test_preparing_needs_tensorflow(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ipwd_jax.data.prepare", "mnist", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: preparing a data set needs")

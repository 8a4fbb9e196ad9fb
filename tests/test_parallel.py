"""The result of a run does not depend on how many devices share its batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
DEVICES = {
    ("ipwd", "float64", "tiny_net"): (1, 8),
    ("relational", "float64", "tiny_net"): (1, 8),
    ("maps", "float64", "tiny_net"): (1, 8),
    ("views", "float64", "tiny_net"): (1, 8),
    ("ipwd", "float32", "resnet8"): (1, 2, 4, 8),
    ("ipwd", "float64", "resnet8"): (1, 8),
    ("relational", "float64", "resnet8"): (1, 8),
}

SLOW = [case for case in DEVICES if case[2] == "resnet8" or case[0] in ("maps", "views")]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id="-".join(case), marks=[pytest.mark.slow] * (case in SLOW))
        for case in DEVICES
    ],
)
def runs(request, tmp_path_factory):
    """Return the states after ten steps on each number of devices of a process that has eight."""
    kind, dtype, network = request.param
    out = tmp_path_factory.mktemp(kind)
    # Without NPROC, the collectives of virtual devices can deadlock on a machine with few cores.
    environment = {**os.environ, "NPROC": "8", "JAX_NUM_CPU_DEVICES": "8"}
    if dtype == "float64":
        environment["JAX_ENABLE_X64"] = "1"
    subprocess.run(
        [
            *(sys.executable, HERE / "ten_steps.py", out),
            *(json.dumps(DEVICES[request.param]), kind, network),
        ],
        check=True,
        env=environment,
        timeout=900,
    )
    states = {n: dict(np.load(out / f"{n}.npz")) for n in DEVICES[request.param]}
    return dtype, states


def test_equal_on_any_number_of_devices(runs):
    dtype, states = runs
    tolerance = {"float32": 2e-4, "float64": 1e-9}[dtype]
    for n in states.keys() - {1}:
        assert states[n].keys() == states[1].keys()
        for name, expected in states[1].items():
            scale = np.abs(expected).max() + 1e-12
            np.testing.assert_allclose(
                states[n][name] / scale, expected / scale, atol=tolerance, err_msg=f"{name} on {n}"
            )

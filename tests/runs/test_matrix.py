"""Whole runs give the same result in all combinations of circumstances.

The circumstances are the number of devices, the seeds of one program, images that are streamed or
in memory, the number of stages, and runs that are stopped and resumed or not.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, module_of

PROGRAM = Path(__file__).with_name("matrix.py")
METHODS = module_of(PROGRAM).METHODS
# Each combination is (devices, seeds of one program, streamed, stages, stopped). `ALL` has all of
# them, and `SOME` has two in which every circumstance occurs.
ALL = list(itertools.product((1, 2, 8), ((0,), (0, 1, 2)), (False, True), (1, 2), (False, True)))
CHOSEN = {
    "ipwd_cached": [combination for combination in ALL if not combination[2]],
    "ft_ipwd": [combination for combination in ALL if combination[3] == 2],
}
SOME = [(1, (0, 1), True, 2, True), (8, (0, 1), False, 2, False)]


def environment(out):
    """Return variables for eight devices, float64, and a cache of programs that all runs share."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))),
        "NPROC": "8",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_ENABLE_X64": "1",
        "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def results(method, chosen, out):
    """Return logits by (devices, seeds, streamed, stages, stopped, seed).

    Runs of each seed alone, on one device and undisturbed, are included.
    """
    stages = sorted({combination[3] for combination in chosen})
    every = sorted({seed for combination in chosen for seed in combination[1]})
    runs = [(1, (seed,), False, stage, False) for seed in every for stage in stages]
    runs = list(dict.fromkeys([*runs, *chosen]))
    done = subprocess.run(
        [sys.executable, PROGRAM, out, method, json.dumps(runs)],
        env=environment(out), timeout=3000, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = {}
    for devices, seeds, *rest in runs:
        name = "_".join(map(str, (devices, len(seeds), *map(int, rest))))
        for seed in seeds:
            logits = dict(np.load(out / f"{name}_seed{seed}.npz"))
            found[devices, seeds, *rest, seed] = logits
    return found


@pytest.mark.parametrize(
    ("method", "chosen"),
    [("ft_ipwd", SOME)]
    + [pytest.param(method, CHOSEN.get(method, ALL), marks=pytest.mark.slow) for method in METHODS],
    ids=["some-ft_ipwd", *METHODS],
)
def test_equal_results(method, chosen, tmp_path):
    found = results(method, chosen, tmp_path)
    for (devices, seeds, streamed, stages, stopped, seed), actual in found.items():
        here = f"{devices} devices, {seeds=}, {streamed=}, {stages=}, {stopped=}, {seed=}"
        alone = found[1, (seed,), False, stages, False, seed]
        for which in ("last_logits", "best_logits"):
            scale = np.abs(alone[which]).max()
            tolerance = 0 if devices == 1 else 1e-9 * scale  # devices add in another order
            np.testing.assert_allclose(
                actual[which], alone[which], rtol=0, atol=tolerance, err_msg=here
            )


DEVICES = [(8, (0,), False, 1, False)]


def test_a_teacher_in_training_mode_normalises_by_the_global_batch(tmp_path):
    found = results("teacher_in_training", DEVICES, tmp_path)
    alone = found.pop((1, (0,), False, 1, False, 0))
    for actual in found.values():
        np.testing.assert_allclose(actual["last_logits"], alone["last_logits"], rtol=0, atol=1e-9)


def test_unsynchronised_running_means_count_every_row_alike(tmp_path):
    """Parameters do not change, and in the last batch four of the devices have only padding."""
    found = results("unsynced_at_rest", DEVICES, tmp_path)
    alone = found.pop((1, (0,), False, 1, False, 0))
    assert np.abs(alone["running_mean"]).max() > 0.01
    for actual in found.values():
        assert np.isfinite(actual["last_logits"]).all()
        np.testing.assert_allclose(actual["running_mean"], alone["running_mean"], atol=1e-9)
        # The variance within a device's few rows is less than that of all rows.
        assert np.all(actual["running_var"] < alone["running_var"])

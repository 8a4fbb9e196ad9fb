"""Runs that are killed, stopped, damaged or refused, and go on bit for bit."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ipwd_jax import config as config_lib
from ipwd_jax import models, workdir
from ipwd_jax.checkpoint import load_network
from ipwd_jax.errors import UserError
from ipwd_jax.state import network_shapes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Programs are compiled once for all processes."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(runs, environment, *prefix, every_seconds=0.0):
    """One epoch of a teacher and two of a student; a checkpoint after every step by default."""
    command = [
        *prefix, sys.executable, "-m", "ipwd_jax.main",
        "--config=configs/digits_ipwd.py:resnet8,resnet8", "--config.epochs=2",
        "--config.teacher.epochs=1", f"--workdir={runs}/student",
        f"--config.checkpoint.every_seconds={every_seconds}",
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


@pytest.fixture(scope="module")
def reference(tmp_path_factory, environment):
    """The folder of the runs of a teacher and a student that nothing disturbed."""
    runs = tmp_path_factory.mktemp("reference")
    code, output = finish(start(runs, environment, every_seconds=60.0))
    assert code == 0, output
    return runs


def networks(runs):
    template = network_shapes(models.create("resnet8", 10), (8, 8, 1))
    return [
        jax.device_get(load_network(runs / run, which, template)[0])
        for run in ("digits_resnet8_seed0", "student")
        for which in ("last", "best")
    ]


def history(runs):
    with (runs / "student" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def assert_same(runs, reference):
    same = jax.tree.map(np.array_equal, networks(runs), networks(reference))
    assert all(jax.tree.leaves(same))
    assert history(runs) == history(reference)


def checkpoints(runs):
    return {p for p in runs.glob("*/checkpoints/*") if p.name.isdigit()}


@pytest.fixture
def stopped(reference, environment, tmp_path):
    """A student that was stopped in the middle by SIGTERM, beside the finished teacher."""
    shutil.copytree(reference / "digits_resnet8_seed0", tmp_path / "digits_resnet8_seed0")
    process = start(tmp_path, environment)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("student/checkpoints/[0-9]*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 128 + signal.SIGTERM
    assert "SIGTERM; the same command goes on from here" in output
    return tmp_path


def newest(runs):
    return max((p for p in checkpoints(runs) if "student" in str(p)), key=lambda p: int(p.name))


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_stopped_by_a_signal(stopped, reference, environment):
    number = newest(stopped).name
    code, output = finish(start(stopped, environment, every_seconds=60.0))
    assert code == 0 and f"Going on from step {number}" in output
    assert_same(stopped, reference)


def test_stopped_by_control_c(reference, environment, tmp_path):
    process = start(tmp_path, environment)
    while not checkpoints(tmp_path):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 128 + signal.SIGINT and "goes on from here" in output
    code, output = finish(start(tmp_path, environment, every_seconds=60.0))
    assert code == 0, output
    assert_same(tmp_path, reference)


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_damaged_checkpoint_is_set_aside(stopped, reference, environment, damage):
    folder = newest(stopped)
    file = largest_file(folder)
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        file.unlink()
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    code, output = finish(start(stopped, environment, every_seconds=60.0))
    assert code == 0, output
    assert (
        f"damaged-{folder.name}" in output and (folder.parent / f"damaged-{folder.name}").exists()
    )
    assert_same(stopped, reference)


def test_no_checkpoint_can_be_read(stopped, environment):
    for folder in checkpoints(stopped):
        if "student" in str(folder):
            largest_file(folder).write_bytes(b"")
    before = checkpoints(stopped)
    code, output = finish(start(stopped, environment))
    assert code == 2 and "no checkpoint in" in output and "Nothing was changed" in output
    assert checkpoints(stopped) == before


def test_no_space_for_a_checkpoint(stopped, reference, environment):
    limit = "trap '' XFSZ; ulimit -f 98; exec \"$@\""  # files of at most 98 KiB can be written
    number = newest(stopped).name
    code, output = finish(start(stopped, environment, "bash", "-c", limit, "bash"))
    assert code == 2, output
    assert "a checkpoint could not be written" in output
    assert f"Newest complete checkpoint: step {number}" in output
    code, output = finish(start(stopped, environment, every_seconds=60.0))
    assert code == 0, output
    assert_same(stopped, reference)


@pytest.mark.slow
def test_killed_ten_times(reference, environment, tmp_path):
    moments = random.Random(0)
    hit = 0
    while hit < 10:
        known = checkpoints(tmp_path)
        process = start(tmp_path, environment)
        while process.poll() is None and checkpoints(tmp_path) <= known:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.5))  # also while a checkpoint is being written
        if process.poll() is not None:
            pytest.fail(f"the run ended after {hit} kills: {finish(process)[1]}")
        process.kill()
        process.communicate()
        hit += 1
    code, output = finish(start(tmp_path, environment, every_seconds=60.0))
    assert code == 0, output
    assert_same(tmp_path, reference)


class TestWorkDirectory:
    CONFIG = config_lib.default()

    def test_one_process_at_a_time(self, tmp_path):
        with (
            workdir.locked(tmp_path),
            pytest.raises(UserError, match="another process"),
            workdir.locked(tmp_path),
        ):
            pass
        with workdir.locked(tmp_path):
            pass

    def test_another_config_or_other_data_is_refused(self, tmp_path):
        workdir.claim(tmp_path, self.CONFIG, {"data": "1"})
        noted = (tmp_path / "config.json").read_text()
        other = config_lib.default()
        other.optimizer.learning_rate = 0.1
        words = r"config\.optimizer\.learning_rate: 0\.05 there, 0\.1 here"
        with pytest.raises(UserError, match=words):
            workdir.claim(tmp_path, other, {"data": "1"})
        with pytest.raises(UserError, match="checksum of the data: '1' there, '2' here"):
            workdir.claim(tmp_path, self.CONFIG, {"data": "2"})
        assert (tmp_path / "config.json").read_text() == noted

    def test_what_does_not_change_numbers_may_change(self, tmp_path):
        workdir.claim(tmp_path, self.CONFIG, {"data": "1"})
        other = config_lib.default()
        other.log_every_steps, other.data.dir, other.checkpoint.keep = 7, "/elsewhere", 5
        workdir.claim(tmp_path, other, {"data": "1", "teacher": "3"})
        workdir.claim(tmp_path, other, {"data": "1"})
        with pytest.raises(UserError, match="checksum of the teacher"):
            workdir.claim(tmp_path, other, {"teacher": "4"})

    def test_unknown_contents_are_refused(self, tmp_path):
        (tmp_path / "checkpoints" / "7").mkdir(parents=True)
        with pytest.raises(UserError, match=r"checkpoints but no config\.json"):
            workdir.claim(tmp_path, self.CONFIG, {})
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(UserError, match="cannot be read"):
            workdir.claim(tmp_path, self.CONFIG, {})

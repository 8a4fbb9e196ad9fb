"""Runs that are killed or stopped, or whose checkpoints are damaged, resume bitwise."""

import csv
import gc
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, teacher_folder

from ipwd_jax import config as config_lib
from ipwd_jax import models, workdir
from ipwd_jax.checkpoint import Checkpoints, Position, Snapshot, load_network, save_network
from ipwd_jax.errors import UserError
from ipwd_jax.state import TrainState, network_shapes


def start(runs, environment, every_seconds=0.0, prefix=()):
    """Start one epoch of a teacher and two of a student, by default saved after every step."""
    command = [
        *prefix, sys.executable, "-m", "ipwd_jax.main",
        "--config=configs/digits_ipwd.py:resnet8,resnet8", "--config.epochs=2",
        "--config.teacher.epochs=1", f"--workdir={runs / 'student'}",
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


def output_of(process, code=0):
    output, _ = process.communicate(timeout=200)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def reference(tmp_path_factory, environment):
    """Return the folder of uninterrupted runs of a teacher and a student."""
    runs = tmp_path_factory.mktemp("reference")
    output_of(start(runs, environment, every_seconds=60.0))
    return runs


def networks(runs):
    template = network_shapes(models.create("resnet8", 10), (8, 8, 1))
    return [
        jax.device_get(load_network(run, which, template)[0])
        for run in (teacher_folder(runs, "resnet8"), runs / "student")
        for which in ("last", "best")
    ]


def history(run):
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def result(run):
    times = ("images_per_second", "train_seconds")
    return {
        k: v for k, v in json.loads((run / "result.json").read_text()).items() if k not in times
    }


def assert_same(runs, reference):
    same = jax.tree.map(np.array_equal, networks(runs), networks(reference))
    assert all(jax.tree.leaves(same))
    for run in (teacher_folder(reference, "resnet8").name, "student"):
        assert history(runs / run) == history(reference / run)
        assert result(runs / run) == result(reference / run)


def checkpoints(runs, run="*"):
    return {p for p in runs.glob(f"{run}/checkpoints/*") if p.name.isdigit()}


def newest(runs):
    return max(checkpoints(runs, "student"), key=lambda p: int(p.name))


def stop(runs, environment, signum):
    """Start the run, and stop it with a signal after it has written two checkpoints."""
    known = checkpoints(runs)
    process = start(runs, environment)
    deadline = time.monotonic() + 120
    while len(checkpoints(runs, "student") - known) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signum)
    output = output_of(process, 128 + signum)
    assert f"{signum.name}; the same command resumes from here" in output
    assert "Traceback" not in output
    return output


@pytest.fixture(scope="module")
def stopped_once(reference, environment, tmp_path_factory):
    """Return the folder of a student that SIGTERM has stopped, beside its finished teacher."""
    runs = tmp_path_factory.mktemp("stopped")
    teacher = teacher_folder(reference, "resnet8")
    shutil.copytree(teacher, runs / teacher.name)
    stop(runs, environment, signal.SIGTERM)
    return runs


@pytest.fixture
def stopped(stopped_once, tmp_path):
    return shutil.copytree(stopped_once, tmp_path / "runs")


def test_stopped_by_signals(stopped, reference, environment):
    number = newest(stopped).name  # of the run that SIGTERM has stopped
    assert f"Resuming at step {number}" in stop(stopped, environment, signal.SIGINT)
    number = newest(stopped).name
    output = output_of(start(stopped, environment, every_seconds=60.0))
    assert f"Resuming at step {number}" in output
    assert_same(stopped, reference)


def largest_file(folder):
    return max(folder.rglob("d/*"), key=lambda p: p.stat().st_size)  # of the files that hold arrays


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def overwrite(file):
    """Overwrite 64 bytes in three places, because a file can also hold replaced index nodes."""
    with file.open("r+b") as opened:
        for quarter in (1, 2, 3):
            opened.seek(quarter * file.stat().st_size // 4)
            opened.write(random.Random(0).randbytes(64))


@pytest.mark.parametrize(
    "damage",
    [
        overwrite,  # TestCheckpoint also tests the others
        pytest.param(truncate, marks=pytest.mark.slow),
        pytest.param(Path.unlink, marks=pytest.mark.slow),
    ],
)
def test_damaged_checkpoint_is_set_aside(stopped, reference, environment, damage):
    folder = newest(stopped)
    older = min(int(p.name) for p in checkpoints(stopped, "student"))
    assert older < int(folder.name)
    damage(largest_file(folder))
    output = output_of(start(stopped, environment, every_seconds=60.0))
    assert f"warning: checkpoint {folder.name} in {folder.parent} cannot be read" in output
    assert f"Resuming at step {older}" in output
    assert (folder.parent / f"damaged-{folder.name}" / "state").is_dir()
    assert_same(stopped, reference)


def test_no_checkpoint_can_be_read(stopped, environment):
    for folder in checkpoints(stopped, "student"):
        overwrite(largest_file(folder))

    def contents():
        return {p: p.is_file() and p.read_bytes() for p in stopped.rglob("*")}

    before = contents()
    output = output_of(start(stopped, environment), 2)
    assert "no checkpoint in" in output and "Nothing was changed" in output
    assert "Traceback" not in output
    assert contents() == before


def test_no_space_for_a_checkpoint(stopped, reference, environment):
    limited = ("bash", "-c", 'ulimit -f 98; exec "$@"', "bash")  # limits files to 98 KiB
    number = newest(stopped).name
    output = output_of(start(stopped, environment, prefix=limited), 2)
    assert "a checkpoint could not be written" in output
    assert f"Newest complete checkpoint: step {number}" in output
    output = output_of(start(stopped, environment, every_seconds=60.0))
    assert f"Resuming at step {number}" in output
    assert_same(stopped, reference)


@pytest.mark.slow
def test_killed_ten_times(reference, environment, tmp_path):
    moments = random.Random(0)
    kills, while_writing, runs = 0, 0, tmp_path / "0"
    while kills < 10:
        known = checkpoints(runs)
        process = start(runs, environment)
        while process.poll() is None and checkpoints(runs) <= known:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.5))  # may fall within the writing of a checkpoint
        process.kill()
        output, _ = process.communicate()
        if process.returncode == 0:  # the run ended before the kill: begin another
            assert_same(runs, reference)
            runs = tmp_path / str(kills)
            continue
        assert process.returncode == -signal.SIGKILL, output
        kills += 1
        while_writing += any(runs.glob("*/checkpoints/*tmp*"))
    assert while_writing > 0
    output_of(start(runs, environment, every_seconds=60.0))
    assert_same(runs, reference)


class TestCheckpoint:
    """Checkpoints 1 and 2 of a tiny state; the newer one is damaged."""

    @staticmethod
    def state(number):
        numbers = jax.random.normal(jax.random.key(number), (2000,))
        return TrainState(
            step=jnp.int32(number),
            params={"student": {"a": numbers}, "heads": {}},
            batch_stats={"student": {"a": -numbers}},
            memory={"b": 2 * numbers},
            opt_state=(3 * numbers,),
            metrics={},
            nonfinite={},
            key=jax.random.key(number),
        )

    @pytest.fixture
    def run(self, tmp_path):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            for number in (1, 2):
                state = self.state(number)
                position = Position(step=number, best_top1=math.pi, history=[{"loss": math.nan}])
                checkpoints.save(number, Snapshot(state, state.network(), position))
                checkpoints.wait()
        return tmp_path

    def restore(self, run):
        with Checkpoints(run, keep=2) as checkpoints:
            snapshot = checkpoints.restore(lambda position: self.state(0))
        number = snapshot.position.step
        expected = self.state(number)
        plain = lambda state: state.replace(key=jax.random.key_data(state.key))  # noqa: E731
        same = jax.tree.map(np.array_equal, plain(snapshot.state), plain(expected))
        assert all(jax.tree.leaves(same))
        assert np.array_equal(snapshot.best["params"]["a"], expected.params["student"]["a"])
        return number

    def test_undamaged(self, run):
        assert self.restore(run) == 2

    @pytest.mark.parametrize("item", ["last", "best", "state"])
    @pytest.mark.parametrize("damage", [overwrite, truncate, Path.unlink])
    def test_damaged_numbers(self, run, item, damage, capsys):
        damage(largest_file(run / "checkpoints" / "2" / item))
        assert self.restore(run) == 1
        assert "checkpoint 2" in capsys.readouterr().err
        assert (run / "checkpoints" / "damaged-2" / item).is_dir()

    @pytest.mark.parametrize("old", ['"step": 2', "3.14159"])
    def test_overwritten_position(self, run, old, capsys):
        file = run / "checkpoints" / "2" / "meta" / "metadata"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, old[:-1] + "8"))
        assert self.restore(run) == 1
        assert "position" in capsys.readouterr().err

    def test_number_that_was_set_aside_before(self, run, capsys):
        other = run / "checkpoints" / "damaged-2"
        shutil.copytree(run / "checkpoints" / "2", other)
        overwrite(largest_file(run / "checkpoints" / "2" / "last"))
        assert self.restore(run) == 1
        assert other.exists() and (run / "checkpoints" / "damaged-2-again").exists()
        assert "damaged-2-again" in capsys.readouterr().err

    def test_nothing_is_printed_for_each_array(self, tmp_path, monkeypatch, caplog):
        """Orbax abandons the reads of the other arrays after the first that fails."""
        printed = []
        monkeypatch.setattr("sys.unraisablehook", printed.append)
        arrays = {str(i): jax.random.normal(jax.random.key(i), (64, 64)) for i in range(60)}
        save_network(tmp_path, arrays)
        file = largest_file(tmp_path / "checkpoints" / "0" / "last")
        file.write_bytes(random.Random(0).randbytes(file.stat().st_size))
        for _ in range(10):
            with pytest.raises(UserError, match="last cannot be read"):
                load_network(tmp_path, "last", jax.eval_shape(lambda: arrays))
            gc.collect()
        assert not printed and "asyncio" not in {record.name for record in caplog.records}

    def test_one_item(self, run):
        (run / "result.json").write_text("{}")
        template = jax.eval_shape(lambda: self.state(0).network())
        variables, position = load_network(run, "best", template)
        assert position.step == 2
        assert np.array_equal(variables["params"]["a"], self.state(2).params["student"]["a"])
        overwrite(largest_file(run / "checkpoints" / "2" / "best"))
        with pytest.raises(UserError, match="best cannot be read"):
            load_network(run, "best", template)


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

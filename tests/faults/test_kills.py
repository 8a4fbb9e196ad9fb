"""Processes that SIGKILL ends at any moment: the same command then gives the undisturbed result."""

import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from faults_helpers import CONFIG, MARK, a_classifier, command, contents, finished, killed
from helpers import teacher_folder

from ipwd_jax import export, view_files
from ipwd_jax.errors import UserError

# A process that builds a table of answers in 40 batches, and says so before each of them.
BUILD = f"""
import pathlib, sys, time
import numpy as np
from ipwd_jax import view_files

asked = 0

def asker(index, view):
    global asked
    asked += 1
    print({MARK!r}, flush=True)
    if asked > 20:  # wait for the kill
        time.sleep(60)
    return np.stack([index, view, index + view], axis=1).astype(np.float32)

view_files._FLUSH_SECONDS = -1.0
pairs = np.divmod(np.arange(4000, dtype=np.int32), 20)
view_files.TableFiles(pathlib.Path(sys.argv[1]), {{"a": 1}}).build(3, pairs, asker, 100)
"""


def test_a_table_whose_process_is_killed_is_finished(tmp_path):
    was_killed, output = killed([sys.executable, "-c", BUILD, str(tmp_path)], None, 20, 0.0)
    files = view_files.TableFiles(tmp_path, {"a": 1})
    assert was_killed and not files.complete() and not files.table.exists(), output
    asked = []

    def asker(index, view):
        asked.append(index)
        return np.stack([index, view, index + view], axis=1).astype(np.float32)

    pairs = np.divmod(np.arange(4000, dtype=np.int32), 20)
    table = files.build(3, pairs, asker, 100)
    np.testing.assert_array_equal(table, np.stack([*pairs, sum(pairs)], axis=1))
    assert files.complete() and len(asked) < 40  # batches, of which 40 make a whole table


def test_a_note_that_outlives_its_table_does_not_vouch_for_the_next_one(tmp_path):
    """Two kills: one after the table was renamed, the other before the next one has any rows."""
    pairs = np.divmod(np.arange(100, dtype=np.int32), 10)
    files = view_files.TableFiles(tmp_path, {"a": 1})

    def killed_later(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_files, "_FLUSH_SECONDS", -1.0)
        patch.setattr(view_files, "_checksum", killed_later)
        with pytest.raises(KeyboardInterrupt):
            files.build(2, pairs, lambda *rows: np.stack(rows, axis=1), 30)
    unfinished, _ = files._unfinished
    unfinished.rename(files.table)
    with pytest.raises(KeyboardInterrupt):
        files.build(2, pairs, killed_later, 30)
    table = files.build(2, pairs, lambda *rows: np.stack(rows, axis=1), 30)
    np.testing.assert_array_equal(table, np.stack(pairs, axis=1))


# A process that exports a network, and stops after it has written the first of its two files.
EXPORT = f"""
import os, pathlib, sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from faults_helpers import a_classifier
from ipwd_jax import export, writers

def replace(source, target, rename=os.replace):
    rename(source, target)
    print({MARK!r}, flush=True)
    time.sleep(100)

writers.os.replace = replace
export.export_classifier(a_classifier(), pathlib.Path(sys.argv[1]))
"""


def test_an_export_whose_process_is_killed_can_be_repeated(tmp_path):
    pytest.importorskip("flatbuffers", reason="exports to StableHLO")
    path = tmp_path / "a.stablehlo"
    was_killed, output = killed([sys.executable, "-c", EXPORT, str(path)], None, 1, 0.0)
    assert was_killed and [x.name for x in tmp_path.iterdir()] == ["a.stablehlo.json"], output
    export.export_classifier(a_classifier(), path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.stablehlo", "a.stablehlo.json"]
    with pytest.raises(UserError, match=r"a\.stablehlo exists already"):
        export.export_classifier(a_classifier(), path)


# Fifty kills. Each phase is a function, which is called up to so many times before the kill, and
# the longest time in seconds between that call and the kill. They are in the order of a run.
CHECKPOINT = ("ipwd_jax.checkpoint:Checkpoints.save", 2, 0.2)
RUN = {
    "training of the teacher": ("ipwd_jax.loop:Loop._call", 3, 0.5),
    "a checkpoint of the teacher": CHECKPOINT,
    "the table of answers": ("ipwd_jax.view_files:TableFiles.build", 1, 0.1),
    "the same table again": ("ipwd_jax.view_files:TableFiles.build", 1, 0.1),
    "the first stage": ("ipwd_jax.loop:Loop._call", 3, 0.5),
    "a change of stage": ("ipwd_jax.seed_run:SeedRun.begin", 1, 0.3),
    "a checkpoint": CHECKPOINT,
    "an evaluation": ("ipwd_jax.seed_run:SeedRun.scores", 1, 0.1),
    "the files of a run": ("ipwd_jax.writers.write_atomically", 5, 0.02),
}
SWEEP = {
    "training in a sweep": ("ipwd_jax.loop:Loop._call", 3, 0.5),
    "a checkpoint in a sweep": CHECKPOINT,
    "the results in a sweep": ("ipwd_jax.recorder:Recorder.finish", 1, 0.1),
}
EVALUATION = {"an evaluation alone": ("ipwd_jax.evaluate.predict_all", 2, 0.1)}
EXPORT_PHASE = ("ipwd_jax.export.export_classifier", 1, 1.0)


class Kills:
    """Kills commands in some of their phases, at moments from one seed, and counts the kills."""

    def __init__(self, environment):
        self.environment, self.moments, self.counts = environment, random.Random(0), Counter()

    def kill(self, name, phase, folder, *arguments):
        """Start a command and kill it in one phase; return whether it had not yet ended."""
        place, times, longest = phase
        number, seconds = self.moments.randint(1, times), self.moments.uniform(0, longest)
        started, unfinished = command(place, *arguments), self.unfinished(folder)
        was_killed, _ = killed(started, self.environment, number, seconds)
        now = self.unfinished(folder)
        found = {name: True, "all": True}
        found |= {f"while {what} was written": now[what] - unfinished[what] for what in now}
        self.counts.update(key for key, value in found.items() if value and was_killed)
        return was_killed

    def unfinished(self, folder):
        """Return what is written at this moment, or was when a process was killed."""
        patterns = {"a checkpoint": "**/checkpoints/*tmp*", "a table": "*/views/.*.npy"}
        return {
            what: {path.stat().st_ino for path in folder.glob(pattern)}
            for what, pattern in patterns.items()
        }

    def finish(self, *arguments):
        finished([sys.executable, "-m", *map(str, arguments)], self.environment)

    def through(self, phases, folder, *arguments):
        """Run one command again and again, killed in each of its phases, and then to its end."""
        for name, phase in phases.items():
            if not self.kill(name, phase, folder, *arguments):
                return  # the command was faster, so it has done everything
        self.finish(*arguments)


@pytest.mark.slow
def test_fifty_kills(environment, tmp_path, capsys):
    file, kills = tmp_path / "mine.py", Kills(environment)
    file.write_text(CONFIG)

    def train(runs):
        return "ipwd_jax.main", f"--config={file}", f"--workdir={runs / 'student'}"

    def sweep(runs):
        return "ipwd_jax.sweep", f"--config={file}", f"--out={runs}"

    def export_to(path):
        return "ipwd_jax.convert", "export", run / "student", path, f"--config={file}"

    def result_of_evaluation(runs):
        return json.loads((runs / "student" / "eval.json").read_text())

    def numbers(runs):
        teacher = teacher_folder(runs, "tiny_net")
        students = (path for path in runs.iterdir() if path != teacher)
        return contents(teacher), {path.name: contents(path) for path in students}

    run, swept, exported = (tmp_path / name for name in ("run", "swept", "a.stablehlo"))
    kills.finish(*train(run))
    kills.finish(*train(run), "--mode=eval")
    kills.finish(*sweep(swept))
    kills.finish(*export_to(exported))
    lives = (tmp_path / str(number) for number in range(100))
    while kills.counts["all"] < 32:
        kills.through(RUN, folder := next(lives), *train(folder))
        assert numbers(folder) == numbers(run)
    for _ in range(5):
        shutil.copytree(run, folder := next(lives))
        (folder / "student" / "eval.json").unlink()
        kills.through(EVALUATION, folder, *train(folder), "--mode=eval")
        assert result_of_evaluation(folder) == result_of_evaluation(run)
    for _ in range(4):
        path = next(lives).with_suffix(".stablehlo")
        kills.kill("an export", EXPORT_PHASE, tmp_path, *export_to(path))
        if not path.exists():
            kills.finish(*export_to(path))
        assert path.read_bytes() == exported.read_bytes()
        assert path.with_name(f"{path.name}.json").exists()
    while kills.counts["all"] < 50:
        kills.through(SWEEP, folder := next(lives), *sweep(folder))
        assert numbers(folder) == numbers(swept)
    assert kills.counts["while a checkpoint was written"] > 0
    assert kills.counts["while a table was written"] > 0
    with capsys.disabled():
        print(f"\nfaults survived: {kills.counts.pop('all')} kills")
        for name, count in kills.counts.items():
            print(f"  {count} {name}")

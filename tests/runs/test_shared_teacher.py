"""Processes share a teacher: later ones wait for the first, and use what it has made."""

import fcntl
import os
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, settings, stopped_after, teacher_folder

from ipwd_jax import evaluate, train, view_cache, view_files
from ipwd_jax.assemble import assemble
from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Batch
from ipwd_jax.teacher import load
from ipwd_jax.workdir import locked


@pytest.mark.slow
def test_students_that_start_together_share_a_teacher_and_its_views(tmp_path):
    """Two students start at once, as from a shell loop over seeds, before there is a teacher."""
    command = [
        sys.executable, "-m", "ipwd_jax.main", "--config=configs/digits_ipwd.py:resnet8,resnet8",
        "--config.epochs=1", "--config.teacher.epochs=1", "--config.teacher.view_cache=drawn",
    ]  # fmt: skip
    students = [
        subprocess.Popen(
            [*command, f"--config.seed={seed}", f"--workdir={tmp_path / f'seed{seed}'}"],
            cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for seed in (0, 1)
    ]  # fmt: skip
    outputs = [student.communicate(timeout=240)[0] for student in students]
    assert [student.returncode for student in students] == [0, 0], outputs
    waited = [output for output in outputs if "Waiting for another process that is using" in output]
    assert len(waited) >= 1
    teacher = teacher_folder(tmp_path, "resnet8", "digits")
    assert sum("  1/1  " in output.split("Waiting")[0] for output in outputs) >= 1
    assert (teacher / "result.json").exists()
    assert len(list((teacher / "views").glob("*.npy"))) == 2, "one for each seed"


def test_a_folder_that_its_user_removed_is_made_again(tmp_path):
    folder, order = tmp_path / "run", []

    def second():
        with locked(folder, wait=True):
            order.append("second")
            (folder / "file").touch()

    with pytest.raises(UserError, match="refused"), locked(folder):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
        raise UserError("refused")
    thread.join()
    assert order == ["first", "second"] and (folder / "file").exists()


def test_a_work_directory_in_use_is_refused_at_once(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="is using"), locked(tmp_path):
        pass
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again


def test_nothing_is_left_of_a_refused_run(squares, tmp_path):
    config = settings(teacher__view_cache="all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_cache, "shortage", lambda *_, **__: "it has 9 MiB")
        with pytest.raises(UserError, match="does not fit"):
            train.run(config, tmp_path / "student", squares)
    teacher = teacher_folder(tmp_path, "tiny_net")
    assert [path.name for path in tmp_path.iterdir()] == [teacher.name]


def test_the_teacher_answers_on_the_training_set_for_its_first_student_alone(squares, tmp_path):
    config, asked = settings(epochs=1, teacher__epochs=1), []

    def predict_all(predict, variables, data, split, *args, own=evaluate.predict_all):
        asked.append(len(split.labels))
        return own(predict, variables, data, split, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "predict_all", predict_all)
        first = train.run(config, tmp_path / "first", squares)
        assert asked.count(len(squares.train.labels)) == 1
        second = train.run(config, tmp_path / "second", squares)
    assert asked.count(len(squares.train.labels)) == 1
    assert first["last"] == second["last"]


def test_a_run_keeps_to_how_it_asked_the_teacher(squares, tmp_path, monkeypatch, capsys):
    """What `auto` chose for lack of memory still holds if there is enough when the run resumes."""
    config = settings(checkpoint__every_seconds=0.0)
    monkeypatch.setattr(view_cache, "_WORTH", 1.0)  # even for so few epochs
    train.run(config, tmp_path / "student", squares, teacher_only=True)
    with monkeypatch.context() as patch, stopped_after(2):
        patch.setattr(view_cache, "shortage", lambda *_, **__: "it has 9 MiB")
        train.run(config, tmp_path / "student", squares)
    assert "without a cache" in capsys.readouterr().out
    train.run(config, tmp_path / "student", squares)
    assert "views" not in capsys.readouterr().out
    assert not list(tmp_path.glob("*/views/*.npy"))


def test_an_answer_that_was_never_asked_is_no_number(squares, tmp_path):
    config = settings(epochs=1, teacher__epochs=1, teacher__view_cache="drawn")
    train.run(config, tmp_path / "student", squares, teacher_only=True)
    teacher = load(config, teacher_folder(tmp_path, "tiny_net"), squares)
    cache = view_cache.load_or_build(assemble(config, squares, teacher), required=True)
    index, view = np.divmod(np.arange(40 * 18), 18)
    asked = Batch(None, None, jnp.asarray(index), jnp.asarray(view), None, None, None, None)
    known = np.isfinite(view_cache.answer(cache, None, asked).logits).all(axis=1)
    np.testing.assert_array_equal(
        known.reshape(40, 18), view_cache.drawn_views(config, (0,), 1, 40)
    )


def test_old_tables_of_drawn_views_are_removed(tmp_path, capsys):
    pairs = np.divmod(np.arange(10, dtype=np.int32), 5)

    def table(views):
        return view_files.TableFiles(tmp_path, {"views": views})

    def build(files):
        files.make_room()
        files.build(2, pairs, lambda i, v: np.stack([i, v], axis=1).astype(np.float32), 10)

    for seed in range(5):
        build(table({"seeds": [seed], "epochs": 1}))
        time.sleep(0.02)
    left = [seed for seed in range(5) if table({"seeds": [seed], "epochs": 1}).complete()]
    assert left == [2, 3, 4]
    assert "Removing" in capsys.readouterr().out
    build(table("all"))
    assert table("all").complete()

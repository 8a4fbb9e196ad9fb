"""Disks that are full or cannot be written to, a clock that is set back, and numbers that are NaN.

What a run has saved before is kept, the message says what to do, and the same command then gives
the undisturbed result.
"""

import errno
import itertools
import os
import re
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults_helpers import contents
from helpers import settings, teacher_folder

from ipwd_jax import losses, models, train, view_files, writers
from ipwd_jax.checkpoint import load_network
from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Term
from ipwd_jax.pytorch import files
from ipwd_jax.pytorch.names import to_torch
from ipwd_jax.runs import load_run
from ipwd_jax.state import network_shapes, not_finite


def labels_only(**changes):
    config = settings(teacher__name="", loss__kd=0.0, loss__cls=0.0, loss__ce=1.0, **changes)
    config.weighting.name, config.optimizer.milestones = "uniform", ()
    return config


@pytest.fixture(scope="module")
def undisturbed(squares, tmp_path_factory):
    """Return the folder of a run with labels alone that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "student"
    train.run(labels_only(epochs=1), folder, squares)
    return folder


# The disk


class FullDisk:
    """Stands for `os.replace` on a disk that is full the first time that a file is written."""

    def __init__(self):
        self.replace, self.tried = os.replace, []

    def __call__(self, source, target):
        if target in self.tried:
            return self.replace(source, target)
        self.tried.append(target)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def trained_on_a_full_disk(config, folder, squares):
    """Run again after each write that fails; return the files, in the order of these writes."""
    disk = FullDisk()
    with mock.patch.object(os, "replace", disk):
        for _ in range(100):
            before = len(disk.tried)
            try:
                train.run(config, folder, squares)
                return [path.name for path in disk.tried]
            except UserError as error:
                assert f"{disk.tried[before]} cannot be written: No space left" in str(error)
                assert "run the same command again" in str(error)
    raise AssertionError("the run never ends")


def test_a_disk_that_is_full_at_every_write(undisturbed, squares, tmp_path):
    names = trained_on_a_full_disk(labels_only(epochs=1), tmp_path / "student", squares)
    written = ["config.json", "parameters.txt", "metrics.csv", "predictions.npz", "classes.csv"]
    assert [name for name in names if name != "failed.json"] == [*written, "result.json"]
    assert contents(tmp_path / "student") == contents(undisturbed)
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.slow
def test_a_disk_that_is_full_at_every_write_of_two_stages(squares, tmp_path):
    config = settings(teacher__view_cache="all", first_stage__epochs=1, first_stage__loss__kd=1.0)
    train.run(config, tmp_path / "undisturbed" / "student", squares)
    names = trained_on_a_full_disk(config, tmp_path / "full" / "student", squares)
    assert "samples.npz" in names and any(name.endswith(".npy") for name in names)
    full, undisturbed = tmp_path / "full", tmp_path / "undisturbed"
    for run in ("student", teacher_folder(full, "tiny_net").name):
        assert contents(full / run) == contents(undisturbed / run)


def test_a_damaged_result_is_named_and_written_again(undisturbed, squares, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "student")
    (run / "result.json").write_text('{"last":')
    with pytest.raises(UserError, match=r"student/result\.json cannot be read .* delete it"):
        train.run(labels_only(epochs=1), run, squares)
    (run / "result.json").unlink()
    again, before = train.run(labels_only(epochs=1), run, squares), load_run(undisturbed).result
    assert (again["last"], again["best"]) == (before["last"], before["best"])


def test_the_old_content_survives_a_full_disk(tmp_path):
    path = tmp_path / "metrics.csv"
    writers.write_atomically(path, b"old")
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch.object(type(path), "write_bytes", side_effect=full),
        pytest.raises(UserError, match=r"metrics\.csv cannot be written: No space left"),
    ):
        writers.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_two_processes_that_write_the_same_file(tmp_path):
    path, replace = tmp_path / "eval.json", os.replace

    def after_another(source, target):
        with mock.patch.object(os, "replace", replace):
            writers.write_atomically(path, b"of another")
        replace(source, target)

    with mock.patch.object(os, "replace", after_another):
        writers.write_atomically(path, b"own")
    assert path.read_bytes() == b"own"
    assert list(tmp_path.iterdir()) == [path]


def test_no_space_for_a_table_of_answers(tmp_path):
    """A memory-mapped file takes its space as it is filled, and a full disk ends the process."""
    table, pairs = view_files.TableFiles(tmp_path, {"a": 1}), (np.arange(9),) * 2
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch.object(os, "posix_fallocate", side_effect=full),
        pytest.raises(UserError, match=r"npy cannot be written: No space left"),
    ):
        table.build(2, pairs, lambda *rows: np.stack(rows, axis=1), 4)
    assert not list(tmp_path.iterdir())
    unsupported = OSError(errno.EOPNOTSUPP, "Operation not supported")
    with mock.patch.object(os, "posix_fallocate", side_effect=unsupported):
        built = table.build(2, pairs, lambda *rows: np.stack(rows, axis=1), 4)
    assert (built == np.stack(pairs, axis=1)).all()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_to(code, squares, tmp_path):
    refused = OSError(code, os.strerror(code))
    words = f"cannot write to the work directory .*{os.strerror(code)}"
    with (
        mock.patch("pathlib.Path.mkdir", side_effect=refused),
        pytest.raises(UserError, match=words),
    ):
        train.run(labels_only(epochs=1), tmp_path / "student", squares)
    assert not list(tmp_path.iterdir())


def test_a_folder_below_a_file(squares, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write to the work directory .*file/student"):
        train.run(labels_only(epochs=1), tmp_path / "file" / "student", squares)
    assert (tmp_path / "file").read_text() == "mine"


# The clock


def test_a_clock_that_is_set_back(undisturbed, squares, tmp_path):
    backwards = itertools.count(1_000_000_000, -60)
    with mock.patch("time.time", side_effect=lambda: next(backwards)):
        train.run(labels_only(epochs=1), tmp_path / "student", squares)
    assert contents(tmp_path / "student") == contents(undisturbed)


# Numbers that are NaN

SAMPLE = 7  # of the training set, with which the poison comes in the second epoch


def poisoned(batch):
    return (batch.index == SAMPLE) & (batch.mask > 0) & (batch.epoch == 1)


class BadLoss(Term):
    """A loss that is NaN for one sample in the second epoch."""

    def __call__(self, student, teacher, batch):
        return jnp.where(poisoned(batch), jnp.nan, 0.0) * student.logits[:, 0]


class BadGradient(Term):
    """A loss of 0 that has the gradient 0 / 0 for the same sample."""

    def __call__(self, student, teacher, batch):
        return jnp.sqrt(jnp.where(poisoned(batch), 0 * student.logits[:, 0], 1.0)) * 0.0


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (BadLoss, r"the loss was not finite at step (\d) \(epoch 2\) of stage 'main': bad\. "),
        (BadGradient, r"after step (\d) \(epoch 2\) of stage 'main', \d+ arrays .* not finite"),
    ],
)
def test_a_step_that_gives_nan(term, words, squares, tmp_path):
    with mock.patch.dict(losses.TERMS, {"bad": term}):
        config = labels_only(epochs=2, loss__bad=1.0, checkpoint__every_seconds=0.0)
        config.checkpoint.keep = 9
        with pytest.raises(UserError) as error:
            train.run(config, tmp_path, squares)
    step = int(re.search(words, str(error.value))[1])
    assert 4 <= step <= 6 and f"Last good checkpoint: step {step - 1}" in str(error.value)
    saved = [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")]
    assert sorted(map(int, saved)) == list(range(1, step))
    template = network_shapes(models.create("tiny_net", 2), (8, 8, 1))
    assert not not_finite(load_network(tmp_path, "last", template)[0])
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2  # of the first epoch
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("setting", ["teacher__pretrained", "model__pretrained"])
def test_weights_that_are_nan(setting, squares, tmp_path):
    template = network_shapes(models.create("tiny_net", 2), (8, 8, 1))
    tensors = to_torch(jax.tree.map(lambda x: np.ones(x.shape, np.float32), template))
    tensors["conv1.weight"][0, 0, 0, 0] = np.nan
    files.save(tmp_path / "bad.safetensors", tensors)
    config = settings(**{setting: str(tmp_path / "bad.safetensors")})
    with pytest.raises(UserError, match=r"bad\.safetensors has weights that are NaN.* conv1\.w"):
        train.run(config, tmp_path / "student", squares)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]

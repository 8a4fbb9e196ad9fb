"""What a run does with its folder and its teacher's when these are not as it expects them."""

import dataclasses
import errno
import fcntl
import gc
import json
import shutil
import signal
import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import ROOT, module_of, settings, squares, stopped_after, teacher_folder

from ipwd_jax import plan, report, train, workdir
from ipwd_jax import teacher as teacher_lib
from ipwd_jax.errors import Interrupted, InUse, UserError
from ipwd_jax.recorder import Recorder
from ipwd_jax.runs import load_student


def config(**changes):
    short = {"epochs": 1, "optimizer__milestones": (), "teacher__optimizer__milestones": ()}
    return settings(**{"teacher__view_cache": "off", **short, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder with a finished student, `run`, and its teacher."""
    folder = tmp_path_factory.mktemp("finished")
    train.run(config(), folder / "run", squares())
    train.run(config(teacher__view_cache="all"), folder / "cached", squares())
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy that a test can change."""
    return shutil.copytree(finished, tmp_path / "runs")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_extension_that_is_refused_changes_nothing(folder, monkeypatch):
    """Its teacher, which is loaded after the first checks, turns out to be another."""
    load = teacher_lib.load
    other = lambda *given: dataclasses.replace(load(*given), checksum="0" * 8)  # noqa: E731
    monkeypatch.setattr(teacher_lib, "load", other)
    before = contents(folder / "run")
    with pytest.raises(UserError, match="checksum of the teacher"):
        train.run(config(epochs=2), folder / "run", squares(), extend=True)
    assert contents(folder / "run") == before


def test_an_extension_that_would_choose_another_best_epoch_is_refused(folder):
    """A longer run that evaluates every second epoch does not evaluate the first one."""
    noted = json.loads((folder / "run/config.json").read_text())
    noted["config"]["eval_every_epochs"] = 2
    (folder / "run/config.json").write_text(json.dumps(noted))
    longer = config(epochs=2, eval_every_epochs=2)
    with pytest.raises(UserError, match="has evaluated its last epoch, 1,"):
        train.run(longer, folder / "run", squares(), extend=True)
    (folder / "run/result.json").unlink()  # as if it were not finished
    next(train.planned(longer, folder / "run", squares(), extend=True))


def test_a_finished_student_needs_no_teacher(folder, capsys):
    shutil.rmtree(teacher_folder(folder, "tiny_net"))
    result = train.run(config(), folder / "run", squares())
    assert result == json.loads((folder / "run/result.json").read_text())
    assert train.run(config(), folder / "run", squares(), extend=True) == result
    assert "Training" not in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["cached", "run"]


def test_a_finished_seed_keeps_its_teacher_for_the_others(folder):
    """A teacher that is trained again for the others need not have the same bits."""
    (folder / "run").rename(folder / "run_seed0")
    teacher_folder(folder, "tiny_net").rename(folder.parent / "elsewhere")
    with pytest.raises(UserError, match="run_seed0 has begun with a teacher that is not in"):
        train.run(config(seeds=(0, 1)), folder / "run", squares())
    assert not list(folder.glob("*tiny_net*"))


def test_a_path_that_orbax_would_take_for_a_pattern(tmp_path):
    folder = tmp_path / "photos [2024]"
    for start in (train.run, lambda *given: next(train.planned(*given))):
        with pytest.raises(UserError, match=r"could not be read again, .* character '\['"):
            start(config(), folder / "run", squares())
    assert not list(folder.iterdir())
    given = teacher_lib.find_workdir(config(), tmp_path / "run", folder.name, {"data": "0"})
    assert given.name.startswith("photos -2024]_tiny_net_")
    own = module_of(ROOT / "configs/own_data.py").get_config(str(folder))
    assert own.name == "photos -2024]_ipwd_resnet32x4_resnet8x4"


def test_the_network_of_an_unfinished_run(folder, capsys):
    unfinished = folder / "unfinished"
    with stopped_after(1):
        train.run(config(checkpoint__every_seconds=0.0, steps_per_call=1), unfinished, squares())
    with pytest.raises(UserError, match="is not finished and has no best epoch yet"):
        load_student(unfinished, "best")
    load_student(unfinished)
    assert "is not finished: its network after 0 whole epochs is taken" in capsys.readouterr().err
    scores = train.evaluate_run(config(), unfinished, squares())
    assert scores["last"]["top1"] >= 0 and "best" not in scores
    assert "top1" in report.summary(scores)
    with pytest.raises(UserError, match=r"the run in .*unfinished is not finished"):
        train.run(config(model__pretrained=str(unfinished)), folder / "student", squares())


def test_a_student_is_not_its_own_teacher(folder):
    own = config(teacher__workdir=str(folder / "run/../run"))
    for start in (train.run, lambda *given: next(train.planned(*given))):
        with pytest.raises(UserError, match="would hold both student and teacher"):
            start(own, folder / "run", squares())


def test_a_named_teacher_is_not_locked_and_need_not_be_writable(folder, monkeypatch, capsys):
    teacher = teacher_folder(folder, "tiny_net")
    for kept in teacher.glob("*.npz"):
        kept.unlink()
    lock, before = workdir._lock, contents(teacher)

    def refuse(path, wait):
        assert path != teacher
        return lock(path, wait)

    def full(path, content):
        if teacher in path.parents:
            raise UserError(f"{path} cannot be written: Read-only file system.")
        return write(path, content)

    write = teacher_lib.kept.writers.write_atomically
    monkeypatch.setattr(workdir, "_lock", refuse)
    monkeypatch.setattr(teacher_lib.kept.writers, "write_atomically", full)
    touch = type(teacher).touch

    def refuse_touch(path, *given, **named):
        if teacher in path.parents:
            raise PermissionError(path)
        touch(path, *given, **named)

    monkeypatch.setattr(type(teacher), "touch", refuse_touch)
    named = config(teacher__workdir=str(teacher), seed=1, teacher__view_cache="auto")
    train.run(named, folder / "other", squares())
    assert "Read-only file system. Until then, it is computed anew." in capsys.readouterr().err
    assert contents(teacher) == before


def test_scores_are_shown_even_if_they_cannot_be_written(folder, monkeypatch, capsys):
    def full(path, content):
        raise UserError(f"{path} cannot be written")

    monkeypatch.setattr(teacher_lib.kept.writers, "write_atomically", full)
    scores = train.evaluate_run(config(), folder / "run", squares())
    assert scores["last"]["top1"] > 0
    assert "warning: " in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_results_are_written_stops_what_follows(number, tmp_path, monkeypatch):
    """The teacher's results are written, and its student is not begun."""
    finish = Recorder.finish

    def interrupted(self):
        signal.raise_signal(number)
        return finish(self)

    monkeypatch.setattr(Recorder, "finish", interrupted)
    with pytest.raises(Interrupted) as stop:
        train.run(config(), tmp_path / "run", squares())
    assert stop.value.signum == number
    assert (teacher_folder(tmp_path, "tiny_net") / "result.json").exists()
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_checkpoints_that_are_there_count_as_free(tmp_path, monkeypatch):
    alone = config(teacher__name="", loss__kd=0.0, checkpoint__every_seconds=0.0)
    alone.loss.cls, alone.weighting.name = 0.0, "uniform"
    needed = plan.disk(train._checked(alone, squares()))
    monkeypatch.setattr(
        workdir.shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1)
    )
    with pytest.raises(UserError, match="the checkpoints of this run need"):
        train.run(alone, tmp_path / "run", squares())
    with monkeypatch.context() as patch, stopped_after(2):
        patch.setattr(workdir, "check_space", lambda *_: None)
        train.run(alone, tmp_path / "run", squares())
    train.run(alone, tmp_path / "run", squares())


def test_the_space_for_checkpoints_is_that_of_their_arrays():
    """Momentum and the terms' memories are saved once, and parameters as `last` and `best` too."""

    def planned(**changes):
        of_run = config(**changes)
        of_run.terms.crd.update({"feat_dim": 4, "negatives": 6})
        return plan.disk(train._checked(of_run, squares()))

    state = train._checked(config(), squares()).initial_state(seed=0)
    size = 4 * sum(x.size for x in jax.tree.leaves(state.params))
    assert planned(optimizer__name="adamw") - planned() == pytest.approx(3 * size, abs=100)
    assert planned(checkpoint__keep=3) == pytest.approx(planned() * 4 / 3, abs=3)
    with_memory = planned(loss__crd=0.1) - planned()
    embeddings = 4 * 2 * (4 * 6 + 4)  # of the student and the teacher, with their biases
    assert with_memory == pytest.approx(3 * (2 * embeddings + 4 * 2 * 40 * 4), abs=100)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    for wait in (False, True):
        with (
            pytest.raises(UserError, match=r"cannot be locked .*another file system") as error,
            workdir.locked(tmp_path, wait),
        ):
            pass
        assert not isinstance(error.value, InUse)


@pytest.mark.parametrize(
    ("name", "seeds", "words"),
    [
        (".", (0, 1), "has no name"),
        ("..", (0, 1), "has no name"),
        ("x" * 300, (), "File name too long"),
    ],
)
def test_names_that_no_folder_can_have(name, seeds, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        train.run(config(seeds=seeds), name, squares())
    assert not list(tmp_path.iterdir())


def test_a_student_without_the_teacher_that_it_began_with_is_refused(folder, capsys):
    """Before the teacher is trained again, which could give other bits."""
    longer = config(epochs=2, seed=3)
    with stopped_after(1):
        train.run(longer, folder / "begun", squares())
    teacher = teacher_folder(folder, "tiny_net")
    (folder / "moved").mkdir()
    teacher.rename(folder / "moved/teacher")
    capsys.readouterr()
    for start in (train.run, lambda *given: next(train.planned(*given))):
        with pytest.raises(UserError, match="has begun with a teacher that is not in"):
            start(longer, folder / "begun", squares())
    assert not teacher.exists() and "Teacher tiny_net" not in capsys.readouterr().out
    longer.teacher.workdir = str(folder / "moved/teacher")
    train.run(longer, folder / "begun", squares())


def test_a_finished_student_needs_no_checkpoint_of_its_teacher(folder):
    shutil.rmtree(teacher_folder(folder, "tiny_net") / "checkpoints")
    assert train.run(config(), folder / "run", squares())["last"]


def test_the_teacher_is_found_from_within_the_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder / "run")
    (folder / "run/result.json").unlink()
    train.run(config(), ".", squares())
    assert "Teacher tiny_net" not in capsys.readouterr().out


def test_numbers_of_numpy_are_recorded_as_numbers(folder):
    odd = config(teacher__workdir=str(teacher_folder(folder, "tiny_net")))
    odd.optimizer.milestones = tuple(np.array([1, 2]))
    odd.optimizer.learning_rate = np.float64(0.05)
    train.run(odd, folder / "numpy", squares())
    there = json.loads((folder / "numpy/config.json").read_text())["config"]["optimizer"]
    assert there["milestones"] == [1, 2]
    plain = config(optimizer__milestones=(1, 2), teacher__workdir=odd.teacher.workdir)
    assert train.run(plain, folder / "numpy", squares())["last"]


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher__view_cache": "off"},
        {"teacher__view_cache": "drawn"},
        {"teacher__fold": True},
        {"loss__kd": 0.0, "loss__crld": 1.0, "weighting__terms": ("crld",)},
    ],
)
def test_nothing_of_a_run_stays_in_memory(changes, folder):
    dataset = squares()
    images = weakref.ref(dataset.train.images)
    train.run(
        config(**{"seed": 5, "teacher__view_cache": "all", **changes}), folder / "other", dataset
    )
    del dataset
    gc.collect()
    assert images() is None


@pytest.mark.parametrize("start", [train.run, train.evaluate_run])
def test_what_is_no_config_or_no_data_set(start, tmp_path):
    with pytest.raises(UserError, match=r"must be one that load_config returns; found 'a.py'"):
        start("a.py", tmp_path / "run")
    with pytest.raises(UserError, match=r"must be a Dataset, .*; found ndarray"):
        start(config(), tmp_path / "run", np.zeros((2, 8, 8, 1)))


def test_a_reader_that_has_left_is_no_failure(tmp_path):
    with pytest.raises(BrokenPipeError), workdir.failures_noted([tmp_path]):
        raise BrokenPipeError
    assert not workdir.failure(tmp_path)

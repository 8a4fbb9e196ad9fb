"""The cache of the teacher's answers does not change the training, and bad files are not used."""

import dataclasses
import json
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import settings, teacher_folder

from ipwd_jax import teacher as teacher_lib
from ipwd_jax import train, view_cache, view_files
from ipwd_jax.assemble import assemble
from ipwd_jax.data import augment
from ipwd_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def run(name, squares, folder, **changes):
    """Train a run and return its logits on the test set."""
    train.run(settings(**changes), folder / name, squares)
    return np.load(folder / name / "predictions.npz")["last_logits"]


@pytest.fixture(scope="module")
def online(squares, folder):
    return run("online", squares, folder, teacher__view_cache="off")


def test_same_training(online, squares, folder):
    """The results are bitwise equal whichever views are cached, and close if the step asks.

    A compiled program can add the numbers of a batch of another shape in another order, which
    depends on the processor.
    """
    every = run("all", squares, folder, teacher__view_cache="all")
    drawn = run("drawn", squares, folder, teacher__view_cache="drawn")
    np.testing.assert_array_equal(drawn, every)
    np.testing.assert_allclose(every, online, rtol=0, atol=2e-6)


def views(folder):
    return teacher_folder(folder, "tiny_net") / "views"


def test_only_drawn_views_are_asked_for(online, squares, folder):
    run("few", squares, folder, teacher__view_cache="drawn")
    config = settings()
    used = view_cache.drawn_views(config, (0,), 2, 40)
    assert used.shape == (40, 18) and used.sum(axis=1).max() <= 2
    tables = [np.load(path) for path in views(folder).glob("*.npy")]
    assert any(len(table) == used.sum() for table in tables)


def test_a_cache_is_built_by_itself_only_where_the_run_asks_for_more(
    online, squares, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(view_cache, "_LONG_SECONDS", 0.0)

    def built(**changes):
        config = settings(teacher__view_cache="auto", **changes)
        teacher = teacher_lib.load(config, teacher_folder(folder, "tiny_net"), squares)
        teacher = dataclasses.replace(teacher, workdir=tmp_path)  # where no answers are kept yet
        cache = view_cache.load_or_build(assemble(config, squares, teacher), required=False)
        return cache is not None, capsys.readouterr().out

    few, said = built(seed=5)
    assert not few and "and the run asks for 80. For several students" in said
    some, said = built(seed=5, epochs=19)  # not all of the 18 views that there are
    assert some and 400 < int(re.search(r"Computing (\d+) answers", said)[1]) < 560
    many, said = built(seed=5, seeds=(5, 6), epochs=12)  # 24 views are drawn of 18 that there are
    assert many and "Computing 720 answers of the teacher takes about 0:00" in said
    assert "need not ask for 960 answers" in said
    there, said = built(seed=7)
    assert there and "Reading the teacher's answers from" in said


def sums(index, view):
    """Answer in place of a teacher."""
    return np.stack([index, view, index + view], axis=1).astype(np.float32)


PAIRS = np.divmod(np.arange(100, dtype=np.int32), 10)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "header", "note", "foreign", "missing"])
def test_a_file_that_is_not_right_is_not_used(damage, tmp_path, capsys):
    files = view_files.TableFiles(tmp_path, {"teacher": "a"})
    files.build(3, PAIRS, sums, 30)
    assert files.complete() and (files.load() == sums(*PAIRS)).all()
    if damage == "truncated":
        files.table.write_bytes(files.table.read_bytes()[:-8])
    elif damage == "flipped":
        table = np.load(files.table, mmap_mode="r+")
        table[3, 0] += 1
        table.flush()
    elif damage == "header":
        files.table.write_bytes(b"?" * 20 + files.table.read_bytes()[20:])
    elif damage == "note":
        files.note.write_text("{")
    elif damage == "foreign":
        said = json.loads(files.note.read_text())
        files.note.write_text(json.dumps({**said, "identity": {"teacher": "b"}}))
    else:
        files.table.unlink()
    assert not files.complete() or files.load() is None
    files.build(3, PAIRS, sums, 30)
    assert files.complete() and (files.load() == sums(*PAIRS)).all()


def test_a_table_can_be_removed_while_it_is_read(tmp_path, monkeypatch):
    files = view_files.TableFiles(tmp_path, {"teacher": "a"})
    files.build(3, PAIRS, sums, 30)
    checksum = view_files._checksum

    def removed_meanwhile(table):
        files.note.unlink()
        files.table.unlink()
        return checksum(table)

    monkeypatch.setattr(view_files, "_checksum", removed_meanwhile)
    assert (files.load() == sums(*PAIRS)).all()
    assert files.load() is None


def test_a_table_whose_note_is_damaged_is_built_again(squares, folder, capsys):
    changes = {"teacher__view_cache": "drawn", "epochs": 1, "seed": 8}
    run("undamaged", squares, folder, **changes)
    note = max(views(folder).glob("*.json"), key=lambda path: path.stat().st_mtime)
    note.write_text("{")
    capsys.readouterr()
    run("damaged", squares, folder, **changes)
    assert "Teacher's answers to 40 views computed" in capsys.readouterr().out
    assert json.loads(note.read_text())["identity"]["views"] == {"seeds": [8], "epochs": 1}


@pytest.mark.slow
def test_the_file_is_reused(online, squares, folder, capsys):
    changes = {"teacher__view_cache": "all", "epochs": 1}
    run("first", squares, folder, **changes)
    capsys.readouterr()
    run("second", squares, folder, seed=1, **changes)
    assert "Reading the teacher's answers from" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_table_is_finished(damaged, tmp_path):
    asked = []

    def asker(index, view):
        asked.append(len(index))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return sums(index, view)

    files = view_files.TableFiles(tmp_path, {"a": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_files, "_FLUSH_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            files.build(3, PAIRS, asker, 30)
        assert not files.complete()
        if damaged:
            (unfinished,) = tmp_path.glob(".*.npy")
            unfinished.write_bytes(unfinished.read_bytes()[:-8])
        table = files.build(3, PAIRS, asker, 30)
    assert asked == [30, 30, 30] + (3 * [30] if damaged else [30]) + [10]
    np.testing.assert_array_equal(table, sums(*PAIRS))
    assert files.complete()
    assert not view_files.TableFiles(tmp_path, {"a": 2}).complete()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss__at": 1.0}, r"reads the teacher's maps \(features\)"),
        ({"loss__cat_kd": 1.0}, r"reads the teacher's maps \(pre_pool\)"),
        (
            {"loss__sskd": 1.0, "first_stage__epochs": 1, "first_stage__loss__sskd": 1.0},
            "rotates the images",
        ),
        ({"teacher__train_mode": True}, "depends on the batch"),
    ],
)
def test_refused_where_it_would_be_wrong(changes, reason, squares, tmp_path):
    with pytest.raises(UserError, match=reason):
        train.run(settings(teacher__view_cache="all", **changes), tmp_path / "run", squares)
    assert not [*tmp_path.iterdir()]  # not even the teacher was trained


def test_a_seed_that_is_added_is_asked_about_alone(squares, folder, capsys):
    def seeds(*numbers):
        config = settings(seeds=numbers, teacher__view_cache="drawn", epochs=1)
        config.optimizer.milestones = ()
        train.run(config, folder / "added", squares)
        return capsys.readouterr().out

    seeds(0)
    found = seeds(0, 1)
    assert "Finished already" in found and "answers to 40 views" in found
    shutil.rmtree(folder / "added_seed1")
    assert "Reading" in seeds(0, 1)


class TestFiles:
    """Tables in a folder of its own; each of ten answers has two numbers, and so 80 bytes."""

    @staticmethod
    def build(files, stop=False):
        def ask(index, view):
            if stop and index[0]:
                raise KeyboardInterrupt
            return np.stack([index, view], axis=1).astype(np.float32)

        files.make_room()
        pairs = np.divmod(np.arange(10, dtype=np.int32), 5)
        return files.build(2, pairs, ask, 5)

    @staticmethod
    def table(folder, seed):
        return view_files.TableFiles(folder, {"views": {"seeds": [seed], "epochs": 1}})

    def test_what_a_table_replaces_counts_as_free(self, tmp_path, monkeypatch):
        for seed in range(2):
            self.build(self.table(tmp_path, seed))
            time.sleep(0.02)
        with pytest.raises(KeyboardInterrupt):
            self.build(self.table(tmp_path, 2), stop=True)
        free = SimpleNamespace(free=100)
        monkeypatch.setattr(view_files.shutil, "disk_usage", lambda folder: free)
        size = (tmp_path / self.table(tmp_path, 0).table).stat().st_size
        needed = int(0.9 * (100 + size))
        for seed in (2, 3):  # in place of its own beginning, and of the table of seed 0
            assert view_files.shortage(self.table(tmp_path, seed), needed, 0) == ""
        assert "it needs" in view_files.shortage(self.table(tmp_path, 2), needed + 2, 0)

    def test_unfinished_tables_are_removed_like_old_ones(self, tmp_path):
        for seed in range(3):
            with pytest.raises(KeyboardInterrupt):
                self.build(self.table(tmp_path, seed), stop=True)
            time.sleep(0.02)
        self.build(self.table(tmp_path, 3))
        assert len([*tmp_path.glob(".*.npy")]) == 2


@pytest.mark.parametrize(
    ("all_views", "devices", "megabytes"), [(True, 1, 5), (False, 1, 18), (False, 5, 14)]
)
def test_memory_counts_the_copy_of_the_host_and_the_map(all_views, devices, megabytes, monkeypatch):
    """A table of five megabytes; the map to its rows has two million numbers."""
    monkeypatch.setattr(view_cache.parallel, "local_devices", lambda: [None] * devices)
    used = np.broadcast_to(np.bool_(all_views), (250_000, 8))
    assert view_cache._in_memory(5_000_000, used) == 1_000_000 * megabytes


def test_no_space(squares, folder, monkeypatch):
    monkeypatch.setattr(view_cache, "shortage", lambda *_, **__: "it has 9 MiB")
    with pytest.raises(UserError, match="does not fit: it has 9 MiB"):
        run("none", squares, folder, teacher__view_cache="all")


@pytest.mark.slow
@pytest.mark.parametrize("term", ["rkd", "srrl"])
def test_the_embedding_and_the_classifier_are_kept_when_a_term_reads_them(term, squares, folder):
    """The answers themselves are compared, because RKD multiplies differences by rounding."""
    changes = {"loss__kd": 0.0, f"loss__{term}": 1.0, "weighting__name": "uniform"}
    run(f"{term}_cached", squares, folder, teacher__view_cache="all", **changes)
    config = settings(teacher__view_cache="all", **changes)
    teacher = teacher_lib.load(config, teacher_folder(folder, "tiny_net"), squares)
    cache = view_cache.load_or_build(assemble(config, squares, teacher), required=True)
    index = np.arange(40, dtype=np.int32)
    view = index % 18
    images = augment.apply_views(squares.train.images, view, 1, True)
    asked = teacher.ask(teacher.inputs, augment.normalize(images, squares.mean, squares.std))
    found = view_cache.answer(cache, None, SimpleNamespace(index=index, view=view))
    np.testing.assert_allclose(found.embedding, asked.embedding, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.logits, asked.logits, rtol=0, atol=2e-6)
    assert (found.classifier is None) == (term == "rkd")
    for kept, own in zip(found.classifier or (), asked.classifier, strict=False):
        np.testing.assert_array_equal(kept, own)

"""Options of a run beyond the recipes: optimisers, pretrained weights, early stopping, more epochs.

All of them go through `train.run` or the command line, with tiny networks.
"""

import itertools
import json
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from helpers import rows, settings, squares, stopped_after, teacher_folder

from ipwd_jax import data, plan, train, workdir
from ipwd_jax.checkpoint import load_network, newest, saved_arrays
from ipwd_jax.config import default
from ipwd_jax.data import memory
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch import export_file

ALONE = {"loss__ce": 1.0, "loss__kd": 0.0, "loss__cls": 0.0, "weighting__name": "uniform"}
ALONE |= {"teacher__name": "", "optimizer__milestones": ()}


def variables(workdir, which="last"):
    template = saved_arrays(newest(workdir) / which)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(template))
    return load_network(workdir, which, template)[0]


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, variables(a), variables(b))
    jax.tree.map(np.testing.assert_array_equal, variables(a, "best"), variables(b, "best"))


def three_classes():
    """Return `squares` with three labels."""
    two = squares()
    labels = np.arange(60) % 3
    train_images, test_images = two.train.images, two.test.images
    return data.from_arrays(train_images, labels[:40], test_images, labels[40:], name="three")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two epochs, and the rows that its callback was given."""
    workdir, seen = tmp_path_factory.mktemp("runs") / "two", []
    train.run(settings(**ALONE), workdir, squares(), on_epoch=seen.append)
    return workdir, seen


def test_callback_sees_every_epoch(finished):
    workdir, seen = finished
    assert [(row["seed"], row["epoch"]) for row in seen] == [(0, 1), (0, 2)]
    for row, written in zip(seen, rows(workdir), strict=True):
        assert row["test_top1"] == float(written["test_top1"])


def test_adamw_trains_and_resumes_bitwise(tmp_path, finished):
    config = settings(**ALONE, optimizer__name="adamw", optimizer__learning_rate=1e-3)
    train.run(config, tmp_path / "whole", squares())
    with stopped_after(saves=1):
        config.checkpoint.every_seconds = 0.0
        train.run(config, tmp_path / "stopped", squares())
    train.run(config, tmp_path / "stopped", squares())
    assert_equal(tmp_path / "whole", tmp_path / "stopped")
    sgd, adamw = rows(finished[0])[-1], rows(tmp_path / "whole")[-1]
    assert sgd["train_loss"] != adamw["train_loss"]


class TestPretrained:
    def test_starts_with_the_weights_of_a_run(self, finished, tmp_path):
        """With a negligible learning rate, the parameters stay what they were."""
        workdir, _ = finished
        path = tmp_path / "student.safetensors"
        export_file(workdir, path)
        for number, source in enumerate((workdir, path)):
            config = settings(**ALONE, model__pretrained=str(source), epochs=1)
            config.optimizer.learning_rate = 1e-30
            train.run(config, tmp_path / str(number), squares())
            before, after = variables(workdir), variables(tmp_path / str(number))
            jax.tree.map(np.testing.assert_array_equal, before["params"], after["params"])

    def test_its_teacher_is_that_of_other_students(self, finished, tmp_path):
        for name, source in (("drawn", ""), ("pretrained", str(finished[0]))):
            train.run(settings(model__pretrained=source, epochs=1), tmp_path / name, squares())
        assert teacher_folder(tmp_path, "tiny_net").is_dir()  # the only one

    def test_another_number_of_classes_draws_a_new_classifier(self, finished, tmp_path, capsys):
        config = settings(**ALONE, model__pretrained=str(finished[0]), epochs=1)
        config.optimizer.learning_rate = 1e-30
        train.run(config, tmp_path, three_classes())
        assert "its classifier is not used" in capsys.readouterr().out
        before, after = variables(finished[0])["params"], variables(tmp_path)["params"]
        assert after["fc"]["kernel"].shape == (6, 3)
        assert np.array_equal(before["conv1"]["kernel"], after["conv1"]["kernel"])

    def test_resumes_only_with_the_same_weights(self, finished, tmp_path):
        config = settings(**ALONE, model__pretrained=str(finished[0]))
        train.run(config, tmp_path, squares())
        (tmp_path / "result.json").unlink()
        noted = json.loads((tmp_path / "config.json").read_text())
        noted["checksums"]["pretrained"] = "00000000"
        (tmp_path / "config.json").write_text(json.dumps(noted))
        with pytest.raises(UserError, match="checksum of the pretrained: '00000000' there"):
            train.run(config, tmp_path, squares())

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"model__pretrained": "nowhere"}, "nowhere"),
            ({"model__name": "resnet8"}, "bn1/bias has the shape \\(6,\\), but resnet8 needs"),
        ],
    )
    def test_refusals(self, finished, tmp_path, changes, words):
        config = settings(**{**ALONE, "model__pretrained": str(finished[0]), **changes})
        with pytest.raises(UserError, match=words):
            train.run(config, tmp_path / "new", squares())
        assert not (tmp_path / "new").exists()


class TestPatience:
    def test_stops_after_epochs_without_a_better_one(self, tmp_path, capsys):
        """A learning rate that moves nothing makes the first epoch the best."""
        config = settings(**ALONE, epochs=9, patience=2)
        config.optimizer.learning_rate = 1e-30
        result = train.run(config, tmp_path, squares())
        history = [float(row["test_top1"]) for row in rows(tmp_path)]
        best = 1 + history.index(max(history))
        assert result["best"]["epoch"] == best
        assert result["last"]["epoch"] == len(history) == best + 2 < 9
        assert f"no better epoch than {best} in the last 2" in capsys.readouterr().out
        (tmp_path / "result.json").unlink()  # as if it had been killed before it was written
        assert train.run(config, tmp_path, squares())["last"]["epoch"] == best + 2

    @pytest.mark.parametrize(("patience", "every", "ended"), [(2, 4, 8), (3, 2, 6)])
    def test_is_decided_after_epochs_that_were_evaluated(self, patience, every, ended, tmp_path):
        changes = {"epochs": 9, "patience": patience, "eval_every_epochs": every}
        config = settings(**ALONE, **changes)
        config.optimizer.learning_rate = 1e-30
        result = train.run(config, tmp_path, squares())
        assert result["best"]["epoch"] == every and result["last"]["epoch"] == ended

    def test_several_seeds_are_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"config\.patience would stop each of config\.seeds"):
            train.run(settings(**ALONE, patience=2, seeds=(0, 1)), tmp_path, squares())


class TestExtend:
    def test_equals_a_longer_run(self, finished, tmp_path):
        train.run(settings(**ALONE), tmp_path / "run", squares())
        before = json.loads((tmp_path / "run" / "result.json").read_text())
        longer = settings(**ALONE, epochs=4)
        for start in (train.run, lambda *given: next(train.planned(*given))):
            with pytest.raises(UserError, match=r"config\.epochs: 2 there, 4 here(.|\n)*--extend"):
                start(longer, tmp_path / "run", squares())
        assert "4 epochs" in next(train.planned(longer, tmp_path / "run", squares(), extend=True))
        train.run(longer, tmp_path / "run", squares(), extend=True)
        train.run(longer, tmp_path / "whole", squares())
        assert_equal(tmp_path / "run", tmp_path / "whole")
        assert [r["epoch"] for r in rows(tmp_path / "run")] == ["1", "2", "3", "4"]
        kept = json.loads((tmp_path / "run" / "result_2epochs.json").read_text())
        assert kept == before
        assert (tmp_path / "run" / "predictions_2epochs.npz").exists()
        # The same command again finds it finished, with and without the flag.
        again = train.run(longer, tmp_path / "run", squares(), extend=True)
        assert again == json.loads((tmp_path / "run" / "result.json").read_text())

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"optimizer__schedule": "cosine"}, "schedule=cosine depends on the number of epochs"),
            ({"batch_size": 8}, "config.batch_size: 16 there, 8 here"),
            ({"epochs": 1}, "config.epochs: 2 there, 1 here"),
        ],
    )
    def test_refusals(self, finished, changes, words):
        config = settings(**{**ALONE, "epochs": 3, **changes})
        with pytest.raises(UserError, match=words):
            train.run(config, finished[0], squares(), extend=True)
        assert (finished[0] / "result.json").exists()

    def test_command(self, tmp_path):
        images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), np.uint8)
        np.savez(tmp_path / "data.npz", train_images=images, train_labels=np.arange(30) % 2)
        config = default()
        config.update({"name": "short", "epochs": 1, "batch_size": 16})
        config.data.update({"name": f"numpy:{tmp_path / 'data.npz'}", "crop_padding": 0})
        config.model.name, config.optimizer.milestones = "resnet8", ()
        train.run(config, tmp_path / "run")
        file = tmp_path / "config.py"
        file.write_text(
            "from ml_collections import ConfigDict\n\n\n"
            f"def get_config():\n    return ConfigDict({config.to_dict()!r})\n"
        )
        command = [sys.executable, "-m", "ipwd_jax.main", f"--config={file}", "--extend"]
        command += [f"--workdir={tmp_path / 'run'}", "--config.epochs=2"]
        subprocess.run(command, check=True, capture_output=True)
        assert [row["epoch"] for row in rows(tmp_path / "run")] == ["1", "2"]


@pytest.mark.parametrize("there", [True, False])
def test_plan_names_a_gpu_that_jax_cannot_use(there, tmp_path, monkeypatch):
    driver = tmp_path / "driver"
    monkeypatch.setattr(plan, "_NVIDIA", driver)
    if there:
        driver.touch()
    words = "cannot use the NVIDIA GPU of this machine: pip install -U 'jax[cuda12]'"
    plan_of_run = next(train.planned(settings(**ALONE), tmp_path / "run", squares()))
    assert (words in plan_of_run) == there


@pytest.mark.parametrize("term", ["kd", "wkd_l", ""])
def test_plan_estimates_the_time_and_writes_nothing(term, tmp_path, monkeypatch):
    """If a step takes a second, the student takes as many as it has steps, and so the teacher."""
    clock = itertools.count()
    monkeypatch.setattr(plan, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    config = settings() if term else settings(**ALONE)
    if term:
        config.loss.update({"kd": 0.0, term: 1.0})
        config.weighting.terms = (term,)
    *_, needs = train.planned(config, tmp_path / "run", squares())
    teacher = "0:03 for the epochs of the teacher, " if term else ""
    assert needs.startswith(f"time     about {teacher}0:06 for those of the student")
    assert re.fullmatch(
        r"memory   \d+ MiB on each device, without cached answers", needs.splitlines()[-1]
    )
    assert not list(tmp_path.iterdir())


def test_a_step_that_does_not_fit_into_the_memory_is_refused(tmp_path, monkeypatch):
    """Also by a run that resumes, whose checkpoints stay, and by the plan."""
    config, folder = settings(checkpoint__every_seconds=0.0, **ALONE), tmp_path / "run"
    with stopped_after(1):
        train.run(config, folder, squares())
    saved = newest(folder)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available", lambda: 1000)
        words = "a training step needs .* GiB of memory .* 0.00 GiB are available"
        for start in (train.run, lambda *args: list(train.planned(*args))):
            with pytest.raises(UserError, match=words):
                start(config, folder, squares())
    assert newest(folder) == saved
    assert train.run(config, folder, squares())["last"]["epoch"] == config.epochs


def test_identity_tells_all_settings_apart():
    """Settings that have their defaults are left out, but not that a term is switched off."""
    configs = [
        settings(),
        settings(loss__ce=1.0),
        settings(loss__ce=0.0),
        settings(weighting__name="uniform"),
        settings(optimizer__name="adamw"),
        settings(optimizer__name="adamw", optimizer__b2=0.95),
        settings(terms__kd__temperature=2.0),
        settings(first_stage__epochs=1, first_stage__loss__ft=1.0),
        settings(first_stage__epochs=1, first_stage__loss__ce=1.0),
    ]
    assert len({workdir.identity(config, {}) for config in configs}) == len(configs)
    assert workdir.identity(settings(seed=3, name="other"), {}) == workdir.identity(settings(), {})

"""A whole run on a small data set learns, writes its files, and reuses its teacher."""

import csv
import dataclasses
import json
import math
import time

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import teacher_folder
from scipy.stats import spearmanr
from tensorboardX.proto.event_pb2 import Event

from ipwd_jax import config as config_lib
from ipwd_jax import data, losses, models, parallel, train
from ipwd_jax.checkpoint import load_network
from ipwd_jax.data.resident import resident
from ipwd_jax.errors import UserError
from ipwd_jax.evaluate import make_predict, predict_all
from ipwd_jax.metrics import evaluate, weight_summary
from ipwd_jax.models.base import Conv, Linear, Outputs, relu
from ipwd_jax.models.heads import Heads
from ipwd_jax.parallel import replicate
from ipwd_jax.recorder import Recorder
from ipwd_jax.runs import load_run
from ipwd_jax.state import init_state, network_shapes


@pytest.fixture(scope="module")
def dataset():
    """Return 200 images in four classes, which differ in the position of a bright square."""
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    images = rng.integers(0, 80, (200, 8, 8, 1), np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[row + 1 : row + 3, column + 1 : column + 3] += 150
    return data.from_arrays(images, labels, name="squares")


def settings(**changes):
    config = config_lib.default()
    config.name = "squares"
    config.data.update({"name": "squares", "crop_padding": 0, "flip": False})
    config.model.name = config.teacher.name = "resnet8"
    config.epochs, config.teacher.epochs = 3, 3
    config.batch_size = config.teacher.batch_size = 24
    for optimizer in (config.optimizer, config.teacher.optimizer):
        optimizer.milestones = (2,)
    config.loss.update({"ce": 0.1, "kd": 0.9, "cls": 1.0})
    config.weighting.name = "ipwd"
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def done(dataset, tmp_path_factory):
    """Return the work directory and the result of one IPWD run."""
    workdir = tmp_path_factory.mktemp("runs") / "student"
    return workdir, train.run(settings(), workdir, dataset)


def rows(workdir):
    with (workdir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def variables(workdir, which="last"):
    template = network_shapes(models.create("resnet8", 4), (8, 8, 1))
    return load_network(workdir, which, template)[0]


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


class TestResult:
    def test_it_learns(self, done):
        _, result = done
        assert result["last"]["top1"] > 60 and result["teacher"]["top1"] > 60

    def test_files(self, done):
        workdir, result = done
        assert json.loads((workdir / "result.json").read_text()) == json.loads(json.dumps(result))
        assert json.loads((workdir / "config.json").read_text())["config"]["epochs"] == 3
        assert "student/conv1/kernel" in (workdir / "parameters.txt").read_text()
        assert len(list((workdir / "checkpoints").iterdir())) <= 3

    def test_predictions_are_those_of_the_saved_networks(self, done, dataset):
        workdir, result = done
        predictions = np.load(workdir / "predictions.npz")
        predict = make_predict(models.create("resnet8", 4).apply)
        test = replicate(resident(dataset, dataset.test))
        for which in ("last", "best"):
            logits = predict_all(
                predict, variables(workdir, which), test, dataset.test, batch_size=7
            )
            np.testing.assert_allclose(predictions[f"{which}_logits"], logits, atol=1e-4)
            for name, value in evaluate(
                predictions[f"{which}_logits"], dataset.test.labels
            ).items():
                assert result[which][name] == pytest.approx(value), name

    def test_last_and_best_are_kept_apart(self, done):
        workdir, result = done
        scores = [float(row["test_top1"]) for row in rows(workdir)]
        assert result["last"]["epoch"] == 3
        assert result["last"]["top1"] == pytest.approx(scores[-1])
        assert result["best"]["top1"] == pytest.approx(max(scores))
        assert result["best"]["epoch"] == 1 + scores.index(max(scores)), "the first of equals"

    def test_rows_of_metrics(self, done):
        workdir, _ = done
        table = rows(workdir)
        assert [int(row["step"]) for row in table] == [7, 14, 21]  # 160 images in steps of 24
        assert [float(row["learning_rate"]) for row in table] == pytest.approx([0.05, 0.05, 0.005])
        for row in table:
            total = 0.1 * float(row["train_ce"]) + 0.9 * float(row["train_kd"])
            assert float(row["train_loss"]) == pytest.approx(
                total + float(row["train_cls"]), rel=1e-4
            )
        assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])

    def test_weights_are_logged(self, done):
        workdir, _ = done
        row = rows(workdir)[-1]
        names = [f"weight_{name}" for name in weight_summary(np.ones(3))]
        assert set(names) <= row.keys()
        assert (
            1 < float(row["weight_min"]) <= float(row["weight_decile5"]) <= float(row["weight_max"])
        )
        samples = np.load(workdir / "samples.npz")
        labels = range(len(samples["class_mass"]))
        weights = [samples["weight"][samples["label"] == label].mean() for label in labels]
        expected = spearmanr(weights, samples["class_mass"]).statistic
        assert float(row["mass_correlation_A"]) == pytest.approx(expected, abs=1e-3)
        assert -1 <= float(row["mass_correlation_B"]) <= 1
        hardness = spearmanr(samples["weight"], samples["teacher_nll"]).statistic
        assert float(row["hardness_correlation_A"]) == pytest.approx(hardness, abs=1e-3)
        assert {f"test_recall_group{i}" for i in range(1, 5)} <= row.keys()

    def test_what_is_known_of_each_class(self, done):
        workdir, _ = done
        with (workdir / "classes.csv").open() as file:
            table = list(csv.DictReader(file))
        predictions, samples = (
            np.load(workdir / "predictions.npz"),
            np.load(workdir / "samples.npz"),
        )
        assert [row["class"] for row in table] == load_run(workdir).data["class_names"]
        for label, row in enumerate(table):
            here = predictions["labels"] == label
            for name in ("last", "best", "teacher"):
                column = f"recall_{name}"
                right = predictions[f"{name}_logits"][here].argmax(axis=1) == label
                assert float(row[column]) == pytest.approx(100 * right.mean())
            mean = samples["weight"][samples["label"] == label].mean()
            assert float(row["weight_mean"]) == pytest.approx(mean, rel=1e-6)
            assert float(row["teacher_mass"]) == samples["class_mass"][label]

    def test_tensorboard_has_the_same_numbers(self, done):
        workdir, _ = done
        found = {}
        for file in (workdir / "tensorboard").iterdir():
            content = file.read_bytes()
            while content:  # length, its checksum, event, its checksum
                length = int.from_bytes(content[:8], "little")
                event = Event.FromString(content[12 : 12 + length])
                content = content[12 + length + 4 :]
                found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        for row in rows(workdir):
            for name in ("test_top1", "train_loss", "weight_mean"):
                assert found[name, int(row["step"])] == pytest.approx(float(row[name]), rel=1e-5)

    def test_the_same_command_again_does_nothing(self, done, dataset, capsys):
        workdir, result = done
        before = (workdir / "metrics.csv").stat().st_mtime_ns
        assert train.run(settings(), workdir, dataset) == json.loads(json.dumps(result))
        assert "Finished already" in capsys.readouterr().out
        assert (workdir / "metrics.csv").stat().st_mtime_ns == before

    def test_evaluation_of_the_checkpoint(self, done, dataset):
        workdir, result = done
        scores = train.evaluate_run(settings(), workdir, dataset)
        for which in ("last", "best"):
            assert scores[which]["epoch"] == result[which]["epoch"]
            assert scores[which]["nll"] == pytest.approx(result[which]["nll"], rel=1e-4)
        assert json.loads((workdir / "eval.json").read_text())["last"]["top1"] > 60

    def test_evaluation_on_other_data_normalises_as_in_training(self, done, dataset):
        """The test images of a data set of 20 training images with another mean."""
        workdir, result = done
        small = data.Split(dataset.train.images[:20], dataset.train.labels[:20])
        other = dataclasses.replace(
            dataset, train=small, mean=dataset.mean + 0.2, class_names=("a", "b", "c", "d")
        )
        scores = train.evaluate_run(settings(), workdir, other)
        assert scores["last"]["nll"] == pytest.approx(result["last"]["nll"], rel=1e-4)
        other = dataclasses.replace(dataset, class_names=("1", "0", "2", "3"))
        with pytest.raises(UserError, match=r"trained on 4 classes.*'1' is not '0'"):
            train.evaluate_run(settings(), workdir, other)


class TestTeacher:
    def test_it_is_trained_beside_the_student_and_reused(self, done, dataset):
        workdir, result = done
        teacher = teacher_folder(workdir.parent, "resnet8")
        assert (teacher / "result.json").exists()
        before = (teacher / "result.json").stat().st_mtime_ns
        other = train.run(settings(seed=1, epochs=1), workdir.parent / "other", dataset)
        assert (teacher / "result.json").stat().st_mtime_ns == before
        assert other["teacher"] == result["teacher"]
        assert not equal(variables(workdir), variables(workdir.parent / "other"))

    def test_only_the_teacher(self, done, dataset, tmp_path):
        workdir, _ = done
        config = settings(**{"teacher.workdir": str(tmp_path / "teacher"), "teacher.epochs": 1})
        with pytest.raises(UserError, match=r"where there is no run.*mode=teacher"):
            train.run(config, tmp_path / "student", dataset)
        assert not list(tmp_path.iterdir())
        result = train.run(config, tmp_path / "student", dataset, teacher_only=True)
        assert result["last"]["epoch"] == 1 and not (tmp_path / "student").exists()
        # A finished teacher that the config names is used, however long it was trained.
        config = settings(**{"teacher.workdir": str(tmp_path / "teacher"), "epochs": 1})
        train.run(config, tmp_path / "student", dataset)
        # A run that began with one teacher cannot continue with another.
        config = settings(
            **{"teacher.workdir": str(teacher_folder(workdir.parent, "resnet8")), "epochs": 1}
        )
        with pytest.raises(UserError, match="checksum of the teacher"):
            train.run(config, tmp_path / "student", dataset)

    def test_teachers_of_other_recipes_and_data_are_side_by_side(self, dataset, tmp_path):
        shifted = data.from_arrays(
            dataset.train.images // 2, dataset.train.labels, dataset.test.images,
            dataset.test.labels, name="squares",
        )  # fmt: skip
        config = settings(**{"teacher.epochs": 1, "epochs": 1})
        for given, changes in ((dataset, {}), (dataset, {"teacher.epochs": 2}), (shifted, {})):
            config.update_from_flattened_dict(changes)
            train.run(config, tmp_path / "student", given, teacher_only=True)
        teachers = list(tmp_path.glob("squares_resnet8_*_seed0"))
        assert len(teachers) == 3
        recipes = [
            json.loads((t / "config.json").read_text())["config"]["epochs"] for t in teachers
        ]
        assert sorted(recipes) == [1, 2, 2]

    def test_one_that_was_trained_as_a_run_of_its_own_is_found(self, dataset, tmp_path):
        config = settings(**{"teacher.epochs": 1, "epochs": 1})
        own = config_lib.teacher_config(config)
        own.name = "mine"
        train.run(own, tmp_path / "mine", dataset)
        train.run(config, tmp_path / "student", dataset)
        assert {path.name for path in tmp_path.iterdir()} == {"mine", "student"}

    def test_another_network_or_class_count_is_refused(self, done, tmp_path):
        workdir, _ = done
        teacher = teacher_folder(workdir.parent, "resnet8")
        for name, classes in (("resnet14", 4), ("resnet8", 5)):
            template = network_shapes(models.create(name, classes), (8, 8, 1))
            with pytest.raises(UserError, match="another network or number of classes"):
                load_network(teacher, "last", template)


def test_stages_follow_each_other_and_frozen_parts_stay(dataset, tmp_path):
    config = settings(
        **{
            "teacher.name": "",
            "loss.kd": 0.0,
            "weighting.name": "uniform",
            "epochs": 1,
            "trainable": ("student/fc", "heads"),
            "first_stage.epochs": 1,
            "first_stage.loss.cls": 1.0,
            "first_stage.trainable": ("heads",),
        }
    )
    train.run(config, tmp_path, dataset)
    first, main = rows(tmp_path)
    assert [row["stage"] for row in (first, main)] == ["first", "main"]
    assert [int(row["step"]) for row in (first, main)] == [7, 14]
    assert float(first["train_cls"]) > 0 and first["train_ce"] == ""
    network = models.create("resnet8", 4)
    initial = init_state(
        0, network, Heads(4, {"cls": "backbone"}), {}, None, config.weighting, (8, 8, 1), 160
    )
    trained, initial = variables(tmp_path)["params"], initial.network()["params"]
    assert not equal(trained.pop("fc"), initial.pop("fc"))
    assert equal(trained, initial)


class TestWrongInput:
    def test_non_finite_loss_names_step_term_and_checkpoint(self, dataset, tmp_path):
        config = settings(**{"teacher.name": "", "loss.kd": 0.0, "weighting.name": "uniform"})
        config.optimizer.learning_rate = 1e30
        config.log_every_steps = 1
        with pytest.raises(UserError) as error:
            train.run(config, tmp_path, dataset)
        for word in ("not finite at step", "(epoch 1)", "ce", "Last good checkpoint: none"):
            assert word in str(error.value)

    def test_before_anything_is_trained(self, dataset, tmp_path):
        cases = {
            "batch_size is 161": {"batch_size": 161},
            "teacher.batch_size is 500": {"teacher.batch_size": 500},
            "unknown data set 'squares'": {},
        }
        for words, changes in cases.items():
            with pytest.raises(UserError, match=words):
                train.run(settings(**changes), tmp_path, dataset if changes else None)
        images = np.zeros((8, 3, 9, 1), np.uint8)
        small = data.from_arrays(images, np.arange(8) % 2, test_fraction=0.5)
        with pytest.raises(UserError, match="resnet8 needs images of at least 4x4"):
            train.run(settings(), tmp_path, small)
        with pytest.raises(UserError, match="no teacher"):
            config = settings(**{"teacher.name": "", "loss.kd": 0.0, "weighting.name": "uniform"})
            train.run(config, tmp_path, dataset, teacher_only=True)
        assert not list(tmp_path.iterdir())

    def test_no_space(self, dataset, tmp_path, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
        with pytest.raises(UserError, match=r"1 MiB free; the checkpoints .* need \d+ MiB"):
            train.run(settings(), tmp_path / "run", dataset)

    def test_evaluation_without_a_checkpoint(self, dataset, tmp_path):
        with pytest.raises(UserError, match="no checkpoint"):
            train.evaluate_run(settings(), tmp_path, dataset)


def test_every_control_of_ipwd_is_a_configuration(dataset, done):
    """Train KD with a constant weight, KD with the extra head, and WSLD for one epoch each."""
    workdir, _ = done
    cases = {
        "constant": {"loss.cls": 0.0, "weighting.name": "constant", "weighting.constant": 2.0},
        "head": {"weighting.name": "uniform", "terms.cls.source": "detached"},
        "wsld": {"loss.cls": 0.0, "weighting.name": "wsld", "terms.kd.cross_entropy": True},
    }
    for name, changes in cases.items():
        result = train.run(settings(**{"epochs": 1, **changes}), workdir.parent / name, dataset)
        weights = result["weights"]
        assert bool(weights) == (name != "head")
        if name == "constant":
            assert weights["weight_mean"] == weights["weight_max"] == 2
        if name == "wsld":
            assert 0 <= weights["weight_min"] < weights["weight_max"] <= 1


def test_a_new_term_is_one_class_and_one_line(dataset, done, monkeypatch):
    """The term is a regressor with BatchNorm and a memory, which is all that a term can have."""
    import flax.linen as nn
    import jax.numpy as jnp

    from ipwd_jax.losses.base import Term
    from ipwd_jax.models.base import BatchNorm

    class Toy(Term):
        width: int = 3
        teacher_taps = ("embedding",)

        @nn.compact
        def __call__(self, student, teacher, batch):
            seen = self.variable("memory", "seen", jnp.zeros, (200,))
            if not self.is_initializing():
                seen.value = seen.value.at[batch.index].add(batch.mask)
            regressed = nn.Dense(teacher.embedding.shape[-1])(student.embedding)
            regressed = BatchNorm(train=True, axis_name=None)(regressed, batch.mask)
            return ((regressed - teacher.embedding) ** 2).mean(axis=1)

    monkeypatch.setitem(losses.TERMS, "toy", Toy)
    config = settings(epochs=2)
    config.loss = {"ce": 1.0, "toy": 1.0}
    config.weighting.name = "uniform"
    config.terms.toy = losses.hyper_parameters("toy")
    workdir = done[0].parent / "toy"
    train.run(config, workdir, dataset)
    table = rows(workdir)
    assert float(table[1]["train_toy"]) < float(table[0]["train_toy"])


class Plain(nn.Module):
    """A network without BatchNorm."""

    classes: int
    axis_name: str | None = None
    smallest_image = 1
    head_modules = ("fc",)

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        x = relu(Conv(4, 3, 2, name="conv")(x))
        embedding = x.mean(axis=(1, 2))
        return Outputs(Linear(self.classes, name="fc")(embedding), embedding, (x,), (x,))


def test_a_network_without_batch_norm(dataset, tmp_path, monkeypatch):
    """The network is the student, the teacher, also when folded, and a head that is a network."""
    monkeypatch.setitem(models.NETWORKS, "plain", Plain)
    config = settings(**{"epochs": 1, "teacher.epochs": 1, "terms.cls.source": "network"})
    config.model.name = config.teacher.name = "plain"
    result = train.run(config, tmp_path / "student", dataset)
    config.teacher.fold = True
    folded = train.run(config, tmp_path / "folded", dataset)
    assert result["last"]["nll"] == pytest.approx(folded["last"]["nll"], rel=1e-4)
    scores = train.evaluate_run(config, tmp_path / "student", dataset)
    assert scores["last"]["nll"] == pytest.approx(result["last"]["nll"], rel=1e-4)


def test_the_clock_waits_for_the_device(dataset, tmp_path, monkeypatch):
    """If the device is slower than the loop that feeds it, it determines the images per second."""
    compiled = parallel.compile_train_step

    def slow_device(step):
        step, ends = compiled(step), []

        def dispatch(*arguments):
            ends.append(max([*ends[-1:], time.monotonic()]) + 0.05)
            return step(*arguments)

        def wait(tree):
            time.sleep(max(0.0, ends[-1] - time.monotonic()) if ends else 0.0)
            return block(tree)

        monkeypatch.setattr(jax, "block_until_ready", wait)
        dispatch.lower = step.lower
        return dispatch

    block, shown = jax.block_until_ready, []
    monkeypatch.setattr(parallel, "compile_train_step", slow_device)
    monkeypatch.setattr(Recorder, "show", lambda self, speed, *_: shown.append(speed))
    config = settings(**{"teacher.name": "", "loss.kd": 0.0, "weighting.name": "uniform"})
    config.update({"epochs": 1, "log_every_steps": 1})
    train.run(config, tmp_path, dataset)
    speeds = [speed for speed in shown if not math.isnan(speed)]
    assert len(speeds) >= 5 and max(speeds) < 24 / 0.05 * 1.01

"""Mistakes in a user's term, network or weighting are named before the teacher is trained."""

import dataclasses
import shutil

import flax.linen as nn
import jax.numpy as jnp
import pytest
from helpers import Tiny, settings, squares, teacher_folder

from ipwd_jax import losses, models, report, train
from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Term
from ipwd_jax.losses.weighting import WEIGHTINGS, Weighting
from ipwd_jax.models.base import Linear


class ReadsMaps(Term):
    """It reads maps, and declares logits."""

    teacher_taps = ("logits",)

    def __call__(self, student, teacher, batch):
        return (student.features[0] - teacher.features[0]).mean(axis=(1, 2, 3))


class ReadsEmbedding(ReadsMaps):
    def __call__(self, student, teacher, batch):
        return (student.embedding - teacher.embedding).mean(axis=1)


class ReadsAll(ReadsMaps):
    teacher_taps = ()


class Misspelt(ReadsMaps):
    teacher_taps = ("feature",)


class NoTuple(ReadsMaps):
    teacher_taps = "logits"


class RandomAdapter(ReadsMaps):
    @nn.compact
    def __call__(self, student, teacher, batch):
        adapted = nn.Dropout(0.5, deterministic=False)(nn.Dense(2)(student.logits))
        return (adapted - teacher.logits).mean(axis=1)


class NoAxis(nn.Module):
    classes: int


class NoHeads(nn.Module):
    classes: int
    axis_name: str | None = None
    smallest_image = 4


class NoMask(Tiny):
    @nn.compact
    def __call__(self, x, train=False):
        return Linear(self.classes, name="fc")(x.mean(axis=(1, 2)))


class Bare(Tiny):
    @nn.compact
    def __call__(self, x, train=False, mask=None):
        return Linear(self.classes, name="fc")(x.mean(axis=(1, 2)))


class Dropout(Tiny):
    @nn.compact
    def __call__(self, x, train=False, mask=None):
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return Linear(self.classes, name="fc")(x.mean(axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class NoRecord(Weighting):
    def weights(self, student, teacher, batch):
        return jnp.ones_like(batch.mask)


@dataclasses.dataclass(frozen=True)
class ReadsUndeclared(Weighting):
    """It reads the embedding, and declares the logits."""

    teacher_taps = ("logits",)

    def weights(self, student, teacher, batch):
        return jnp.abs(teacher.embedding).mean(axis=1), {}


@dataclasses.dataclass(frozen=True)
class MisspeltTap(ReadsUndeclared):
    teacher_taps = ("logit",)


def refused(tmp_path, words, **changes):
    with pytest.raises(UserError, match=words):
        train.run(settings(**changes), tmp_path / "run", squares())
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (ReadsMaps, r"term own cannot be computed \(.*test_own_parts\.py, line 2\d\).*: logits\."),
        (ReadsEmbedding, "sees only what its teacher_taps name: logits"),
        (ReadsAll, "sees only what its teacher_taps name: none"),
        (Misspelt, r"teacher_taps of this term must be .* found \('feature',\)"),
        (NoTuple, "must be a tuple .* found 'logits'"),
        (RandomAdapter, r"term own cannot be computed \(.*: InvalidRngError"),
    ],
)
def test_terms(term, words, tmp_path, monkeypatch):
    monkeypatch.setitem(losses.TERMS, "own", term)
    refused(tmp_path, words, loss__own=1.0)


@pytest.mark.parametrize("part", ["model", "teacher"])
@pytest.mark.parametrize(
    ("network", "words"),
    [
        (NoMask, "the network own cannot be called: TypeError: .*mask"),
        (Bare, "the network own returns .*must return Outputs"),
        (Dropout, "the network own cannot be called: InvalidRngError"),
    ],
)
def test_networks(network, words, part, tmp_path, monkeypatch):
    monkeypatch.setitem(models.NETWORKS, "own", network)
    refused(tmp_path, words, **{f"{part}__name": "own"})


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda classes, axis_name=None: nn.Dense(classes), "own has no smallest_image"),
        (NoHeads, "own has no head_modules"),
        (NoAxis, "own cannot be made with the fields `classes` and `axis_name`.*: .*axis_name"),
    ],
)
def test_networks_that_lack_what_every_network_needs(network, words, tmp_path, monkeypatch):
    monkeypatch.setitem(models.NETWORKS, "own", network)
    refused(tmp_path, words, model__name="own")


@pytest.mark.parametrize(
    ("weighting", "words"),
    [
        (NoRecord, "must return weights and a record"),
        (ReadsUndeclared, "name=own cannot be computed .* teacher_taps name: logits"),
        (MisspeltTap, r"teacher_taps of config\.weighting\.name=own must be .* \('logit',\)"),
    ],
)
def test_weightings(weighting, words, tmp_path, monkeypatch):
    monkeypatch.setitem(WEIGHTINGS, "own", weighting)
    refused(tmp_path, words, weighting__name="own")


def test_a_finished_teacher_is_only_asked(tmp_path, monkeypatch):
    """Its network need not be able to train."""
    config = settings(epochs=1, teacher__view_cache="off")
    train.run(config, tmp_path / "run", squares(), teacher_only=True)
    teacher = teacher_folder(tmp_path, "tiny_net")

    class Asked(Tiny):
        @nn.compact
        def __call__(self, x):
            return Tiny.__call__.__wrapped__(self, x)

    monkeypatch.setitem(models.NETWORKS, "asked", Asked)
    config.teacher.name, config.teacher.workdir = "asked", str(teacher)
    train._checked(config, squares())
    config.teacher.train_mode = True
    with pytest.raises(UserError, match="asked cannot be called"):
        train._checked(config, squares())


def test_runs_of_a_term_that_is_not_known_are_reported(tmp_path, monkeypatch):
    class Own(losses.TERMS["ce"]):
        pass

    short = {"epochs": 1, "teacher__name": "", "weighting__name": "uniform", "loss__kd": 0.0}
    with monkeypatch.context() as patch:
        patch.setitem(losses.TERMS, "own", Own)
        config = settings(**short, loss__own=0.1, loss__cls=0.0)
        for config.seed in (0, 1):
            train.run(config, tmp_path / f"own_seed{config.seed}", squares())
    written = report.write_report([*tmp_path.glob("own_seed*")], tmp_path / "all.html")
    assert "0.1 own" in written.files[0].read_text()


def test_a_teacher_of_other_classes_or_another_network(tmp_path):
    config = settings(epochs=1, teacher__view_cache="off")
    train.run(config, tmp_path / "run", squares(), teacher_only=True)
    teacher = shutil.copytree(teacher_folder(tmp_path, "tiny_net"), tmp_path / "moved")
    config.teacher.workdir, config.teacher.name = str(teacher), "resnet8"
    for start in (train.run, lambda *given: next(train.planned(*given))):
        with pytest.raises(UserError, match="is of another network than resnet8"):
            start(config, tmp_path / "student", squares())
    assert not (tmp_path / "student").exists()

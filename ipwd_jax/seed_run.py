"""The run of one seed: its state and position, and what is measured there."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ipwd_jax import evaluate, metrics, parallel, writers
from ipwd_jax.assemble import Experiment
from ipwd_jax.checkpoint import Checkpoints, Position, Snapshot
from ipwd_jax.data.resident import resident
from ipwd_jax.errors import UserError
from ipwd_jax.losses import weighting
from ipwd_jax.stages import Stage
from ipwd_jax.state import not_finite
from ipwd_jax.typing import PyTree


class SeedRun:
    """The run of one seed of an experiment, at its beginning or where it was stopped.

    Attributes:
        experiment: the part of the run that stays the same.
        seed: seed of the run.
        workdir: work directory of the run.
        now: the current state and position, which change with every step.
        checkpoints: the checkpoints in the work directory.
        resumed: whether the run resumes from a checkpoint.
    """

    def __init__(
        self,
        experiment: Experiment,
        seed: int,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        predict: Callable,
    ) -> None:
        """`predict` is what `evaluate.make_predict` returns for the student's network."""
        self.experiment, self.seed, self.workdir = experiment, seed, workdir
        self.checkpoints, self._predict = checkpoints, predict
        initial = experiment.initial_state(seed)
        now = checkpoints.restore(lambda position: experiment.begin(position.stage, initial))
        self.resumed = now is not None
        if now is None:
            state = parallel.replicate(experiment.begin(0, initial))
            now = Snapshot(state, jax.tree.map(jnp.copy, state.network()), Position())
        self.now = now
        dataset = experiment.dataset
        evaluated = {name: resident(dataset, split) for name, split in dataset.evaluated.items()}
        self._evaluated = parallel.replicate(evaluated)

    @property
    def stage(self) -> Stage:
        """The stage that the run is in."""
        return self.experiment.stages[self.now.position.stage]

    def number(self) -> int:
        """Return the number of steps taken in all stages: the number of a checkpoint saved now."""
        return self.stage.first_step + self.now.position.step

    def images_of_last(self, steps: int) -> int:
        """Return on how many images the last steps, which are of one epoch, have trained."""
        experiment = self.experiment
        size, batch = len(experiment.dataset.train.labels), experiment.config.batch_size
        last = (self.now.position.step - 1) % experiment.steps_per_epoch
        return min((last + 1) * batch, size) - (last + 1 - steps) * batch

    def begin(self, stage: int) -> None:
        """Move to the first step of a stage."""
        self.now.position.stage, self.now.position.step = stage, 0
        self.now.state = parallel.replicate(self.experiment.begin(stage, self.now.state))

    def averages(self) -> dict[str, float]:
        """Wait for the latest step, and return the averages over the steps of this epoch so far.

        Raises:
            UserError: a loss was not finite at some step of this stage.
        """
        averages, nonfinite = jax.device_get((self.now.state.metrics, self.now.state.nonfinite))
        bad = {name: int(first) for name, first in nonfinite.items() if first >= 0}
        if bad:
            first = min(bad.values())
            terms = [name for name in bad if name != "loss" and bad[name] == first] or ["loss"]
            raise self._diverged(
                f"the loss was not finite at {self._place(first + 1)}: {', '.join(terms)}"
            )
        return {name: float(average.compute()) for name, average in averages.items()}

    def check_state(self) -> None:
        """Raise `UserError` if a loss, or the state after the latest step, is not finite.

        The loss alone is not enough: it says nothing about the parameters after the same step.
        """
        self.averages()
        state = self.now.state
        # The memory of the weighting is left out, because per-sample weights can be very large.
        if bad := not_finite(dataclasses.replace(state, memory=state.memory["terms"])):
            raise self._diverged(
                f"after {self._place(self.now.position.step)}, {len(bad)} arrays of the state are "
                f"not finite or close to overflow, among them {', '.join(bad[:3])}"
            )

    def _place(self, step: int) -> str:
        epoch = math.ceil(step / self.experiment.steps_per_epoch)
        return f"step {step} (epoch {epoch}) of stage {self.stage.name!r}"

    def _diverged(self, what: str) -> UserError:
        saved = self.checkpoints.steps()
        return UserError(
            f"{what}. Last good checkpoint: {f'step {saved[-1]}' if saved else 'none'} in "
            f"{self.workdir}. Try a lower learning rate with another --workdir."
        )

    def end_epoch(self, images_per_second: float) -> dict[str, Any]:
        """Measure the run at the end of an epoch, and return the row of metrics.

        The student is kept if its accuracy on the validation set, or on the test set if there is
        none, is the best in the main stage so far.
        """
        self.check_state()
        experiment, position, stage = self.experiment, self.now.position, self.stage
        epoch, averages = position.step // experiment.steps_per_epoch, self.averages()
        row: dict[str, Any] = {
            "stage": stage.name,
            "epoch": epoch,
            "step": self.number(),
            "learning_rate": float(stage.learning_rate(position.step - 1)),
            **{f"train_{name}": value for name, value in averages.items() if name != "top1"},
            "train_top1": 100 * averages["top1"],
            "images_per_second": images_per_second,
        }
        if epoch % experiment.config.eval_every_epochs == 0 or epoch == stage.epochs:
            network, splits = self.now.state.network(), experiment.dataset.evaluated
            scores = {split: self.scores(network, split)[1] for split in splits}
            row |= {
                f"{split}_{k}": value for split, of in scores.items() for k, value in of.items()
            }
            top1 = float(scores.get("validation", scores["test"])["top1"])
            if not stage.pretrains and top1 > position.best_top1:
                position.best_epoch, position.best_top1 = epoch, top1
                self.now.best = jax.tree.map(jnp.copy, self.now.state.network())
        row |= self.weight_metrics() | self.term_metrics()
        position.history.append(row)
        return row

    def is_out_of_patience(self) -> bool:
        """Return whether `config.patience` epochs have passed since the best epoch.

        This is decided only after an epoch that was evaluated.
        """
        position, patience = self.now.position, self.experiment.config.patience
        evaluated = any("test_top1" in row for row in position.history[-1:])
        if not patience or self.stage.pretrains or not evaluated:
            return False
        return position.epochs_of("main") - position.best_epoch >= patience

    def scores(self, variables: PyTree, name: str) -> tuple[np.ndarray, dict[str, float]]:
        """Return the logits (N, C) of a network on the split `name`, and their metrics.

        Raises:
            UserError: some logits are not finite.
        """
        experiment, split = self.experiment, self.experiment.dataset.evaluated[name]
        logits = evaluate.predict_all(
            self._predict,
            variables,
            self._evaluated[name],
            split,
            experiment.config.eval_batch_size,
        )
        if not np.isfinite(logits).all():
            raise self._diverged(
                f"after {self._place(self.now.position.step)}, some logits of the {name} set are "
                "not finite"
            )
        mass = experiment.teacher.class_mass() if experiment.teacher else None
        return logits, evaluate.score(logits, split.labels, mass)

    def weight_metrics(self) -> dict[str, float]:
        """Return statistics of the per-sample weights, or nothing if the stage is not weighted."""
        if self.stage.weighting is None:
            return {}
        memory = jax.device_get(self.now.state.memory["weighting"])
        row = {f"weight_{k}": v for k, v in metrics.weight_summary(memory["weight"]).items()}
        if alternatives := weighting.create(self.stage.weighting).alternatives(memory):
            labels, mass = self.experiment.dataset.train.labels, self._class_mass()
            hardness = self._hardness
            for name, weights in alternatives.items():
                means = metrics.class_means(weights, labels, len(mass))
                row[f"mass_correlation_{name}"] = metrics.rank_correlation(means, mass)
                if hardness is not None:
                    correlation = metrics.rank_correlation(weights, hardness)
                    row[f"hardness_correlation_{name}"] = correlation
        return row

    def term_metrics(self) -> dict[str, float]:
        """Return the numbers that the terms of the stage report (`Term.scalars`)."""
        row: dict[str, float] = {}
        state = self.now.state
        collections = ("params", "batch_stats", "memory")
        for name, term in self.stage.terms.items():
            variables = {c: getattr(state, c)["terms"].get(name, {}) for c in collections}
            row |= {f"{name}_{key}": value for key, value in term.scalars(variables).items()}
        return row

    def samples(self) -> dict[str, np.ndarray]:
        """Return the records of the training samples, or nothing if the stage is not weighted.

        Returns:
            `label` (N,); `class_mass` (C,); `weight` (N,), the weight that each sample had when it
            was last seen; whatever else the weighting stores for each sample, (N,); and, if the
            teacher has answered for all of them, `teacher_nll` (N,), its loss in nats.
        """
        if self.stage.weighting is None:
            return {}
        memory = jax.device_get(self.now.state.memory["weighting"])
        labels, hardness = self.experiment.dataset.train.labels, self._hardness
        known = {} if hardness is None else {"teacher_nll": hardness.astype(np.float32)}
        return {"label": labels, "class_mass": self._class_mass(), **memory, **known}

    def of_classes(
        self,
        last_logits: np.ndarray,
        best_logits: np.ndarray,
        samples: Mapping[str, np.ndarray],
    ) -> list[dict[str, float | str | None]]:
        """Return what the run and its teacher know of each class: the rows of `classes.csv`.

        Args:
            last_logits: (N, C), of the last epoch on the test set.
            best_logits: (N, C), of the best epoch.
            samples: what `samples` returns.

        Returns:
            For each class its name; the recall of both epochs and of the teacher in percent, None
            without test images; the teacher's mass; and the mean weight of its samples.
        """
        dataset, teacher = self.experiment.dataset, self.experiment.teacher
        logits = {"last": last_logits, "best": best_logits}
        logits |= {"teacher": teacher.test_logits} if teacher else {}
        columns = {
            f"recall_{name}": metrics.class_recall(x, dataset.test.labels)
            for name, x in logits.items()
        }
        if teacher:
            columns["teacher_mass"] = teacher.class_mass()
        if samples:
            weights, labels, mass = (samples[key] for key in ("weight", "label", "class_mass"))
            columns["weight_mean"] = metrics.class_means(weights, labels, len(mass))
        return [
            {"class": name, **{key: writers.plain(x[row]) for key, x in columns.items()}}
            for row, name in enumerate(dataset.class_names)
        ]

    @functools.cached_property
    def _hardness(self) -> np.ndarray | None:
        """The teacher's loss on each training sample, (N,); None if it is not known."""
        return self.experiment.teacher.train_nll() if self.experiment.teacher else None

    def _class_mass(self) -> np.ndarray:
        """Return the total probability that the teacher gives each class, (C,).

        Without a teacher, it is the total probability that the targets of a self-distillation term
        give each class, or 1 for every class if there is no such term.
        """
        if self.experiment.teacher:
            return self.experiment.teacher.class_mass()
        memory = self.now.state.memory["terms"]
        of_terms = (t.class_mass(memory.get(name, {})) for name, t in self.stage.terms.items())
        found = (mass for mass in of_terms if mass is not None)
        return next(found, np.ones(len(self.experiment.dataset.class_names)))

    def save(self) -> None:
        """Start writing a checkpoint.

        Raises:
            UserError: the run has diverged, or a checkpoint could not be written.
        """
        self.check_state()
        self.checkpoints.save(self.number(), self.now)

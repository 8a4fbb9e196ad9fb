"""One seed's run: where it is, and what it measures there."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ipwd_jax import evaluate, metrics, parallel
from ipwd_jax.assemble import Experiment, Stage
from ipwd_jax.checkpoint import Checkpoints, Position, Snapshot
from ipwd_jax.data.resident import resident
from ipwd_jax.errors import UserError
from ipwd_jax.losses import weighting
from ipwd_jax.state import not_finite
from ipwd_jax.typing import PyTree


class SeedRun:
    """The run of one seed of an experiment, where it was stopped or at its beginning.

    Attributes:
        experiment: what stays the same.
        seed: of the run.
        workdir: of the run.
        now: where it is; changes with every step.
        checkpoints: of its work directory.
        resumed: whether it was stopped before.
    """

    def __init__(
        self,
        experiment: Experiment,
        seed: int,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        predict: Callable,
    ) -> None:
        """`predict` is of `evaluate.make_predict` for the student's network."""
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
        self._test = parallel.replicate(resident(dataset, dataset.test))

    @property
    def stage(self) -> Stage:
        """The stage that the run is in."""
        return self.experiment.stages[self.now.position.stage]

    def number(self) -> int:
        """Steps of all stages so far: the number of a checkpoint taken now."""
        return self.stage.first_step + self.now.position.step

    def begin(self, stage: int) -> None:
        """Goes to the first step of a stage."""
        self.now.position.stage, self.now.position.step = stage, 0
        self.now.state = parallel.replicate(self.experiment.begin(stage, self.now.state))

    def averages(self) -> dict[str, float]:
        """What the steps of this epoch have averaged to; waits for the latest step.

        Raises:
            UserError: a loss of an earlier step was not finite.
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
        """Raises `UserError` where the last steps led to numbers that are not finite.

        The loss of a step says nothing about the parameters that the step ends with.
        """
        self.averages()
        state = self.now.state
        # Weights of samples may be as large as their formula makes them.
        if bad := not_finite(dataclasses.replace(state, memory=state.memory["terms"])):
            raise self._diverged(
                f"after {self._place(self.now.position.step)} {len(bad)} arrays of the state are "
                f"not finite or near to it, among them {', '.join(bad[:3])}"
            )

    def _place(self, step: int) -> str:
        epoch = math.ceil(step / self.experiment.steps_per_epoch)
        return f"step {step} (epoch {epoch}) of stage {self.stage.name!r}"

    def _diverged(self, what: str) -> UserError:
        saved = self.checkpoints.steps()
        return UserError(
            f"{what}. Last good checkpoint: {f'step {saved[-1]}' if saved else 'none'} in "
            f"{self.workdir}. Try a lower learning rate, and another --workdir."
        )

    def end_epoch(self, images_per_second: float) -> dict[str, Any]:
        """Measures the run at the end of an epoch, keeps the best network, returns the metrics."""
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
            scores = self.test_scores(self.now.state.network())[1]
            row |= {f"test_{name}": value for name, value in scores.items()}
            if not stage.pretrains and scores["top1"] > position.best_top1:
                position.best_epoch, position.best_top1 = epoch, float(scores["top1"])
                self.now.best = jax.tree.map(jnp.copy, self.now.state.network())
        row |= self.weight_metrics()
        position.history.append(row)
        return row

    def test_scores(self, variables: PyTree) -> tuple[np.ndarray, dict[str, float]]:
        """Logits (N, C) of a network on the test set, and what they are worth."""
        experiment, test = self.experiment, self.experiment.dataset.test
        logits = evaluate.predict_all(
            self._predict, variables, self._test, test, experiment.config.eval_batch_size
        )
        if not np.isfinite(logits).all():
            raise self._diverged(
                f"after {self._place(self.now.position.step)} logits of the test set are not finite"
            )
        mass = experiment.teacher.class_mass() if experiment.teacher else None
        return logits, evaluate.score(logits, test.labels, mass)

    def weight_metrics(self) -> dict[str, float]:
        """What the weights of this epoch's samples look like; empty where nothing is weighted."""
        if self.stage.weighting is None:
            return {}
        memory = jax.device_get(self.now.state.memory["weighting"])
        row = {f"weight_{k}": v for k, v in metrics.weight_summary(memory["weight"]).items()}
        if alternatives := weighting.create(self.stage.weighting).alternatives(memory):
            labels, mass = self.experiment.dataset.train.labels, self._class_mass()
            for name, weights in alternatives.items():
                row[f"mass_correlation_{name}"] = metrics.mass_correlation(weights, labels, mass)
        return row

    def samples(self) -> dict[str, np.ndarray]:
        """What is known of each training sample; empty where nothing is weighted.

        Returns:
            `label` (N,), `class_mass` (C,), `weight` (N,), the weight after the latest visit, and
            what else the weighting records of each sample.
        """
        if self.stage.weighting is None:
            return {}
        memory = jax.device_get(self.now.state.memory["weighting"])
        labels = self.experiment.dataset.train.labels
        return {"label": labels, "class_mass": self._class_mass(), **memory}

    def _class_mass(self) -> np.ndarray:
        """(C,) the probabilities that the teacher, or the student's own past, gives each class."""
        if self.experiment.teacher:
            return self.experiment.teacher.class_mass()
        memory = self.now.state.memory["terms"]
        of_terms = (t.class_mass(memory.get(name, {})) for name, t in self.stage.terms.items())
        found = (mass for mass in of_terms if mass is not None)
        return next(found, np.ones(len(self.experiment.dataset.class_names)))

    def save(self) -> None:
        """Starts to write a checkpoint, never of a run that has diverged."""
        self.check_state()
        self.checkpoints.save(self.number(), self.now)

"""The loop over stages, epochs and steps of one network's training."""

import contextlib
import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from ipwd_jax import evaluate, metrics, parallel, step, writers
from ipwd_jax.checkpoint import Checkpoints, Snapshot
from ipwd_jax.data import augment
from ipwd_jax.data.base import Dataset
from ipwd_jax.data.resident import Resident, resident
from ipwd_jax.errors import Interrupted, UserError
from ipwd_jax.losses.base import Term
from ipwd_jax.losses.weighting import ipwd_weights
from ipwd_jax.models.heads import Heads
from ipwd_jax.state import TrainState, begin_stage, order_key
from ipwd_jax.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run, ready to be trained."""

    config: ConfigDict
    terms: dict[str, Term]
    learning_rate: optax.Schedule
    optimizer: optax.GradientTransformation
    first_step: int  # steps of the stages before
    trainable: Any = None  # bools like the parameters

    def begin(self, state: TrainState) -> TrainState:
        """The state at the first step of this stage."""
        return begin_stage(state, self.optimizer, step.metric_names(self.terms))


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from the first step of a run to its last."""

    config: ConfigDict
    workdir: pathlib.Path
    dataset: Dataset
    teacher: Teacher | None
    network: nn.Module
    heads: Heads
    stages: list[Stage]
    steps_per_epoch: int
    steps_per_call: int
    order_seed: int  # of order and views; the run's own, unless seeds share the first one's


class Loop:
    """Trains runs that differ in nothing but their seed, from their snapshots to their end.

    All are part of one compiled program and share the data and the teacher; each gives the
    numbers that it gives alone. Usually there is one.

    Attributes:
        members: one for each seed; all are at the same step.
    """

    def __init__(self, members: Sequence["Member"], stopped_by: list[int]) -> None:
        """`stopped_by` is filled from outside with the signals that ask the loop to stop."""
        self.members, self.stopped_by = members, stopped_by
        self._saved_at = time.monotonic()

    def train(self) -> None:
        """Trains all stages to their end and saves.

        Raises:
            UserError: a loss was not finite, or a checkpoint could not be written.
            Interrupted: a signal came; the runs are saved.
        """
        run, position = self.members[0].run, self.members[0].now.position
        data = parallel.replicate(resident(run.dataset, run.dataset.train))
        for index in range(position.stage, len(run.stages)):
            stage = run.stages[index]
            if index != position.stage:
                for member in self.members:
                    member.begin(index)
            train_step = _compile(run, stage)
            while position.step < stage.config.epochs * run.steps_per_epoch:
                speed = self._train_epoch(train_step, data)
                for member in self.members:
                    member.end_epoch(stage, speed)
                if self.stopped_by or self._save_is_due():
                    self._save()
        self._save()
        for member in self.members:
            member.checkpoints.wait()

    def _train_epoch(self, train_step: Callable, data: Resident) -> float:
        """Takes the steps that are left of this epoch; returns images a second, of all runs."""
        run, position = self.members[0].run, self.members[0].now.position
        inputs = run.teacher.inputs if run.teacher else {}
        epoch, begin = divmod(position.step, run.steps_per_epoch)
        with contextlib.ExitStack() as stack:
            feeds = [
                stack.enter_context(contextlib.closing(member.calls(epoch, begin)))
                for member in self.members
            ]
            return self._take_calls(train_step, data, inputs, begin, feeds)

    def _take_calls(
        self, train_step: Callable, data: Resident, inputs: Any, begin: int, feeds: Sequence
    ) -> float:
        run = self.members[0].run
        count, images, started = run.steps_per_epoch, 0, time.monotonic()
        for rows in zip(*feeds, strict=True):
            index, mask, streamed = zip(*rows, strict=True)
            end = begin + len(index[0])
            states = tuple(member.now.state for member in self.members)
            states = train_step(states, data, inputs, index, mask, streamed)
            is_first = self.members[0].is_at_start()
            for member, state in zip(self.members, states, strict=True):
                member.now.state = state
                member.now.position.step += end - begin
            images += sum(int(m.sum()) for m in mask)
            if is_first:
                jax.block_until_ready(states)
                started, images = time.monotonic(), 0  # compilation is not training
                for member in self.members:
                    member.compiled_at = started
            if end < count:  # the end of the epoch is saved after its row is written
                if end // run.config.log_every_steps > begin // run.config.log_every_steps:
                    self.members[0].show(images / (time.monotonic() - started))
                if self.stopped_by or self._save_is_due():
                    self._save()
            begin = end
        for member in self.members:
            member.averages()  # waits for the last step
        return images / (time.monotonic() - started)

    def _save_is_due(self) -> bool:
        every = self.members[0].run.config.checkpoint.every_seconds
        return time.monotonic() - self._saved_at >= every

    def _save(self) -> None:
        """Saves, and ends the runs when a signal asked for it."""
        for member in self.members:
            member.save()
        self._saved_at = time.monotonic()
        if self.stopped_by:
            for member in self.members:
                member.checkpoints.wait()
            raise Interrupted(self.stopped_by[0])


def _compile(run: Run, stage: Stage) -> Callable:
    """The compiled step of all seeds: tuples of states, indices and masks in, states out."""
    one = step.make_train_step(
        run.config,
        stage.config,
        run.network,
        run.heads,
        stage.terms,
        run.teacher.answer if run.teacher else None,
        stage.optimizer,
        stage.trainable,
        run.steps_per_epoch,
    )

    # Unrolled: under vmap every convolution would become a grouped one, which is slower.
    def together(states, data, inputs, index, mask, streamed):
        if run.config.share_order:
            # Equal inputs by name, so that the compiler asks the teacher once for all.
            first = states[0]
            states = tuple(state.replace(key=first.key, step=first.step) for state in states)
        return tuple(
            one(state, data, inputs, *rows)
            for state, *rows in zip(states, index, mask, streamed, strict=True)
        )

    return parallel.compile_train_step(together)


class Member:
    """One seed's run: its state, and what is written of it.

    Attributes:
        run: what stays the same.
        now: where the run is; changes with every step.
        checkpoints: of its work directory.
        compiled_at: when its first step was done.
    """

    def __init__(
        self, run: Run, now: Snapshot, checkpoints: Checkpoints, predict: Callable
    ) -> None:
        """`predict` is of `evaluate.make_predict` for the student's network."""
        self.run, self.now, self.checkpoints, self._predict = run, now, checkpoints, predict
        self._test = parallel.replicate(resident(run.dataset, run.dataset.test))
        self._line = writers.ProgressLine()
        self._tensorboard = SummaryWriter(
            str(run.workdir / "tensorboard"), purge_step=self._number() + 1
        )
        self._started = self.compiled_at = time.monotonic()
        self._seconds_before = now.position.seconds
        self._first_number = self._number()

    def close(self) -> None:
        """Ends the threads that write."""
        self._tensorboard.close()

    def begin(self, index: int) -> None:
        """Goes to the first step of a stage."""
        self.now.position.stage, self.now.position.step = index, 0
        self.now.state = parallel.replicate(self.run.stages[index].begin(self.now.state))

    def is_at_start(self) -> bool:
        """Whether this process has taken no step yet."""
        return self._number() == self._first_number

    def calls(self, epoch: int, begin: int) -> Generator[tuple]:
        """Index, mask and streamed images, if they are, of each call from step `begin` on.

        They have the shape (steps, devices, rows, ...). Calls end at multiples of their length,
        also after a resume inside an epoch.
        """
        run, train = self.run, self.run.dataset.train
        order = augment.epoch_order(
            order_key(jax.random.key(run.order_seed)), epoch, len(train.labels)
        )
        index, mask = augment.epoch_batches(order, run.config.batch_size, parallel.device_count())
        flat = index[begin:].reshape(len(index) - begin, -1)
        with contextlib.ExitStack() as stack:
            if train.streamed:
                source = train.images.batches(flat, run.order_seed, epoch, train=True)
                images = stack.enter_context(contextlib.closing(source))
            while begin < len(index):
                end = min(begin - begin % run.steps_per_call + run.steps_per_call, len(index))
                streamed = None
                if train.streamed:
                    batch = np.stack([next(images) for _ in range(begin, end)])
                    streamed = batch.reshape(*index[begin:end].shape, *batch.shape[2:])
                yield index[begin:end], mask[begin:end], streamed
                begin = end

    def _number(self) -> int:
        """Steps of all stages so far: the number of a checkpoint taken now."""
        position = self.now.position
        return self.run.stages[position.stage].first_step + position.step

    def averages(self) -> dict[str, float]:
        """What the steps of this epoch have averaged to; waits for the latest step."""
        averages, nonfinite = jax.device_get((self.now.state.metrics, self.now.state.nonfinite))
        bad = {name: int(first) for name, first in nonfinite.items() if first >= 0}
        if bad:
            first = min(bad.values())
            epoch = first // self.run.steps_per_epoch + 1
            terms = [name for name in bad if name != "loss" and bad[name] == first] or ["loss"]
            saved = self.checkpoints.steps()
            raise UserError(
                f"the loss was not finite at step {first + 1} (epoch {epoch}) of stage "
                f"{self.run.stages[self.now.position.stage].config.name!r}: "
                f"{', '.join(terms)}. Last good checkpoint: "
                f"{f'step {saved[-1]}' if saved else 'none'} in {self.run.workdir}. "
                "Try a lower learning rate, and another --workdir."
            )
        return {name: float(average.compute()) for name, average in averages.items()}

    def end_epoch(self, stage: Stage, speed: float) -> None:
        """Evaluates when it is time, and writes the epoch's row of metrics."""
        run, position = self.run, self.now.position
        epoch = position.step // run.steps_per_epoch
        averages = self.averages()
        row: dict[str, Any] = {
            "stage": stage.config.name,
            "epoch": epoch,
            "step": self._number(),
            "learning_rate": float(stage.learning_rate(position.step - 1)),
            **{f"train_{name}": value for name, value in averages.items() if name != "top1"},
            "train_top1": 100 * averages["top1"],
            "images_per_second": speed,
        }
        if epoch % run.config.eval_every_epochs == 0 or epoch == stage.config.epochs:
            scores = self._test_scores(self.now.state.network())[1]
            row |= {f"test_{name}": value for name, value in scores.items()}
            if stage is run.stages[-1] and scores["top1"] > position.best_top1:
                position.best_epoch, position.best_top1 = epoch, float(scores["top1"])
                self.now.best = jax.tree.map(jnp.copy, self.now.state.network())
        row |= self._weight_metrics()
        position.history.append(row)
        writers.write_csv(run.workdir / "metrics.csv", position.history)
        for name, value in row.items():
            if name not in ("stage", "step"):
                self._tensorboard.add_scalar(name, value, row["step"])
        self._tensorboard.flush()
        self.show(speed, row.get("test_top1"))

    def _test_scores(self, variables: Any) -> tuple[np.ndarray, dict[str, float]]:
        run = self.run
        logits = evaluate.predict_all(
            self._predict, variables, self._test, run.dataset.test, run.config.eval_batch_size
        )
        mass = run.teacher.class_mass() if run.teacher else None
        return logits, evaluate.score(logits, run.dataset.test.labels, mass)

    def _weight_metrics(self) -> dict[str, float]:
        """What the weights of this epoch's samples look like; empty when they are uniform."""
        memory = jax.device_get(self.now.state.memory["weighting"])
        if not memory:
            return {}
        row = {f"weight_{k}": v for k, v in metrics.weight_summary(memory["weight"]).items()}
        if "h_kd" in memory:
            labels, mass = self.run.dataset.train.labels, self._class_mass()
            for ratio in ("A", "B"):
                weights = ipwd_weights(memory["h_kd"], memory["h_cls"], ratio)
                row[f"mass_correlation_{ratio}"] = metrics.mass_correlation(weights, labels, mass)
        return row

    def _class_mass(self) -> np.ndarray:
        """(C,) the probabilities that the teacher, or the student's own past, gives each class."""
        if self.run.teacher:
            return self.run.teacher.class_mass()
        past = self.now.state.memory["terms"].get("pskd")
        classes = len(self.run.dataset.class_names)
        return np.asarray(past["predictions"]).sum(axis=0) if past else np.ones(classes)

    def show(self, speed: float, test_top1: float | None = None) -> None:
        """Shows where the run is; the line at the end of an epoch stays."""
        run, position, averages = self.run, self.now.position, self.averages()
        stage = run.stages[position.stage]
        at_end = position.step % run.steps_per_epoch == 0
        losses = " ".join(f"{name} {averages[name]:.3f}" for name in ("loss", *stage.terms))
        text = f"seed {run.config.seed} " if len(run.config.seeds) > 1 else ""
        text += (
            f"epoch {math.ceil(position.step / run.steps_per_epoch)}/{stage.config.epochs} "
            f"step {(position.step - 1) % run.steps_per_epoch + 1}/{run.steps_per_epoch}  "
            f"{losses}  train top1 {100 * averages['top1']:.2f}"
        )
        text += f"  test top1 {test_top1:.2f}" if test_top1 is not None else ""
        total = run.stages[-1].first_step + run.stages[-1].config.epochs * run.steps_per_epoch
        done = max(1, self._number() - self._first_number - 1)
        left = (time.monotonic() - self.compiled_at) / done * (total - self._number())
        self._line.show(
            f"{text}  {speed:,.0f} images/s  {writers.duration(left)} left", final=at_end
        )

    def save(self) -> None:
        """Starts to write a checkpoint."""
        self.averages()  # never a snapshot that has gone bad
        self.now.position.seconds = self._seconds()
        self.checkpoints.save(self._number(), self.now)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def result(self) -> dict[str, Any]:
        """Writes predictions and `result.json` of a run that is trained, and returns the latter."""
        run, position = self.run, self.now.position
        last_logits, last = self._test_scores(self.now.state.network())
        best_logits, best = self._test_scores(self.now.best)
        writers.write_npz(
            run.workdir / "predictions.npz",
            last_logits=last_logits,
            best_logits=best_logits,
            labels=run.dataset.test.labels,
        )
        speeds = [row["images_per_second"] for row in position.history]
        result = {
            "name": run.config.name,
            "data": run.dataset.name,
            "network": run.config.model.name,
            "parameters": sum(x.size for x in jax.tree.leaves(self.now.state.params["student"])),
            "seed": run.config.seed,
            "last": {"epoch": run.stages[-1].config.epochs, **last},
            "best": {"epoch": position.best_epoch, **best},
            "weights": self._weight_metrics(),
            "teacher": None,
            "train_seconds": position.seconds,
            "images_per_second": float(np.median(speeds)),
            "device": jax.devices()[0].device_kind,
            "devices": parallel.device_count(),
            "precision": run.config.precision,
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "versions": writers.versions(),
        }
        if run.teacher:
            scores = evaluate.score(
                run.teacher.test_logits, run.dataset.test.labels, run.teacher.class_mass()
            )
            about = {"network": run.config.teacher.name, **run.teacher.rounding}
            result["teacher"] = {**about, **scores}
        writers.write_json(run.workdir / "result.json", result)
        return result

"""Everything that a run writes and shows while it trains; the loop only says what happened."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from ipwd_jax import evaluate, parallel, writers
from ipwd_jax.errors import warn
from ipwd_jax.progress import Progress, duration
from ipwd_jax.seed_run import SeedRun

# Receives the metrics of an epoch, by name.
OnEpoch = Callable[[Mapping[str, Any]], object]

# Column -> width of the table of epochs, which is at most 79 characters wide.
_WIDTHS = {"seed": 5, "epoch": 11, "loss": 8, "train %": 9, "test %": 9, "rate": 9}
_WIDTHS |= {"weights to": 12, "images/s": 10, "left": 8}
# The effective sample size, as a share of the samples, below which a run warns.
_FEW = 0.1
# A run warns if its training accuracy is below so many times that of the largest class from this
# epoch on, or falls below such a share of that of an earlier epoch. A loss can rise by its weights.
_CHANCE, _LEARNS_BY, _COLLAPSE = 1.05, 3, 0.5


class Recorder:
    """Writes `metrics.csv`, TensorBoard, predictions and results, and shows the progress."""

    def __init__(self, run: SeedRun, progress: Progress, on_epoch: OnEpoch | None = None) -> None:
        """`progress` is shared by the recorders of all seeds.

        `on_epoch` is called after each epoch with the seed and the metrics.
        """
        self.run, self._on_epoch = run, on_epoch
        self._progress = progress
        self._tensorboard_folder = run.workdir / "tensorboard"
        purge_step, write = run.number() + 1, parallel.is_first()
        self._tensorboard = SummaryWriter(
            str(self._tensorboard_folder), purge_step=purge_step, write_to_disk=write
        )
        self._warned: set[str] = set()
        self.start()

    def start(self) -> None:
        """Start to measure the training time and the speed on which the time left is based."""
        self._started, self._first_number = time.monotonic(), self.run.number()
        self._seconds_before = self.run.now.position.seconds
        self._compile_seconds, self._compile_steps = 0.0, 0

    def compiles(self) -> None:
        """Show that the next call is compiled first, which takes seconds."""
        self._progress.count(self.run.number(), "compiling")

    def compiled(self, seconds: float, steps: int) -> None:
        """Leave a call that was compiled first out of the estimate of the time left."""
        self._compile_seconds += seconds
        self._compile_steps += steps

    def saves(self) -> None:
        """Update the position's training time, before a checkpoint is taken."""
        self.run.now.position.seconds = self._seconds_before + time.monotonic() - self._started

    def show(self, speed: float, row: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Show the progress, or the metrics of an epoch, `row`, as a line that stays."""
        run, stage, cells = self.run, self.run.stage, self._cells(speed, row)
        of_stage = "" if stage.name == "main" else f", stage {stage.name!r}"
        header = _table_row({name: name for name in cells})
        self._progress.title(f"Training {run.experiment.config.model.name}{of_stage}\n{header}")
        text = _table_row(cells)
        if row:
            self._progress.line(text)
        self._progress.count(run.number(), f"epoch {cells['epoch']}", passing=text)

    def _cells(self, speed: float, row: Mapping[str, Any]) -> dict[str, str]:
        run, position, stage = self.run, self.run.now.position, self.run.stage
        averages = run.averages()
        epoch = position.step / run.experiment.steps_per_epoch
        cells = {"seed": str(run.seed)} if len(run.experiment.config.seeds) > 1 else {}
        cells |= {
            "epoch": f"{epoch:.{0 if epoch == int(epoch) else 2}f}/{stage.epochs}",
            "loss": f"{averages['loss']:.3f}",
            "train %": f"{100 * averages['top1']:.2f}",
            "test %": "",
            "rate": f"{stage.learning_rate(position.step - 1):.3g}",
        }
        if "test_top1" in row:
            is_best = not stage.pretrains and row["epoch"] == position.best_epoch
            cells["test %"] = f"{row['test_top1']:.2f}{'*' if is_best else ' '}"
        if stage.weighting is not None:
            cells["weights to"] = f"{row['weight_max']:.3g}" if "weight_max" in row else ""
        cells["images/s"] = "" if math.isnan(speed) else f"{speed:,.0f}"
        return {**cells, "left": self._time_left()}

    def _time_left(self) -> str:
        number = self.run.number()
        done = max(1, number - self._first_number - self._compile_steps)
        seconds = time.monotonic() - self._started - self._compile_seconds
        return duration(seconds / done * (self.run.experiment.total_steps - number))

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Write and show the metrics of an epoch."""
        writers.write_csv(self.run.workdir / "metrics.csv", self.run.now.position.history)
        with writers.explained(self._tensorboard_folder):
            for name, value in row.items():
                if name not in ("stage", "step") and math.isfinite(value):
                    self._tensorboard.add_scalar(name, value, row["step"])
            self._tensorboard.flush()
        self.show(row["images_per_second"], row)
        for kind, text in _warnings(self.run, row):
            if kind not in self._warned:
                self._warned.add(kind)
                warn(f"epoch {row['epoch']} {text}")
        if self._on_epoch:
            self._on_epoch({"seed": self.run.seed, **row})

    def stops_early(self) -> bool:
        """Return whether the run ends before its last epoch, and show it if so."""
        if stops := self.run.is_out_of_patience():
            self._progress.line(
                f"Stopped early: no better epoch than {self.run.now.position.best_epoch} in the "
                f"last {self.run.experiment.config.patience}"
            )
        return stops

    def finish(self) -> dict[str, Any]:
        """Write the predictions and `result.json` of a finished run; return the latter."""
        run, position = self.run, self.run.now.position
        experiment = run.experiment
        last_logits, last = run.scores(run.now.state.network(), "test")
        best_logits, best = run.scores(run.now.best, "test")
        if experiment.dataset.validation:
            for scores, network in ((last, run.now.state.network()), (best, run.now.best)):
                scores["validation_top1"] = run.scores(network, "validation")[1]["top1"]
        labels = experiment.dataset.test.labels
        teacher = experiment.teacher
        writers.write_npz(
            run.workdir / "predictions.npz",
            last_logits=last_logits,
            best_logits=best_logits,
            labels=labels,
            **({"teacher_logits": teacher.test_logits} if teacher else {}),
        )
        samples = run.samples()
        classes = run.of_classes(last_logits, best_logits, samples)
        writers.write_csv(run.workdir / "classes.csv", classes)
        if samples:
            writers.write_npz(run.workdir / "samples.npz", **samples)
        speeds = [row["images_per_second"] for row in position.history]
        speeds = [speed for speed in speeds if not math.isnan(speed)]
        result: dict[str, Any] = {
            "name": experiment.config.name,
            "data": experiment.dataset.name,
            "network": experiment.config.model.name,
            "parameters": sum(x.size for x in jax.tree.leaves(run.now.state.params["student"])),
            "seed": run.seed,
            "last": {"epoch": position.epochs_of("main"), **last},
            "best": {"epoch": position.best_epoch, **best},
            "weights": run.weight_metrics(),
            "teacher": None,
            "train_seconds": position.seconds,
            "images_per_second": float(np.median(speeds)) if speeds else None,
            "device": jax.devices()[0].device_kind,
            "devices": parallel.device_count(),
            "precision": experiment.config.precision,
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "versions": writers.versions(),
        }
        if teacher:
            about = {"network": experiment.config.teacher.name, **teacher.rounding}
            scores = evaluate.score(teacher.test_logits, labels, teacher.class_mass())
            result["teacher"] = {**about, **scores}
        result = writers.plain(result)
        writers.write_json(run.workdir / "result.json", result)
        return result

    def close(self) -> None:
        """End the threads that write."""
        with writers.explained(self._tensorboard_folder):
            self._tensorboard.close()


def _warnings(run: SeedRun, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what looks wrong after an epoch, each with a name, as the end of a sentence."""
    share = row.get("weight_effective_sample_size")
    if share is not None and share < _FEW:
        yield (
            "weights",
            f"has an effective sample size of {100 * share:.1f} % (largest weight "
            f"{row['weight_max']:.3g}, mean {row['weight_mean']:.3g}): few samples decide the "
            "weighted loss. Limit their weights with --config.weighting.clip, or average them "
            "with --config.weighting.average.",
        )
    if run.stage.pretrains:
        return
    labels = run.experiment.dataset.train.labels
    chance = 100 * np.bincount(labels).max() / len(labels)
    if row["epoch"] >= _LEARNS_BY and row["train_top1"] < _CHANCE * chance:
        yield (
            "chance",
            f"ends with a training accuracy of {row['train_top1']:.3g} %, and always answering "
            f"with the largest class gives {chance:.3g} %: the network does not seem to learn. "
            "Check the labels and the weights of the loss terms, or lower the learning rate.",
        )
    best = max(r["train_top1"] for r in run.now.position.history if r["stage"] == row["stage"])
    if best > 2 * chance and row["train_top1"] < _COLLAPSE * best:
        yield (
            "collapse",
            f"ends with a training accuracy of {row['train_top1']:.3g} %, after {best:.3g} % in an "
            "earlier epoch. If it does not recover, lower the learning rate.",
        )


def _table_row(cells: Mapping[str, str]) -> str:
    return "".join(f"{text:>{_WIDTHS[name]}}" for name, text in cells.items()).rstrip()

"""Everything that a run writes and shows while it trains: the loop says what happened, no more."""

import math
import os
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from ipwd_jax import evaluate, parallel, writers
from ipwd_jax.seed_run import SeedRun

# The effective sample size, as a share of the samples, below which a run warns.
_FEW = 0.1


class Recorder:
    """Writes `metrics.csv`, TensorBoard, `predictions.npz`, `result.json`, and progress lines."""

    def __init__(self, run: SeedRun) -> None:
        self.run = run
        self._line = writers.ProgressLine()
        folder = run.workdir / "tensorboard"
        self._tensorboard = SummaryWriter(str(folder), purge_step=run.number() + 1)
        self._warned = False
        self.start()

    def start(self) -> None:
        """Counts the time from now on, and the steps that it is spent on."""
        self._started, self._first_number = time.monotonic(), self.run.number()
        self._seconds_before = self.run.now.position.seconds
        self._compile_seconds, self._compile_steps = 0.0, 0

    def compiled(self, seconds: float, steps: int) -> None:
        """Leaves a call that was compiled first out of the estimate of the time left."""
        self._compile_seconds += seconds
        self._compile_steps += steps

    def saves(self) -> None:
        """Notes the time that was spent, before a checkpoint is taken."""
        self.run.now.position.seconds = self._seconds_before + time.monotonic() - self._started

    def show(self, speed: float, row: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Shows where the run is, and its `row` at the end of an epoch, whose line stays."""
        run, position = self.run, self.run.now.position
        experiment, averages, stage = run.experiment, run.averages(), run.stage
        steps = experiment.steps_per_epoch
        losses = " ".join(f"{name} {averages[name]:.3f}" for name in ("loss", *stage.terms))
        text = f"seed {run.seed} " if len(experiment.config.seeds) > 1 else ""
        text += (
            f"epoch {math.ceil(position.step / steps)}/{stage.epochs} "
            f"step {(position.step - 1) % steps + 1}/{steps}  "
            f"{losses}  train top1 {100 * averages['top1']:.2f}"
        )
        text += f"  test top1 {row['test_top1']:.2f}" if "test_top1" in row else ""
        if "weight_max" in row:
            share = 100 * row["weight_effective_sample_size"]
            text += f"  weights up to {row['weight_max']:.3g}, effective {share:.0f} %"
        text += "" if math.isnan(speed) else f"  {speed:,.0f} images/s"
        self._line.show(f"{text}  {self._time_left()} left", final=position.step % steps == 0)

    def _time_left(self) -> str:
        number = self.run.number()
        done = max(1, number - self._first_number - self._compile_steps)
        seconds = time.monotonic() - self._started - self._compile_seconds
        return writers.duration(seconds / done * (self.run.experiment.total_steps - number))

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Writes and shows the metrics of an epoch."""
        writers.write_csv(self.run.workdir / "metrics.csv", self.run.now.position.history)
        for name, value in row.items():
            if name not in ("stage", "step") and math.isfinite(value):
                self._tensorboard.add_scalar(name, value, row["step"])
        self._tensorboard.flush()
        self.show(row["images_per_second"], row)
        share = row.get("weight_effective_sample_size")
        if share is not None and share < _FEW and not self._warned:
            self._warned = True
            print(
                f"warning: epoch {row['epoch']} has an effective sample size of "
                f"{100 * share:.1f} % (largest weight "
                f"{row['weight_max']:.3g}, mean {row['weight_mean']:.3g}): few samples decide the "
                "weighted loss. Limit their weights with --config.weighting.clip, or average them "
                "with --config.weighting.average.",
                file=sys.stderr,
                flush=True,
            )

    def finish(self) -> dict[str, Any]:
        """Writes predictions and `result.json` of a run that is trained; returns the latter."""
        run, position = self.run, self.run.now.position
        experiment = run.experiment
        last_logits, last = run.test_scores(run.now.state.network())
        best_logits, best = run.test_scores(run.now.best)
        labels = experiment.dataset.test.labels
        teacher = experiment.teacher
        writers.write_npz(
            run.workdir / "predictions.npz",
            last_logits=last_logits,
            best_logits=best_logits,
            labels=labels,
            **({"teacher_logits": teacher.test_logits} if teacher else {}),
        )
        if samples := run.samples():
            writers.write_npz(run.workdir / "samples.npz", **samples)
        speeds = [row["images_per_second"] for row in position.history]
        speeds = [speed for speed in speeds if not math.isnan(speed)]
        result: dict[str, Any] = {
            "name": experiment.config.name,
            "data": experiment.dataset.name,
            "network": experiment.config.model.name,
            "parameters": sum(x.size for x in jax.tree.leaves(run.now.state.params["student"])),
            "seed": run.seed,
            "last": {"epoch": experiment.stages[-1].epochs, **last},
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
        """Ends the threads that write."""
        self._tensorboard.close()

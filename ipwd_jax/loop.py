"""The loop over stages, epochs and calls of the compiled step."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence

import jax

from ipwd_jax import device_memory, parallel
from ipwd_jax.data.resident import Resident, resident
from ipwd_jax.errors import Interrupted
from ipwd_jax.recorder import Recorder


class Loop:
    """The training of the runs of one or more seeds of an experiment, in one compiled program.

    They share the data and the teacher, and give the same numbers as if each were trained alone.

    Attributes:
        recorders: the recorder of each seed's run; all runs are at the same step.
        runs: these runs.
    """

    def __init__(self, recorders: Sequence[Recorder], stopped_by: list[int]) -> None:
        """The signal handlers append to `stopped_by` the signals that ask the loop to stop."""
        self.recorders, self.stopped_by = recorders, stopped_by
        self.runs = [recorder.run for recorder in recorders]
        self.experiment = self.runs[0].experiment
        self._saved_at = time.monotonic()
        self._compiled: set[int] = set()  # lengths in steps of the calls that are compiled

    def train(self, until: int | None = None) -> None:
        """Train all stages, and save.

        Args:
            until: number of steps, over all stages, after which to stop; None stands for the end of
                the run.

        Raises:
            UserError: the training diverged, needs too much memory, or could not be saved.
            Interrupted: a signal arrived, and the runs have been saved.
        """
        experiment, position = self.experiment, self.runs[0].now.position
        data = parallel.replicate(resident(experiment.dataset, experiment.dataset.train))
        for recorder in self.recorders:
            recorder.start()
        for index in range(position.stage, len(experiment.stages)):
            stage = experiment.stages[index]
            end = stage.epochs * experiment.steps_per_epoch
            end = end if until is None else min(end, until - stage.first_step)
            if end <= 0:
                break
            if index != position.stage:
                for run in self.runs:
                    run.begin(index)
            train_step, self._compiled = experiment.train_step(index), set()
            # The first recorder decides, because `config.patience` excludes several seeds.
            while position.step < end and not self.recorders[0].stops_early():
                speed = self._train_epoch(train_step, data, end)
                if position.step % experiment.steps_per_epoch == 0:
                    for run, recorder in zip(self.runs, self.recorders, strict=True):
                        recorder.end_epoch(run.end_epoch(speed))
                    if self._must_save():
                        self._save()
        self._save()
        for run in self.runs:
            run.checkpoints.wait()

    def _train_epoch(self, train_step: Callable, data: Resident, end: int) -> float:
        """Take the remaining steps of this epoch up to `end`, and return images/s over all runs."""
        steps, position = self.experiment.steps_per_epoch, self.runs[0].now.position
        epoch, begin = divmod(position.step, steps)
        end = min(end - epoch * steps, steps)
        images, started = 0, time.monotonic()
        with contextlib.ExitStack() as stack:
            batches = (self.experiment.batches(r.seed, epoch, begin, end) for r in self.runs)
            feeds = [stack.enter_context(contextlib.closing(feed)) for feed in batches]
            for rows in zip(*feeds, strict=True):
                seconds, count = self._call(train_step, data, rows)
                started, images = started + seconds, images + count
                begin += len(rows[0][0])
                if begin < steps:  # `train` saves the end of the epoch, after writing its row
                    self._between_calls(begin, len(rows[0][0]), images, started)
        for run in self.runs:
            run.averages()  # waits for the last step
        return _speed(images, started)

    def _call(self, train_step: Callable, data: Resident, rows: tuple) -> tuple[float, int]:
        """Take the steps of one call.

        Returns:
            The seconds and 0 if the call was compiled first; otherwise 0 and its number of images.
        """
        index, mask, streamed = zip(*rows, strict=True)
        teacher, steps = self.experiment.teacher, len(index[0])
        states = tuple(run.now.state for run in self.runs)
        arguments = states, data, teacher.inputs if teacher else {}, index, mask, streamed
        compiles = steps not in self._compiled
        if compiles:
            self.recorders[0].compiles()
            jax.block_until_ready(states)
            before = time.monotonic()
            device_memory.check(train_step, *arguments)
        states = train_step(*arguments)
        for run, state in zip(self.runs, states, strict=True):
            run.now.state = state
            run.now.position.step += steps
        if not compiles:
            return 0.0, len(self.runs) * self.runs[0].images_of_last(steps)
        jax.block_until_ready(states)
        self._compiled.add(steps)
        seconds = time.monotonic() - before
        for recorder in self.recorders:
            recorder.compiled(seconds, steps)
        return seconds, 0

    def _between_calls(self, step: int, taken: int, images: int, started: float) -> None:
        every = self.experiment.config.log_every_steps
        shows = step // every > (step - taken) // every
        if shows:
            jax.block_until_ready(self.runs[0].now.state)
            self.recorders[0].show(_speed(images, started))
        # Several processes wait for each other to decide, so they do it where they wait anyway.
        if (shows or parallel.process_count() == 1) and self._must_save():
            self._save()

    def _must_save(self) -> bool:
        """Return whether to save now, because it is time or a signal has come to any process."""
        every = self.experiment.config.checkpoint.every_seconds
        is_due = time.monotonic() - self._saved_at >= every
        return bool(parallel.largest(bool(self.stopped_by) or is_due))

    def _save(self) -> None:
        """Save the runs, and raise `Interrupted` if a signal asked the loop to stop."""
        for run, recorder in zip(self.runs, self.recorders, strict=True):
            recorder.saves()
            run.save()
        self._saved_at = time.monotonic()
        if signum := parallel.largest(self.stopped_by[0] if self.stopped_by else 0):
            for run in self.runs:
                run.checkpoints.wait()
            raise Interrupted(signum)


def _speed(images: int, started: float) -> float:
    """Return images per second, or NaN if no image was counted because every call was compiled."""
    return images / (time.monotonic() - started) if images else math.nan

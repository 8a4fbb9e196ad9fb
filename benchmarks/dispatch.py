"""Measure Python's share of a training step: when its call returns, and when the step has ended.

    python benchmarks/dispatch.py [STEPS]

Trains resnet8 on the digits with IPWD and a resnet20 teacher, one step at a time. Prints one JSON
line with the quartiles of three times in microseconds: `empty_us`, for a program that is called
with the same arrays and does almost nothing; `call_us`, until the call of the step returns; and
`step_us`, until the result of that call is ready.
"""

import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ipwd_jax import config as config_lib
from ipwd_jax import data as data_lib
from ipwd_jax import models, parallel
from ipwd_jax.assemble import Experiment, assemble
from ipwd_jax.data.resident import resident
from ipwd_jax.teacher import from_variables

WARM_UP = 20


def make_experiment() -> Experiment:
    """Return the experiment that is timed; its teacher is untrained."""
    config = config_lib.default()
    config.data.update({"name": "digits", "crop_padding": 1, "flip": False})
    config.loss.update({"ce": 0.1, "kd": 0.9, "cls": 1.0})
    config.weighting.name, config.steps_per_call = "ipwd", 1
    config.model.name, config.teacher.name = "resnet8", "resnet20"
    dataset = data_lib.load(config.data)
    shape = dataset.train.images.shape[1:]
    network = models.create("resnet20", len(dataset.class_names))
    variables = network.init(jax.random.key(1), np.zeros((1, *shape), np.float32))
    return assemble(config, dataset, from_variables(config, variables, dataset))


def timed(
    step: Callable, states: tuple, fixed: tuple, calls: Sequence[tuple], steps: int
) -> tuple[list[float], list[float]]:
    """Return each warm step's seconds until its call returns, and until its result is ready."""
    returned, ended = [], []
    for rows in itertools.islice(itertools.cycle(calls), WARM_UP + steps):
        started = time.perf_counter()
        states = step(states, *fixed, *rows)
        returned.append(time.perf_counter() - started)
        jax.block_until_ready(states)
        ended.append(time.perf_counter() - started)
    return returned[WARM_UP:], ended[WARM_UP:]


def main(steps: int) -> None:
    """Time both programs and print the JSON line."""
    experiment = make_experiment()
    dataset, teacher = experiment.dataset, experiment.teacher
    fixed = parallel.replicate(resident(dataset, dataset.train)), teacher.inputs
    calls = [tuple((x,) for x in rows) for rows in experiment.batches(seed=0, epoch=0)]
    states = (parallel.replicate(experiment.begin(0, experiment.initial_state(seed=0))),)
    leaves = len(jax.tree.leaves((states, fixed)))
    # The same arrays, passed to a program that does almost nothing, show what a call itself costs.
    nothing = parallel.compile_train_step(
        lambda states, *_: tuple(state.replace(step=state.step + 1) for state in states)
    )
    idle = parallel.replicate(jax.tree.map(lambda x: x.copy(), states))
    _, empty = timed(nothing, idle, fixed, calls[:1], steps)
    returned, ended = timed(experiment.train_step(0), states, fixed, calls, steps)
    quartiles = {
        name: [round(1e6 * q) for q in statistics.quantiles(times, n=4)]
        for name, times in {"empty_us": empty, "call_us": returned, "step_us": ended}.items()
    }
    line = {
        **quartiles,
        "arrays": leaves,
        "steps": steps,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)

"""Python's share of a training step: how long the call takes to return, and the step to end.

    python benchmarks/dispatch.py [STEPS]

Trains resnet8 with a resnet20 teacher and IPWD on the digits, one step at a time, and prints one
JSON line of quartiles in microseconds: a call of a program that does nothing with the same arrays,
the call of the step until it returns, and until its result is there.
"""

import json
import platform
import statistics
import sys
import time

import jax
import numpy as np

from ipwd_jax import config as config_lib
from ipwd_jax import data as data_lib
from ipwd_jax import losses, models, optim, parallel, state, step
from ipwd_jax.data import augment
from ipwd_jax.data.resident import resident
from ipwd_jax.models.heads import Heads


def main(steps: int) -> None:
    config = config_lib.default()
    config.data.update({"name": "digits", "crop_padding": 1, "flip": False})
    config.loss.update({"ce": 0.1, "kd": 0.9, "cls": 1.0})
    config.weighting.name = "ipwd"
    dataset = data_lib.load(config.data)
    size, *shape = dataset.train.images.shape
    network, teacher = models.create("resnet8", 10, parallel.AXIS), models.create("resnet20", 10)
    (stage,) = config_lib.stages(config)
    terms = losses.create(stage.loss, config.terms, {"axis_name": parallel.AXIS})
    heads = Heads(10, {"cls": "backbone"})
    per_epoch = -(-size // config.batch_size)
    sgd = optim.sgd(stage.optimizer, optim.schedule(stage.optimizer, per_epoch, stage.epochs))
    now = state.init_state(0, network, heads, terms, teacher, config.weighting, tuple(shape), size)
    now = parallel.replicate(state.begin_stage(now, sgd, step.metric_names(terms)))
    answers = parallel.replicate(teacher.init(jax.random.key(1), np.zeros((1, *shape), np.float32)))
    data = parallel.replicate(resident(dataset, dataset.train))
    train_step = parallel.compile_train_step(
        step.make_train_step(
            config, stage, network, heads, terms,
            lambda variables, images, _: teacher.apply(variables, images), sgd,
            optim.trainable_mask(now.params, ()), per_epoch,
        )
    )  # fmt: skip
    index, mask = augment.epoch_batches(
        np.arange(size, dtype=np.int32), config.batch_size, parallel.device_count()
    )
    # The same arrays through a program that does nothing: what a call costs beside its program.
    nothing = parallel.compile_train_step(lambda state, *_: state.replace(step=state.step + 1))
    idle = parallel.replicate(jax.tree.map(lambda x: x.copy(), now))
    empty = []
    for _ in range(steps + 20):
        started = time.perf_counter()
        idle = nothing(idle, data, answers, index[:1], mask[:1], None)
        jax.block_until_ready(idle.step)
        empty.append(time.perf_counter() - started)
    returned, ended = [], []
    for i in range(steps + 20):
        started = time.perf_counter()
        rows = slice(i % len(index), i % len(index) + 1)
        now = train_step(now, data, answers, index[rows], mask[rows], None)
        returned.append(time.perf_counter() - started)
        jax.block_until_ready(now)
        ended.append(time.perf_counter() - started)
    quartiles = {
        name: [round(1e6 * q) for q in statistics.quantiles(times[20:], n=4)]
        for name, times in {
            "empty_us": empty,
            "call_us": returned,
            "step_us": ended,
        }.items()
    }
    leaves = len(jax.tree.leaves((now, data, answers)))
    print(
        json.dumps(
            {
                **quartiles,
                "arrays": leaves,
                "steps": steps,
                "jax": jax.__version__,
                "device": jax.devices()[0].device_kind,
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)

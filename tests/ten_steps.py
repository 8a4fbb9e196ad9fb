"""Take ten steps on random images, on each number of devices; `test_parallel.py` runs this program.

Usage: ten_steps.py OUT_DIR '[1, 2, 4, 8]' ipwd|relational|maps|views NETWORK
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import helpers  # noqa: F401  registers "tiny_net"
import jax
import numpy as np
from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import parallel
from ipwd_jax.assemble import assemble
from ipwd_jax.data.base import Dataset, Split
from ipwd_jax.data.resident import resident
from ipwd_jax.state import TrainState
from ipwd_jax.teacher import from_variables

SIZE, BATCH, CLASSES = 44, 16, 5  # steps of 16, 16 and 12 rows; 12 divides by 4, not by 8


def settings(kind: str, network: str) -> ConfigDict:
    config = config_lib.default()
    config.data.crop_padding = 1
    config.epochs, config.batch_size = 4, BATCH
    config.teacher.name = config.model.name = network
    if kind == "ipwd":
        config.loss.update({"ce": 0.1, "kd": 0.9, "cls": 1.0})
        config.weighting.update({"name": "ipwd", "batch_normalize": True, "average": 0.5})
    elif kind == "maps":  # terms of maps and classifiers, some of which normalise over all rows
        names = ("srrl", "cat_kd", "sdd", "wkd_l", "wkd_f")
        config.loss.update(dict.fromkeys(names, 0.1))
    elif kind == "views":  # terms that compare two views of each image
        config.loss.update({"mlkd": 0.1, "crld": 0.1})
    else:  # terms that compare or remember rows of different devices, or normalise over them
        names = ("crd", "sp", "cc", "rkd", "pkt", "sskd", "pskd", "fitnet", "dist", "uskd", "ctkd")
        config.loss.update(dict.fromkeys(names, 0.1))
        config.terms.crd.update({"feat_dim": 8, "negatives": 6})
        config.terms.fitnet.layer = 1
    return config


def ten_steps(config: ConfigDict, steps: int = 10) -> TrainState:
    """Return the state after `steps` steps on the devices of `parallel.devices`."""
    rng = np.random.default_rng(0)
    split = Split(
        rng.integers(0, 256, (SIZE, 8, 8, 3), np.uint8),
        rng.integers(0, CLASSES, SIZE).astype(np.int32),
    )
    mean, std = np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32)
    names = tuple(map(str, range(CLASSES)))
    dataset = Dataset("noise", split, split, names, mean, std)
    experiment = assemble(config, dataset, None)
    now = experiment.initial_state(seed=0)
    if jax.config.jax_enable_x64:
        floats = (now.params, now.batch_stats, now.memory)
        floats = jax.tree.map(lambda x: x.astype("float64"), floats)
        now = now.replace(params=floats[0], batch_stats=floats[1], memory=floats[2])
    variables = jax.tree.map(lambda x: x * 1.01, now.network())
    teacher = from_variables(config, variables, dataset)
    experiment = dataclasses.replace(experiment, teacher=teacher)
    now = parallel.replicate(experiment.begin(0, now))
    data = parallel.replicate(resident(dataset, split))
    train_step, taken = experiment.train_step(0), 0
    for epoch in range(math.ceil(steps / experiment.steps_per_epoch)):
        end = min(steps - taken, experiment.steps_per_epoch)
        for index, mask, _ in experiment.batches(0, epoch, end=end):
            (now,) = train_step((now,), data, teacher.inputs, (index,), (mask,), (None,))
            taken += 1
    return now


def main(out: Path, counts: list[int], kind: str, network: str) -> None:
    for count in counts:
        parallel.devices = lambda count=count: jax.local_devices()[:count]
        now = jax.device_get(ten_steps(settings(kind, network)).replace(key=0))
        leaves = jax.tree_util.tree_leaves_with_path(now)
        np.savez(out / f"{count}.npz", **{jax.tree_util.keystr(p): x for p, x in leaves})


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), *sys.argv[3:])

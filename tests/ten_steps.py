"""Ten steps on made-up images, on each number of devices; run by test_parallel.

Usage: ten_steps.py OUT_DIR '[1, 2, 4, 8]' ipwd|relational
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import losses, models, optim, parallel, state, step
from ipwd_jax.data import augment
from ipwd_jax.data.resident import Resident
from ipwd_jax.models.heads import Heads

SIZE, BATCH, CLASSES = 44, 16, 5  # steps of 16, 16 and 12 rows: the last divides by 4, not by 8


def settings(kind: str) -> ConfigDict:
    config = config_lib.default()
    config.data.crop_padding = 1
    config.batch_size = BATCH
    config.teacher.name = config.model.name = "resnet8"
    if kind == "ipwd":
        config.loss.update({"ce": 0.1, "kd": 0.9, "cls": 1.0})
        config.weighting.update({"name": "ipwd", "batch_normalize": True, "average": 0.5})
    else:  # terms that compare rows of different devices, remember them, or normalise over them
        names = ("crd", "sp", "cc", "rkd", "pkt", "sskd", "pskd", "fitnet")
        config.loss.update(dict.fromkeys(names, 0.1))
        config.terms.crd.update({"feat_dim": 8, "negatives": 6})
    return config


def ten_steps(config: ConfigDict, steps: int = 10) -> state.TrainState:
    """The state after ten steps on the devices of `parallel.devices`."""
    rng = np.random.default_rng(0)
    data = Resident(
        images=rng.integers(0, 256, (SIZE, 8, 8, 3), np.uint8),
        labels=rng.integers(0, CLASSES, SIZE).astype(np.int32),
        mean=np.full(3, 0.5, np.float32),
        std=np.full(3, 0.25, np.float32),
    )
    axis_name = parallel.AXIS if config.sync_batch_norm else None
    network = models.create(config.model.name, CLASSES, axis_name)
    teacher = models.create(config.teacher.name, CLASSES)
    (stage,) = config_lib.stages(config)
    steps_per_epoch = -(-SIZE // BATCH)
    of_run = {"axis_name": parallel.AXIS, "train_size": SIZE, "epochs": 4}
    terms = losses.create(stage.loss, config.terms, of_run)
    heads = Heads(CLASSES, {"cls": "backbone"} if config.loss.cls else {})
    sgd = optim.sgd(stage.optimizer, optim.schedule(stage.optimizer, steps_per_epoch, 4))
    now = state.init_state(0, network, heads, terms, teacher, config.weighting, (8, 8, 3), SIZE)
    if jax.config.jax_enable_x64:
        floats = (now.params, now.batch_stats, now.memory)
        floats = jax.tree.map(lambda x: x.astype("float64"), floats)
        now = now.replace(params=floats[0], batch_stats=floats[1], memory=floats[2])
    teacher_variables = parallel.replicate(jax.tree.map(lambda x: x * 1.01, now.network()))
    now = parallel.replicate(state.begin_stage(now, sgd, step.metric_names(terms)))
    data = parallel.replicate(data)
    train_step = parallel.compile_train_step(
        step.make_train_step(
            config, stage, network, heads, terms,
            lambda variables, images, _: teacher.apply(variables, images), sgd,
            optim.trainable_mask(now.params, ()), steps_per_epoch,
        )
    )  # fmt: skip
    for i in range(steps):
        epoch, row = divmod(i, steps_per_epoch)
        order = augment.epoch_order(state.order_key(jax.random.key(0)), epoch, SIZE)
        index, mask = augment.epoch_batches(order, BATCH, parallel.device_count())
        now = train_step(
            now, data, teacher_variables, index[row : row + 1], mask[row : row + 1], None
        )
    return now


def main(out: Path, counts: list[int], kind: str) -> None:
    for count in counts:
        parallel.devices = lambda count=count: jax.local_devices()[:count]
        now = jax.device_get(ten_steps(settings(kind)).replace(key=0))
        leaves = jax.tree_util.tree_leaves_with_path(now)
        np.savez(out / f"{count}.npz", **{jax.tree_util.keystr(p): x for p, x in leaves})


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])

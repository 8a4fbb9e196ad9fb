"""Train a tiny network in combinations of circumstances; `test_matrix.py` runs this program.

Usage: matrix.py OUT_DIR METHOD '[[devices, seeds, streamed, stages, stopped], ...]'

Writes `OUT_DIR/COMBINATION_seedS.npz` with the logits of the last and of the best epoch.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from helpers import stopped_after
from ml_collections import ConfigDict
from PIL import Image

from ipwd_jax import checkpoint, data, models, parallel, state, train
from ipwd_jax import config as config_lib
from ipwd_jax import teacher as teacher_lib
from ipwd_jax.data import streaming
from ipwd_jax.state import TrainState, begin_stage, network_shapes

# METHOD -> loss weights, and other settings. With two stages, one epoch with the same loss comes
# first, except for `ft_ipwd`, whose first stage trains its paraphraser.
METHODS = {
    "ce": ({"ce": 1.0}, {}),
    "ipwd": ({"ce": 0.1, "kd": 0.9, "cls": 1.0}, {"weighting.name": "ipwd"}),
    "ft_ipwd": (
        {"ce": 1.0, "ft": 20.0, "cls": 1.0},
        {"weighting.name": "ipwd", "weighting.terms": ("ft",)},
    ),
    "ipwd_cached": (
        {"ce": 0.1, "kd": 0.9, "cls": 1.0},
        {"weighting.name": "ipwd", "teacher.view_cache": "drawn"},
    ),
    "crd": ({"ce": 1.0, "crd": 0.8}, {}),
    "pskd": ({"ce": 0.0, "pskd": 1.0}, {}),
}
# More methods, which are compared only between numbers of devices. The last one's learning rate is
# so small that the parameters do not change.
BATCH_NORMS = {
    "teacher_in_training": ({"ce": 0.1, "kd": 0.9}, {"teacher.train_mode": True}),
    "unsynced_at_rest": (
        {"ce": 1.0},
        {"sync_batch_norm": False, "optimizer.learning_rate": 1e-30},
    ),
}
_WIDE = {np.dtype("int32"): "int64", np.dtype("float64"): "float64"}
# The images make steps of 16, 16 and 8 rows. In the last, four of eight devices have only padding.
IMAGES, CLASSES = 40, 4


def images(root: Path) -> None:
    """Write PNG files of four classes in a training and a test split."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES // CLASSES), ("test", 5)):
        for label in range(CLASSES):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (8, 8, 3)) + 40 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


def teacher(workdir: Path) -> Path:
    """Write the finished run of a teacher that was never trained."""
    variables = models.create("tiny_net", CLASSES).init(jax.random.key(9), jnp.zeros((1, 8, 8, 3)))
    variables = jax.tree.map(lambda x: 3 * x, variables)
    workdir.mkdir()
    checkpoint.save_network(workdir, variables)
    (workdir / "config.json").write_text(json.dumps({"config": {}, "checksums": {}}))
    (workdir / "result.json").write_text("{}")
    return workdir


def settings(method: str, out: Path, seeds: tuple[int, ...], stages: int) -> ConfigDict:
    config = config_lib.default()
    loss, others = {**METHODS, **BATCH_NORMS}[method]
    config.model.name = "tiny_net"
    config.data.update(
        {"name": f"folder:{out / 'images'}", "streaming": True, "image_size": 8}
        | {"crop_padding": 0, "flip": False}
    )
    config.epochs, config.batch_size, config.seeds = 2, 16, seeds
    config.optimizer.milestones = (1,)
    # The cache rounds answers to float32. Without it, streamed images and those in memory give
    # equal results.
    config.teacher.view_cache = "off"
    config.loss.update(loss)
    config.update_from_flattened_dict(others)
    config.terms.crd.update({"feat_dim": 4, "negatives": 6})
    if {"kd", "ft", "crd"} & loss.keys():
        config.teacher.name, config.teacher.workdir = "tiny_net", str(out / "teacher")
    if stages == 2:
        config.first_stage.epochs = 1
        config.first_stage.loss.update(loss)
        config.first_stage.optimizer.milestones = ()
        if method == "ft_ipwd":
            config.first_stage.loss.update({"ce": 0.0, "cls": 0.0})
            config.first_stage.trainable = ("terms/ft/paraphraser",)
    return config


def in_memory(dataset: data.Dataset) -> data.Dataset:
    """Return a data set of the same images, decoded in memory."""
    arrays = []
    for split in (dataset.train, dataset.test):
        index = np.arange(len(split.labels)).reshape(1, -1)
        arrays += [next(split.images.batches(index, 0, 0, train=False)), split.labels]
    names = {"name": dataset.name, "class_names": dataset.class_names}
    return data.from_arrays(*arrays, **names, mean=dataset.mean, std=dataset.std)


def in_float64(function: Callable) -> Callable:
    """Wrap `function` to return its floats in float64, so that rounding hides no errors."""

    def cast(x: Any) -> Any:
        return x.astype("float64") if getattr(x, "dtype", None) == jnp.float32 else x

    return lambda *args, **keys: jax.tree.map(cast, function(*args, **keys))


def begin_in_64_bits(*args, **keys) -> TrainState:
    """Return `begin_stage`'s state with the types that the sums of an epoch have after a step."""
    begun = in_float64(begin_stage)(*args, **keys)
    return begun.replace(metrics=jax.tree.map(lambda x: x.astype(_WIDE[x.dtype]), begun.metrics))


def one(out: Path, method: str, devices: int, seeds: list[int], streamed, stages, stopped) -> None:
    parallel.devices = lambda: jax.local_devices()[:devices]
    config = settings(method, out, tuple(seeds) if len(seeds) > 1 else (), stages)
    if len(seeds) == 1:
        (config.seed,) = seeds
    name = "_".join(map(str, (devices, len(seeds), int(streamed), stages, int(stopped))))
    workdir = out / (name if len(seeds) > 1 else f"{name}_seed{seeds[0]}")
    dataset = data.load(config.data)
    if not streamed:
        config.data.streaming, dataset = False, in_memory(dataset)
    wide = {"mean": dataset.mean.astype("float64"), "std": dataset.std.astype("float64")}
    dataset = dataclasses.replace(dataset, **wide)  # so that images are normalised in float64
    if stopped:
        config.checkpoint.every_seconds = 0.0
        for saves in (2, 3):  # within an epoch, and after the first epoch
            with stopped_after(saves):
                train.run(config, workdir, dataset)
    train.run(config, workdir, dataset)
    for seed in seeds:
        left = np.load(out / f"{name}_seed{seed}" / "predictions.npz")
        template = network_shapes(models.create("tiny_net", CLASSES), (8, 8, 3))
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float64"), template)
        network, _ = checkpoint.load_network(out / f"{name}_seed{seed}", "last", template)
        of_layer = network["batch_stats"]["bn0"]
        running = {f"running_{key}": of_layer[key] for key in ("mean", "var")}
        np.savez(out / f"{name}_seed{seed}.npz", **left, **running)
    jax.clear_caches()


def main(out: Path, method: str, combinations: list[list]) -> None:
    images(out / "images")
    teacher(out / "teacher")
    plain = streaming.batches
    with (
        mock.patch.object(state, "init_state", in_float64(state.init_state)),
        mock.patch.object(state, "begin_stage", begin_in_64_bits),
        mock.patch.object(teacher_lib, "load_network", in_float64(teacher_lib.load_network)),
        # Without random crops, streamed images equal those in memory.
        mock.patch.object(
            streaming, "batches", lambda *args, **keys: plain(*args, **{**keys, "train": False})
        ),
    ):
        for devices, seeds, streamed, stages, stopped in combinations:
            one(out, method, devices, seeds, streamed, stages, stopped)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))

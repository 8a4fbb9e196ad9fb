"""Helpers of many test files: golden values, a tiny network, and small runs that train it.

The golden values are the results of the public PyTorch implementations, with a recipe that
regenerates their inputs. They are in `tests/golden`, or in the folder that the environment variable
IPWD_GOLDEN names.
"""

import contextlib
import csv
import functools
import importlib.util
import json
import os
from collections.abc import Iterator
from operator import getitem
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import data, models
from ipwd_jax.errors import Interrupted
from ipwd_jax.loop import Loop
from ipwd_jax.models.base import BatchNorm, Conv, Linear, Outputs, pool_and_classify, relu

ROOT = Path(__file__).parents[1]
_OWN = Path(__file__).parent / "golden"


def golden_dir() -> Path:
    """Return the folder that the golden values are read from."""
    return Path(os.environ.get("IPWD_GOLDEN", _OWN))


@functools.cache
def golden_json(name: str) -> dict[str, Any]:
    """Return the contents of `name`, a JSON file of that folder."""
    return json.loads((golden_dir() / name).read_text())


@functools.cache
def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of `name`, an npz file of that folder."""
    with np.load(golden_dir() / name) as file:
        return dict(file)


@functools.cache
def recipe() -> ModuleType:
    """Return `recipe.py` of that folder, or else ours; it regenerates the inputs from names."""
    path = golden_dir() / "recipe.py"
    return module_of(path if path.exists() else _OWN / path.name)


def module_of(path: Path) -> ModuleType:
    """Import a file that is not on the import path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tiny(nn.Module):
    """A network of two convolutions with BatchNorm and a linear layer, which compiles quickly."""

    classes: int
    axis_name: str | None = None
    smallest_image = 4
    head_modules = ("fc",)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> Outputs:
        features, preact = [], []
        for i, (width, stride) in enumerate(((4, 1), (6, 2))):
            x = Conv(width, 3, stride, name=f"conv{i}")(x)
            x = BatchNorm(train=train, axis_name=self.axis_name, name=f"bn{i}")(x, mask)
            preact.append(x)
            features.append(x := relu(x))
        classifier = Linear(self.classes, name="fc")
        return pool_and_classify(x, classifier, tuple(features), tuple(preact))


models.NETWORKS["tiny_net"] = Tiny


def squares() -> data.Dataset:
    """Return two classes of grey noise, one of them brighter.

    The 40 training images make steps of 16, 16 and 8.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    noise = rng.integers(0, 180, (60, 8, 8, 1)) + 60 * labels.reshape(-1, 1, 1, 1)
    images = noise.astype(np.uint8)
    return data.from_arrays(images[:40], labels[:40], images[40:], labels[40:], name="squares")


def settings(**changes: Any) -> ConfigDict:
    """Return the config of two epochs of IPWD with a tiny student and teacher on `squares`.

    Args:
        changes: settings to change, with `__` for the dots in their paths.
    """
    config = config_lib.default()
    config.data.update({"name": "squares", "crop_padding": 1})
    config.model.name = config.teacher.name = "tiny_net"
    config.epochs, config.batch_size = 2, 16
    config.teacher.epochs, config.teacher.batch_size = 1, 16
    config.loss.update({"ce": 0.1, "kd": 0.9, "cls": 1.0})
    config.weighting.name = "ipwd"
    for path, value in changes.items():
        *parents, key = path.split("__")
        functools.reduce(getitem, parents, config)[key] = value
    return config


@contextlib.contextmanager
def stopped_after(saves: int) -> Iterator[None]:
    """Stop a run in the block, as a signal does, right after it has saved this many times."""
    save, count = Loop._save, 0

    def save_and_stop(self: Loop) -> None:
        nonlocal count
        save(self)
        count += 1
        if count == saves:
            for run in self.runs:
                run.checkpoints.wait()
            raise Interrupted(15)

    with mock.patch.object(Loop, "_save", save_and_stop), pytest.raises(Interrupted):
        yield


def rows(workdir: Path) -> list[dict[str, str]]:
    """Return the rows of a run's `metrics.csv`."""
    with (workdir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def config_file(name: str) -> ModuleType:
    """Import `configs/NAME.py`."""
    return module_of(ROOT / "configs" / f"{name}.py")


def teacher_folder(runs: Path, network: str, data: str = "*") -> Path:
    """Return the only folder in `runs`, beside the students, in which a teacher was trained."""
    (found,) = runs.glob(f"{data}_{network}_*_seed0")
    return found

"""Where a teacher's answers come from: a frozen network."""

import dataclasses
import pathlib
import zlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import scipy.special
from ml_collections import ConfigDict

from ipwd_jax import evaluate, models, parallel
from ipwd_jax.checkpoint import load_network
from ipwd_jax.config import teacher_config
from ipwd_jax.data.base import Dataset
from ipwd_jax.data.resident import resident
from ipwd_jax.state import network_shapes


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A network that is asked and never trained.

    Attributes:
        network: its module.
        variables: its parameters and running statistics, on all devices.
        checksum: of `variables`.
        class_mass: (C,) float64, its probabilities summed over the unaugmented training set.
        test_logits: (N_test, C).
    """

    network: nn.Module
    variables: Any
    checksum: str
    class_mass: np.ndarray
    test_logits: np.ndarray


def find_workdir(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Where the teacher's run is: `config.teacher.workdir`, or else beside the student's."""
    if config.teacher.workdir:
        return pathlib.Path(config.teacher.workdir)
    return workdir.parent / f"{teacher_config(config).name}_seed{config.teacher.seed}"


def load(config: ConfigDict, workdir: pathlib.Path, dataset: Dataset) -> Teacher:
    """Reads a trained teacher and asks it about the whole data set.

    Args:
        config: of the student's run.
        workdir: of the teacher's run.
        dataset: of both.

    Raises:
        UserError: the checkpoint is missing, unreadable or of another network.
    """
    network = models.create(config.teacher.name, len(dataset.class_names))
    template = network_shapes(network, dataset.train.images.shape[1:])
    variables, _ = load_network(workdir, config.teacher.which, template)
    predict = evaluate.make_predict(network)

    def ask(split):
        data = parallel.replicate(resident(dataset, split))
        return evaluate.predict_all(predict, variables, data, config.eval_batch_size)

    probabilities = scipy.special.softmax(ask(dataset.train).astype(np.float64), axis=1)
    return Teacher(
        network, variables, checksum(variables), probabilities.sum(axis=0), ask(dataset.test)
    )


def checksum(variables: Any) -> str:
    """CRC-32 over all leaves of a pytree, in order: 8 hexadecimal digits."""
    crc = 0
    for leaf in jax.tree.leaves(jax.device_get(variables)):
        crc = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), crc)
    return f"{crc:08x}"

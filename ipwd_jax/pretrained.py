"""The weights that a student starts with: those of another run, or of a PyTorch checkpoint."""

import pathlib

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ipwd_jax import models
from ipwd_jax.data.base import Dataset
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch.convert import load_variables
from ipwd_jax.state import network_shapes
from ipwd_jax.student import term_with_head


def load(config: ConfigDict, dataset: Dataset) -> dict[tuple[str, ...], np.ndarray] | None:
    """Return the variables that `config.model.pretrained` names, or None if it is empty.

    If they are of a network for another number of classes, those of its classifier are left out, so
    that the student draws its own.

    Args:
        config: config of the student's run.
        dataset: data set of the run.

    Returns:
        The variables of `config.model.name`, float32, by their paths in the collections of the
        network that the run trains.

    Raises:
        UserError: there is neither a run nor a file, it cannot be read, or it holds another network
            or one for images with another number of channels.
    """
    path, name = config.model.pretrained, config.model.name
    if not path:
        return None
    network = models.create(name, len(dataset.class_names))
    wanted = flatten_dict(network_shapes(network, dataset.train.images.shape[1:]))
    found = flatten_dict(jax.device_get(load_variables(pathlib.Path(path).expanduser(), name)))
    wrong = [key for key in wanted if key not in found or found[key].shape != wanted[key].shape]
    if outside := [key for key in wrong if key[1] not in network.head_modules]:
        key = outside[0]
        there = found[key].shape if key in found else "none"
        raise UserError(
            f"config.model.pretrained names {path}, whose {'/'.join(key)} has the shape {there}, "
            f"but {name} needs {wanted[key].shape} for this data; name weights of the same network "
            "for images with the same number of channels"
        )
    if wrong:
        print(f"{path} is for another number of classes; its classifier is not used", flush=True)
    inside = ("backbone",) if term_with_head(config) else ()
    return {(key[0], *inside, *key[1:]): found[key] for key in wanted if key not in wrong}

"""The scores of a finished run on the test set of any data with the same classes."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ipwd_jax import evaluate, parallel, writers
from ipwd_jax.checkpoint import load_network
from ipwd_jax.data.base import Dataset
from ipwd_jax.data.resident import resident
from ipwd_jax.errors import UserError, warn
from ipwd_jax.state import network_shapes
from ipwd_jax.student import network_of


def score_run(config: ConfigDict, workdir: pathlib.Path, dataset: Dataset) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run on a test set, and write `eval.json` beside it.

    A warning says so if the file cannot be written.

    Args:
        config: names the network.
        workdir: work directory of the run.
        dataset: the data; its images are normalised as those of the run were.

    Returns:
        Metrics of the `last` and of the `best` epoch of the main stage; of the former alone if the
        run is not finished and has no best epoch yet.

    Raises:
        UserError: there is no readable checkpoint of this network, or the run has other classes.
    """
    dataset = _normalised_as_in(workdir, dataset)
    image_shape = dataset.train.images.shape[1:]
    network = network_of(config, len(dataset.class_names), image_shape)
    template = network_shapes(network, image_shape)
    predict = evaluate.make_predict(network.apply)
    data = parallel.replicate(resident(dataset, dataset.test))
    result: dict[str, Any] = {
        "data": dataset.name,
        "network": config.model.name,
        "parameters": sum(x.size for x in jax.tree.leaves(template["params"])),
        "seed": config.seed,
    }
    finished = parallel.from_first(lambda: (workdir / "result.json").exists())
    for which in ("last", "best"):
        variables, position = load_network(workdir, which, template)
        size = config.eval_batch_size
        logits = evaluate.predict_all(predict, variables, data, dataset.test, size)
        epochs = {"last": position.epochs_of("main"), "best": position.best_epoch}
        result[which] = {"epoch": epochs[which], **evaluate.score(logits, dataset.test.labels)}
        if not (finished or position.best_epoch):
            break  # there is no best epoch yet
    result = writers.plain(result)
    try:
        writers.write_json(workdir / "eval.json", result)
    except UserError as error:
        warn(error)
    return result


def _normalised_as_in(workdir: pathlib.Path, dataset: Dataset) -> Dataset:
    """Return a data set with the mean and the standard deviation of a run's data.

    Raises:
        UserError: the classes have other names, or another order. Mere numbers, which are the names
            of classes without names, are not compared with names.
    """
    try:
        noted = json.loads((workdir / "config.json").read_text()).get("data")
    except FileNotFoundError:  # that there is no checkpoint either is said later
        noted = None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{workdir / 'config.json'} cannot be read: {error}") from error
    if not noted:  # an imported network
        return dataset
    found, wanted = list(dataset.class_names), noted["class_names"]
    numbers = [str(label) for label in range(len(wanted))]
    unnamed = numbers in (found, wanted) and sorted(found) != sorted(wanted)
    if found != wanted and not unnamed:
        differ = [f"{a!r} is not {b!r}" for a, b in zip(found, wanted, strict=False) if a != b]
        raise UserError(
            f"{workdir} was trained on {len(wanted)} classes, and {dataset.name} has {len(found)}: "
            f"{', '.join([*differ, 'their numbers differ'][:3])}; choose data with the same "
            "classes in the same order"
        )
    mean, std = (np.asarray(noted[key], np.float32) for key in ("mean", "std"))
    return dataclasses.replace(dataset, mean=mean, std=std)

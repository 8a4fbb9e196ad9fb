"""The teacher: where a run finds it, how it is asked, and its logits on the whole data set."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ipwd_jax import class_distances, evaluate, kept, models, parallel, precision, teachers
from ipwd_jax import workdir as workdir_lib
from ipwd_jax.checkpoint import checksum, load_network, newest, saved_arrays
from ipwd_jax.config import teacher_config
from ipwd_jax.data.base import Dataset, Split, fingerprint
from ipwd_jax.data.resident import resident
from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Batch
from ipwd_jax.models.base import Outputs
from ipwd_jax.models.fold import apply_folded, fold
from ipwd_jax.packing import output_first, output_last
from ipwd_jax.pytorch.convert import load_variables
from ipwd_jax.state import network_shapes
from ipwd_jax.typing import Answer, PyTree

_MOST_STREAMED, _MOST_COMPARED = 50_000, 1_000


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network that answers with its outputs and is not trained any further.

    Attributes:
        workdir: work directory of the teacher's run.
        network: the Flax module.
        variables: its parameters and running statistics, on all devices.
        dataset: the data set of the run.
        ask: `ask(inputs, images, mask=None) -> Outputs`, which runs the network within a compiled
            program; `mask` excludes padding rows if the answer depends on the batch (`train_mode`).
        answer: `answer(inputs, images, batch) -> Outputs`, which the step calls; it calls `ask`, or
            looks the answer up.
        inputs: the inputs that `answer` reads, on all devices.
        checksum: checksum of `variables`.
        train_logits: (N, C), the logits of the unaugmented training images; if the images are
            streamed, of at most 50,000 of them.
        test_logits: (N_test, C), the logits of the test images.
        rounding: how far folding and `config.precision` move the logits of at most 1,000 test
            images away from those in float32: `logits_error`, the root mean square of the
            difference divided by that of the logits, and `same_class`, the fraction of images whose
            most probable class is the same. Empty in float32 without folding, and in `train_mode`.
    """

    workdir: pathlib.Path
    network: nn.Module
    variables: PyTree
    dataset: Dataset
    ask: Callable[..., Outputs]
    answer: Answer
    inputs: PyTree
    checksum: str
    train_logits: np.ndarray
    test_logits: np.ndarray
    rounding: Mapping[str, float]

    def class_mass(self, temperature: float = 1.0) -> np.ndarray:
        """Return the probability of each class, summed over `train_logits`, as (C,) float64."""
        logits = self.train_logits.astype(np.float64) / temperature
        return scipy.special.softmax(logits, axis=1).sum(axis=0)

    def train_nll(self) -> np.ndarray | None:
        """Return the cross-entropy of `train_logits` with the labels in nats, as (N,) float64.

        It is None if only some of the training images have logits.
        """
        labels = self.dataset.train.labels
        if len(self.train_logits) != len(labels):
            return None
        log_p = scipy.special.log_softmax(self.train_logits.astype(np.float64), axis=1)
        return -log_p[np.arange(len(labels)), labels]

    def preact_norms(self) -> tuple:
        """Return (gammas, betas) of the BatchNorm that feeds each `preact` after the stem.

        The network must declare in a method `preact_norms` which BatchNorm layers these are.
        """
        params = flatten_dict(jax.device_get(self.variables["params"]))
        return tuple(
            tuple(tuple(params[*path, name].tolist()) for name in ("scale", "bias"))
            for path in self.network.preact_norms()
        )

    def classifier(self) -> tuple[np.ndarray, np.ndarray]:
        """Return kernel (D, C) and bias (C,) of the network's classifier, float32.

        Raises:
            UserError: the network does not return them.
        """
        image = jnp.zeros((1, *self.dataset.train.images.shape[1:]))
        outputs = cast(Outputs, jax.jit(self.network.apply)(self.variables, image))
        if outputs.classifier is None:
            raise UserError(
                "a loss term reads the teacher's classifier, which "
                f"{type(self.network).__name__} does not return; choose another teacher or term"
            )
        kernel, bias = (np.asarray(x) for x in outputs.classifier)
        return kernel, bias

    def class_distances(self, kind: str) -> np.ndarray:
        """Return distances between the classes, (C, C) float32; see `ipwd_jax.class_distances`.

        Args:
            kind: "classifier", of the weights of the network's classifier; or "cka", of its last
                maps. The latter are computed once, and kept beside the teacher's checkpoint.

        Raises:
            UserError: the network does not return its classifier, or the maps cannot be compared.
        """
        if kind == "classifier":
            return class_distances.of_classifier(self.classifier()[0])

        def of_maps() -> np.ndarray:
            return class_distances.of_maps(self.network.apply, self.variables, self.dataset, 500)

        if not (self.workdir / "result.json").exists():  # it is no run, so there is no folder
            return of_maps()
        file = self.workdir / f"class_cka_{self.checksum}_{fingerprint(self.dataset)}.npz"
        return kept.arrays(file, lambda: {"distances": of_maps()})["distances"]


def check_named(config: ConfigDict, may_train: bool) -> None:
    """Raise `UserError` if the teacher that the config names is not there.

    It is missing if `config.teacher.workdir` names a folder without a finished run, or if
    `config.teacher.pretrained` names neither a teacher of the package nor a file.

    Args:
        config: config of the student's run.
        may_train: whether the user has asked to train a missing teacher there.
    """
    if pretrained := config.teacher.pretrained:
        if config.teacher.workdir or not config.teacher.name:
            raise UserError(
                f"config.teacher.pretrained={pretrained} needs config.teacher.name, the network of "
                "this teacher, and an empty config.teacher.workdir; found "
                f"{config.teacher.name!r} and {config.teacher.workdir!r}"
            )
        teachers.check(pretrained, config.teacher.name)
    workdir = pathlib.Path(config.teacher.workdir).expanduser()
    if not (config.teacher.name and config.teacher.workdir) or may_train:
        return
    if not (workdir / "result.json").exists():
        found = "an unfinished run" if (workdir / "config.json").exists() else "no run"
        raise UserError(
            f"config.teacher.workdir names {workdir}, where there is {found}. Train the teacher "
            "there by running the same command with --mode=teacher, or omit the setting to have "
            "the teacher trained beside the student."
        )


def check_data(config: ConfigDict, data: str) -> None:
    """Raise `UserError` if the teacher that the config names is damaged, or is of other data.

    The data of an imported file is unknown and is not checked.

    Args:
        config: config of the student's run.
        data: checksum of its data set, as `fingerprint` returns it.
    """
    pretrained, workdir = config.teacher.pretrained, config.teacher.workdir
    path, noted = pathlib.Path(workdir).expanduser() / "config.json", {}
    if pretrained in teachers.names():
        noted = teachers.about(pretrained)["checksums"]
    elif config.teacher.name and workdir and path.exists():
        try:
            noted = dict(json.loads(path.read_text())["checksums"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}); choose another teacher") from error
    if noted.get("data", data) != data:
        raise UserError(
            f"the teacher {pretrained or workdir} was trained on other data than that of "
            "config.data, or on another part of it; choose a teacher of the same images, or leave "
            "config.teacher.pretrained and config.teacher.workdir empty to train one"
        )


def check_network(config: ConfigDict, dataset: Dataset) -> None:
    """Raise `UserError` if the teacher that the config names has another network or other classes.

    Args:
        config: config of the student's run.
        dataset: data set of the run.
    """
    pretrained, workdir = config.teacher.pretrained, config.teacher.workdir
    file, folder = (pathlib.Path(name).expanduser() for name in (pretrained, workdir))
    if not config.teacher.name:
        return
    network = models.create(config.teacher.name, len(dataset.class_names))
    template = network_shapes(network, dataset.train.images.shape[1:])
    try:
        if workdir and (folder / "result.json").exists():
            saved = saved_arrays(newest(folder) / config.teacher.which)
            found: PyTree = {name: saved[name] for name in template}
        elif file.is_file():
            found = load_variables(file, config.teacher.name)
        else:
            return
    except UserError as error:
        raise UserError(f"the teacher cannot be used: {error}") from error
    wanted, there = (
        {key: x.shape for key, x in flatten_dict(tree).items()} for tree in (template, found)
    )
    if differ := [key for key in wanted if there.get(key) != wanted[key]]:
        raise UserError(
            f"the teacher {pretrained or workdir} is of another network than {config.teacher.name} "
            f"or of another number of classes than {dataset.name}, which has "
            f"{len(dataset.class_names)}: {'/'.join(differ[0])} has the shape "
            f"{there.get(differ[0])}, and {wanted[differ[0]]} is needed; choose another teacher"
        )


def find_workdir(
    config: ConfigDict, workdir: pathlib.Path, data_name: str, checksums: Mapping[str, str]
) -> pathlib.Path | None:
    """Return the folder in which the teacher's run is, or will be; None without a teacher.

    This is `config.teacher.workdir` if it is set. Otherwise it is a folder beside the student's. If
    `config.teacher.pretrained` is set, the folder has this name, or that of the file without its
    suffix. Otherwise it is `DATA_NETWORK_CHECKSUM_seedSEED`, unless that folder does not exist and
    there is a finished run of the same recipe on the same data under any other name. The checksum
    covers the data and the recipe, so that teachers of different data or recipes can be side by
    side.

    Args:
        config: config of the student's run.
        workdir: work directory of the student's run.
        data_name: name of the data set.
        checksums: checksum of the data, under the key `data`.
    """
    if not config.teacher.name:
        return None
    if config.teacher.workdir:
        return pathlib.Path(config.teacher.workdir).expanduser()
    # The parent of "." would be "." itself.
    folder = workdir.parent if workdir.name not in ("", "..") else workdir.resolve().parent
    if config.teacher.pretrained:
        file = pathlib.Path(config.teacher.pretrained).expanduser()
        return folder / _readable(file.stem if file.is_file() else file.name)
    recipe = teacher_config(config)
    identity = workdir_lib.identity(recipe, checksums)
    name = f"{data_name}_{recipe.name}_{identity}_seed{recipe.seed}"
    own = folder / _readable(name)

    def find() -> str:
        if own.exists():
            return str(own)
        beside = sorted(path.parent for path in folder.glob("*/result.json"))
        found = (run for run in beside if workdir_lib.holds(run, recipe, checksums))
        return str(next(found, own))

    return pathlib.Path(parallel.from_first(find))


def _readable(name: str) -> str:
    """Return the name of a folder without characters that `checkpoint.check_path` refuses."""
    return re.sub(r"[/:\[*?]", "-", name)


def load(config: ConfigDict, workdir: pathlib.Path, dataset: Dataset) -> Teacher:
    """Read a trained teacher, and compute its logits on the training and the test images.

    The logits are kept beside its checkpoint, so that its next student need not wait for them.

    Args:
        config: config of the student's run.
        workdir: work directory of the teacher's run.
        dataset: data set of both runs.

    Raises:
        UserError: the checkpoint is missing, unreadable or of another network, or the network has
            diverged.
    """
    network = _network(config, dataset)
    template = network_shapes(network, dataset.train.images.shape[1:])
    variables, _ = load_network(workdir, config.teacher.which, template)
    teacher = from_variables(config, variables, dataset, workdir)
    predict = evaluate.make_predict(network.apply)
    ask = teacher.ask  # JAX keeps `as_in_the_step`, and with it what it refers to

    def logits(split: Split, predict: Callable = predict, inputs: PyTree = variables) -> np.ndarray:
        data = parallel.replicate(resident(dataset, split))
        return evaluate.predict_all(predict, inputs, data, split, config.eval_batch_size)

    def as_in_the_step(inputs: PyTree, images: jax.Array) -> Outputs:
        with precision.of_products(config.precision):
            return precision.at_least_float32(ask(inputs, images))

    def of_both() -> dict[str, np.ndarray]:
        train = dataset.train
        if train.streamed:
            train = train.take(_evenly(train, _MOST_STREAMED))
        return {"train": logits(train), "test": logits(dataset.test)}

    identity = f"{jax.default_backend()}_{teacher.checksum}_{fingerprint(dataset)}"
    exact, rounding = kept.arrays(workdir / f"logits_{identity}.npz", of_both), {}
    if (config.teacher.fold or config.precision != "float32") and not config.teacher.train_mode:
        keep = _evenly(dataset.test, _MOST_COMPARED)
        rounded = evaluate.make_predict(as_in_the_step)
        found = logits(dataset.test.take(keep), rounded, teacher.inputs)
        rounding = compare(found, exact["test"][keep])
    return dataclasses.replace(
        teacher, train_logits=exact["train"], test_logits=exact["test"], rounding=rounding
    )


def from_variables(
    config: ConfigDict,
    variables: PyTree,
    dataset: Dataset,
    workdir: pathlib.Path = pathlib.Path(),
) -> Teacher:
    """Return a teacher that a step can ask, but whose logits on the data set are not computed.

    Args:
        config: config of the student's run.
        variables: variables of the network `config.teacher.name`.
        dataset: data set of the run.
        workdir: work directory of the teacher's run, in which its cached answers are kept.
    """
    network = _network(config, dataset)
    variables = parallel.replicate(variables)
    ask, inputs = _make_ask(config, network, variables, dataset.train.images.shape[1:])

    def answer(inputs: PyTree, images: jax.Array, batch: Batch) -> Outputs:
        outputs = ask(inputs, images, batch.mask)
        if batch.strong_image is None:
            return outputs
        return outputs.with_strong(ask(inputs, batch.strong_image, batch.mask))

    unknown = np.empty((0, len(dataset.class_names)), np.float32)
    crc = checksum(variables)
    return Teacher(
        workdir, network, variables, dataset, ask, answer, inputs, crc, unknown, unknown, {}
    )


def _network(config: ConfigDict, dataset: Dataset) -> nn.Module:
    # In training mode, its batch statistics are computed over the same rows as the student's.
    together = config.teacher.train_mode and config.sync_batch_norm
    axis_name = parallel.AXIS if together else None
    return models.create(config.teacher.name, len(dataset.class_names), axis_name)


def compare(logits: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return `Teacher.rounding` for `logits` (N, C) that approximate the logits `exact`."""
    error = np.sqrt(np.square(logits - exact).mean() / np.square(exact).mean())
    same = logits.argmax(axis=1) == exact.argmax(axis=1)
    return {"logits_error": float(error), "same_class": float(same.mean())}


def _make_ask(
    config: ConfigDict, network: nn.Module, variables: PyTree, image_shape: tuple[int, ...]
) -> tuple[Callable[..., Outputs], PyTree]:
    """Return the function that asks the network within a compiled program, and its inputs."""

    folds, on_cpu = config.teacher.fold, jax.default_backend() == "cpu"

    def prepare(variables: PyTree) -> PyTree:
        """Do once what depends on nothing but the variables."""
        inputs = fold(network, variables, image_shape) if folds else variables
        inputs = precision.cast(config.precision, inputs)
        if folds and config.precision == "bfloat16":  # they are added to maps of this type
            affine = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs["affine"])
            inputs = {**inputs, "affine": affine}
        return inputs if on_cpu else output_first(inputs)

    def ask(inputs: PyTree, images: jax.Array, mask: jax.Array | None = None) -> Outputs:
        inputs = inputs if on_cpu else output_last(inputs)
        images = precision.cast(config.precision, images)
        if folds:
            return apply_folded(network, inputs, images)
        if not config.teacher.train_mode:
            return cast(Outputs, network.apply(inputs, images))
        rows = None if mask is None else jnp.repeat(mask, len(images) // len(mask))
        # No collection is mutable, so the running statistics do not change.
        return cast(Outputs, network.apply(inputs, images, train=True, mask=rows))

    return ask, parallel.replicate(prepare(variables))


def _evenly(split: Split, most: int) -> np.ndarray:
    """Return the positions (M,) int32 of at most `most` images, evenly spaced over the split."""
    return np.linspace(0, len(split.labels) - 1, min(most, len(split.labels))).astype(np.int32)

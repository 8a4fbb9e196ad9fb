"""Optimisers, PyTorch's stochastic gradient descent first of all, and learning-rate schedules."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from ipwd_jax.errors import UserError
from ipwd_jax.typing import PyTree

# The values of `config.optimizer.name`: `sgd` below, and functions of optax.
OPTIMIZERS = (
    "sgd", "adabelief", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad", "lamb",
    "lars", "lion", "nadam", "nadamw", "novograd", "radam", "rmsprop", "yogi",
)  # fmt: skip
# Those that compute the norm of each array of parameters.
_BY_ARRAY = ("lamb", "lars", "novograd")
# The settings that an optimiser has only if its function in optax has an argument of this name.
ARGUMENTS = ("momentum", "nesterov", "b1", "b2", "eps")


def schedule(optimizer: ConfigDict, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Return the learning rate as a function of the step of a stage.

    The schedule `step` multiplies the rate by `decay` when the number of finished epochs reaches
    each of `milestones` (Tian et al., 2020: with a milestone of 150, epochs 1 to 150 have the full
    rate). `cosine` lowers the rate with every step, from the full rate to 0 at the end of the
    stage.

    Args:
        optimizer: a config with `schedule`, `learning_rate`, `milestones` and `decay`.
        steps_per_epoch: number of steps in an epoch.
        epochs: number of epochs in the stage.
    """
    if optimizer.schedule == "cosine":
        return optax.cosine_decay_schedule(optimizer.learning_rate, steps_per_epoch * epochs)
    return optax.piecewise_constant_schedule(
        optimizer.learning_rate,
        {m * steps_per_epoch: optimizer.decay for m in optimizer.milestones},
    )


def sgd(optimizer: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Return `torch.optim.SGD`: g += wd p; v = mu v + g; p -= lr v, or lr (g + mu v) with Nesterov.

    Weight decay applies to every parameter, including biases and those of BatchNorm. The learning
    rate scales the step and not the velocity.
    """
    return optax.chain(
        optax.add_decayed_weights(optimizer.weight_decay),
        optax.trace(optimizer.momentum, optimizer.nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def create(optimizer: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Return the optimiser that `optimizer.name` names.

    `sgd` is the function of that name above; all others are optax's. Where optax's function has no
    weight decay of its own, `weight_decay` times the parameters is added to the gradient, as
    PyTorch's Adam does.

    Args:
        optimizer: a config with `name`, `weight_decay`, `momentum`, `nesterov`, and `b1`, `b2` and
            `eps`, of which None stands for optax's default.
        learning_rate: learning rate as a function of the step.
    """
    if optimizer.name == "sgd":
        return sgd(optimizer, learning_rate)
    function, takes = getattr(optax, optimizer.name), arguments(optimizer.name)
    given: dict[str, Any] = {
        name: optimizer[name] for name in takes if optimizer.get(name) is not None
    }
    if "weight_decay" in inspect.signature(function).parameters:
        return function(learning_rate, weight_decay=optimizer.weight_decay, **given)
    decay = optax.add_decayed_weights(optimizer.weight_decay)
    return optax.chain(decay, function(learning_rate, **given))


def arguments(name: str) -> tuple[str, ...]:
    """Return which of `momentum`, `nesterov`, `b1`, `b2` and `eps` an optimiser has."""
    if name == "sgd":
        return ("momentum", "nesterov")
    function = getattr(optax, name)
    takes = inspect.signature(function).parameters
    bound = getattr(function, "keywords", {})  # optax.nadam is optax.adam with nesterov=True
    return tuple(argument for argument in ARGUMENTS if argument in takes and argument not in bound)


def elementwise(name: str) -> bool:
    """Return whether an optimiser changes every number independently of all others."""
    return name not in _BY_ARRAY


def only(
    trainable: PyTree, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Restrict an optimiser to the trained leaves; the others have no state and never change.

    Args:
        trainable: a pytree of bools with the structure of the parameters.
        optimizer: the optimiser of the leaves for which `trainable` is True.
    """
    if all(jax.tree.leaves(trainable)):
        return optimizer
    labels = jax.tree.map(lambda trained: "trained" if trained else "frozen", trainable)
    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def trainable_mask(
    params: PyTree,
    prefixes: Sequence[str],
    head_modules: Sequence[str] = (),
    frozen: Sequence[str] = (),
    empty: Sequence[str] = (),
) -> PyTree:
    """Return a pytree of bools with the structure of `params`, True for every leaf that is trained.

    Paths have the form `student/layer1.0/conv1/kernel`, and a prefix consists of whole names
    between the slashes. `student/features` stands for the student without its `head_modules`.

    Args:
        params: the parameters of a `TrainState`.
        prefixes: prefixes of the paths that are trained; if there are none, everything is trained.
        head_modules: the modules of the student's network that belong to its head.
        frozen: prefixes of the paths that are not trained even if `prefixes` match them.
        empty: prefixes that are accepted although they match nothing, because they belong to terms
            without parameters.

    Raises:
        UserError: a prefix matches nothing; the message lists the prefixes that exist.
    """
    modules = {f"student/{m}" for m in params["student"]}
    if "student/features" in prefixes and (lost := {*head_modules} - {*params["student"]}):
        raise UserError(
            f"the network's head_modules name {min(lost)!r}, but its modules are "
            f"{', '.join(params['student'])}; name those behind the last map"
        )
    features = sorted(modules - {f"student/{m}" for m in head_modules})
    wanted = [p for x in prefixes for p in (features if x == "student/features" else [x])]
    used = set(empty)

    def trained(path: tuple[jax.tree_util.DictKey, ...], _: object) -> bool:
        name = "/".join(entry.key for entry in path) + "/"
        fits = {p for p in wanted if name.startswith(f"{p.rstrip('/')}/")}
        used.update(fits)
        return (not wanted or bool(fits)) and not any(name.startswith(f"{p}/") for p in frozen)

    mask = jax.tree_util.tree_map_with_path(trained, params)
    if missing := [p for p in wanted if p not in used]:
        there = [f"{group}/{module}" for group, tree in params.items() for module in tree]
        raise UserError(
            f"config.trainable names {missing[0]!r}, but there is only student/features, "
            f"{', '.join(there)} and the paths inside these; name some of them"
        )
    return mask

"""Stochastic gradient descent and learning rates with PyTorch's semantics."""

from collections.abc import Sequence

import jax
import optax
from ml_collections import ConfigDict

from ipwd_jax.errors import UserError
from ipwd_jax.typing import PyTree


def schedule(optimizer: ConfigDict, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """The learning rate of each step of a stage.

    `step` multiplies it by `decay` once each of `milestones` epochs is finished (Tian et al., 2020:
    with milestone 150, epochs 1 to 150 have the full rate). `cosine` lowers it with every step,
    from the full rate to 0 at the end of the stage.

    Args:
        optimizer: a config with `schedule`, `learning_rate`, `milestones`, `decay`.
        steps_per_epoch: steps of one epoch.
        epochs: epochs of the stage.
    """
    if optimizer.schedule == "cosine":
        return optax.cosine_decay_schedule(optimizer.learning_rate, steps_per_epoch * epochs)
    return optax.piecewise_constant_schedule(
        optimizer.learning_rate,
        {m * steps_per_epoch: optimizer.decay for m in optimizer.milestones},
    )


def sgd(optimizer: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """`torch.optim.SGD`: g += wd p;  v = mu v + g;  p -= lr v, or lr (g + mu v) with nesterov.

    Weight decay reaches every parameter, biases and BatchNorm included; the learning rate scales
    the step, not the velocity.
    """
    return optax.chain(
        optax.add_decayed_weights(optimizer.weight_decay),
        optax.trace(optimizer.momentum, optimizer.nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def only(
    trainable: PyTree, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An optimiser of the leaves that are trained; the others have no state and stay as they are.

    Args:
        trainable: bools like the parameters.
        optimizer: of the leaves where it is True.
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
    """A pytree of bools like `params`: whether a leaf is trained.

    Paths are written `student/layer1.0/conv1/kernel`; a prefix ends at a `/`.
    `student/features` stands for the student without `head_modules`.

    Args:
        params: of `TrainState`.
        prefixes: what is trained; none at all means everything.
        head_modules: of the student's network.
        frozen: prefixes of what is not trained even if `prefixes` match it.
        empty: prefixes that are accepted although they match nothing: those of terms without
            parameters.

    Raises:
        UserError: a prefix matches nothing; the message lists what there is.
    """
    modules = {f"student/{m}" for m in params["student"]}
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
            f"{', '.join(there)} and what is inside these"
        )
    return mask

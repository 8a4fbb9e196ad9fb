"""Stochastic gradient descent and learning rates with PyTorch's semantics."""

import jax
import optax
from ml_collections import ConfigDict


def schedule(optimizer: ConfigDict, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Learning rate of each step of a stage.

    `step`: times `decay` once each of `milestones` epochs is finished (Tian et al., 2020: with
    milestone 150, epochs 1 to 150 have the full rate). `cosine`: from the full rate to 0 over the
    stage, each step its own rate.

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


def trainable_mask(params, prefixes: tuple[str, ...]):
    """A pytree of bools like `params`: whether the leaf's path starts with one of `prefixes`.

    Paths are written `student/layer1.0/conv1/kernel`; a prefix ends at a `/`. No prefixes at all
    means everything.
    """

    def trained(path, _):
        name = "/".join(entry.key for entry in path) + "/"
        return not prefixes or any(name.startswith(f"{p.rstrip('/')}/") for p in prefixes)

    return jax.tree_util.tree_map_with_path(trained, params)

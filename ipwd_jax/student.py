"""The network that a run trains: `config.model.name`, or this network with the head of a term."""

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from ipwd_jax import losses, models
from ipwd_jax.errors import UserError
from ipwd_jax.models.with_head import WithHead
from ipwd_jax.state import outputs_of_zeros


def term_with_head(config: ConfigDict) -> str:
    """Return the name of the term whose head makes the predictions of a run; empty if none does.

    Args:
        config: config of the run, which can be one that an older version has written.

    Raises:
        UserError: several terms have a head.
    """
    first = config.get("first_stage", {})
    weights = [config.loss, *([first.loss] if first.get("epochs") else [])]
    active = {name for loss in weights for name, weight in loss.items() if weight}
    found = [name for name, kind in losses.TERMS.items() if name in active and kind.replaces_head]
    if len(found) > 1:
        raise UserError(
            f"the loss terms {', '.join(found)} all replace the student's head; leave one of them"
        )
    return found[0] if found else ""


def network_of(
    config: ConfigDict,
    classes: int,
    image_shape: tuple[int, ...],
    axis_name: str | None = None,
) -> nn.Module:
    """Return the network that a run trains, evaluates and saves.

    Args:
        config: config of the run.
        classes: number of classes.
        image_shape: (H, W, channels).
        axis_name: mapped axis over which batch statistics are synchronised.

    Raises:
        UserError: a term cannot make its head for these networks.
    """
    network = models.create(config.model.name, classes, axis_name)
    if not (name := term_with_head(config)):
        return network
    term = losses.create({name: 1.0}, config.terms, {})[name]
    teacher = models.create(config.teacher.name, classes)
    try:
        head = term.head(outputs_of_zeros(teacher, jnp.zeros((1, *image_shape))), axis_name)
    except ValueError as error:
        raise UserError(str(error)) from error
    assert head is not None
    return WithHead(network, head)

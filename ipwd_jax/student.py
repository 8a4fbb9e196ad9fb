"""The network that a run trains: `config.model.name`, or this network with the head of a term."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ipwd_jax import losses, models
from ipwd_jax.errors import UserError
from ipwd_jax.models.base import Outputs, he_normal_fan_out
from ipwd_jax.models.with_head import WithHead
from ipwd_jax.state import outputs_of_zeros
from ipwd_jax.typing import PyTree


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


def never_trained(config: ConfigDict, network: nn.Module) -> list[str]:
    """Return the paths of what no stage trains of a run's network, such as `student/fc/bias`."""
    paths = [f"student/{module}" for module in getattr(network, "frozen_modules", ())]
    if not config.model.classifier_bias:
        paths.append(f"student/{network.head_modules[-1]}/bias")
    return paths


def without_bias(
    network: nn.Module, variables: Mapping[str, PyTree], key: jax.Array
) -> dict[tuple[str, ...], jax.Array]:
    """Return the kernel and the bias with which a classifier without a bias begins, by their paths.

    The bias is 0, and is never trained. In the networks that ask for it, the kernel (D, C) is drawn
    from N(0, 2 / C), as in the code of CAT-KD, where the classifier is one of the convolutions.

    Args:
        network: the network of a run.
        variables: its variables as they are drawn otherwise.
        key: typed PRNG key.
    """
    path = ("params", network.head_modules[-1])
    layer = variables["params"][path[1]]
    kernel, bias = layer["kernel"], jnp.zeros_like(layer["bias"])
    if getattr(network, "draws_classifier_as_convolution", False):
        kernel = he_normal_fan_out(key, kernel.shape, kernel.dtype)
    return {(*path, "kernel"): kernel, (*path, "bias"): bias}


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
        UserError: a term cannot make its head for these networks, or another setting than
            `config.model.classifier_bias` decides how the classifier begins.
    """
    network, name = models.create(config.model.name, classes, axis_name), term_with_head(config)
    if not config.model.get("classifier_bias", True):
        other = "config.model.pretrained" if config.model.pretrained else name
        if other:
            raise UserError(
                "config.model.classifier_bias=False draws a classifier without a bias, but "
                f"{other} brings another one; leave one of the two out"
            )
    if not name:
        return network
    term = losses.create({name: 1.0}, config.terms, {})[name]
    teacher = models.create(config.teacher.name, classes)
    try:
        head = term.replacement_head(
            outputs_of_zeros(teacher, jnp.zeros((1, *image_shape))), axis_name
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    assert head is not None
    return WithHead(network, head)


def check_network(name: str, classes: int, image_shape: tuple[int, ...], train: bool) -> None:
    """Raise `UserError` if a network that a config file adds cannot be called as a run calls it.

    Args:
        name: name of the network.
        classes: number of classes.
        image_shape: (H, W, channels).
        train: whether the run calls it in training mode, with a mask.
    """
    network = models.create(name, classes)
    if type(network).__module__.startswith("ipwd_jax."):
        return
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)

    def step(images: jax.Array) -> Any:
        variables, mask = network.init(jax.random.key(0), images), jnp.ones(2)
        if not train:
            return network.apply(variables, images)
        kept = ["batch_stats"]
        return network.apply(variables, images, train=True, mask=mask, mutable=kept)[0]

    call = "net(x, train=True, mask=mask)" if train else "net(x)"
    needs = f"the run calls it as {call}, which must return Outputs"
    try:
        returned = jax.eval_shape(step, images)
    except Exception as error:  # whatever the network raises
        raise UserError(
            f"the network {name} cannot be called: {type(error).__name__}: {error}; {needs}"
        ) from error
    if not isinstance(returned, Outputs):
        raise UserError(f"the network {name} returns {type(returned).__name__}; {needs}")

"""The networks, by name.

A network is called as `net(x, train=False, mask=None)`, where x is a float array (B, H, W,
channels), and returns `Outputs`. Its module has the fields `classes` and `axis_name`, and two class
attributes: `smallest_image`, the smallest image side in pixels that it can process, and
`head_modules`, the names of its modules behind the last map, the classifier last. If it has a third
one, `draws_classifier_as_convolution`, a classifier without a bias begins with a kernel like those
of the convolutions. To add a family of networks, write a file beside this one and add a line to
`NETWORKS`.
"""

import pathlib
from collections.abc import Callable

from flax import linen as nn

from ipwd_jax.errors import UserError, unknown_name
from ipwd_jax.models import (
    densenet,
    mobilenetv1,
    mobilenetv2,
    preact_resnet,
    resnet,
    resnet_large,
    resnext,
    shufflenetv1,
    shufflenetv2,
    vgg,
    wrn,
)
from ipwd_jax.models.base import Outputs

__all__ = ["NETWORKS", "Outputs", "check_input", "check_run", "create"]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **resnet.NETWORKS,
    **wrn.NETWORKS,
    **vgg.NETWORKS,
    **mobilenetv2.NETWORKS,
    **shufflenetv1.NETWORKS,
    **shufflenetv2.NETWORKS,
    **resnet_large.NETWORKS,
    **mobilenetv1.NETWORKS,
    **preact_resnet.NETWORKS,
    **densenet.NETWORKS,
    **resnext.NETWORKS,
}


def create(name: str, classes: int, axis_name: str | None = None) -> nn.Module:
    """Return the network called `name`.

    Args:
        name: one of `NETWORKS`, or of the form `wrn_<depth>_<width>` or `MobileNetV2_<width>`.
        classes: number of logits.
        axis_name: mapped axis (of `jax.pmap` or `jax.shard_map`) over which batch statistics are
            synchronised; if None, each device computes its own.

    Raises:
        UserError: there is no such network, and the message suggests the most similar name; or a
            network of the user's lacks these fields.

    Examples:
        >>> network = ipwd_jax.create_model("resnet8", classes=10)
        >>> images = np.zeros((2, 32, 32, 3), np.float32)
        >>> outputs, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), images)
        >>> outputs.logits.shape, outputs.embedding.shape
        ((2, 10), (2, 64))
    """
    constructor = NETWORKS.get(name) or wrn.from_name(name) or mobilenetv2.from_name(name)
    if constructor is None:
        patterns = ["wrn_<depth>_<width>", "MobileNetV2_<width>"]
        raise unknown_name("network", name, [*NETWORKS, *patterns])
    try:
        return constructor(classes=classes, axis_name=axis_name)
    except TypeError as error:
        raise UserError(
            f"the network {name} cannot be made with the fields `classes` and `axis_name`, which "
            f"every network needs: {error}"
        ) from error


def check_run(workdir: pathlib.Path, name: str) -> None:
    """Raise `UserError` if the network `name` of the run in `workdir` cannot be made."""
    try:
        create(name, classes=1)
    except UserError as error:
        raise UserError(
            f"{workdir} is a run of {name!r}, which is not a network of ipwd_jax; if one of your "
            "config files adds it, name that file with --config=FILE, or load it in Python with "
            f"ipwd_jax.load_config ({error})"
        ) from error


def check_input(name: str, height: int, width: int) -> None:
    """Raise `UserError` if images of `height` x `width` are too small for the network `name`."""
    network = create(name, classes=1)
    for attribute in ("smallest_image", "head_modules"):
        if not hasattr(network, attribute):
            raise UserError(f"{name} has no {attribute}, which every network needs")
    smallest = network.smallest_image
    if min(height, width) < smallest:
        raise UserError(
            f"{name} needs images of at least {smallest}x{smallest} pixels, found {height}x{width}."
            " Enlarge them or pad them."
        )

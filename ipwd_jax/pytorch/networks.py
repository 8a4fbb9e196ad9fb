"""Infer the network of a PyTorch checkpoint from the names and shapes of its tensors."""

import functools
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from ipwd_jax import models
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch.names import check_shapes, torch_shapes
from ipwd_jax.state import network_shapes
from ipwd_jax.typing import PyTree

Shapes = Mapping[str, tuple[int, ...]]
_Tensor = TypeVar("_Tensor")  # an array or a shape

# Names that some repositories use for a tensor of ours.
_ALIASES = {f"classifier.{leaf}": f"classifier.0.{leaf}" for leaf in ("weight", "bias")}
# Stand for the numbers of classes and of image channels where a file will tell them.
_CLASSES, _CHANNELS = 104_729, 7_919
# In a group of a wide ResNet whose name is inferred: each block costs time to try.
_MOST_BLOCKS = 100


class Fit(NamedTuple):
    """The network whose tensors a file has: its name, its classes, and its image channels."""

    name: str
    classes: int
    channels: int


def guess(shapes: Shapes, network: str = "") -> Fit:
    """Find the network that has tensors of these names and shapes.

    Args:
        shapes: PyTorch's, by name.
        network: the only one to consider; empty: all of `models.NETWORKS` and any width and
            depth of `wrn_<depth>_<width>` and `MobileNetV2_<width>`.

    Raises:
        UserError: no network fits, with a table of how the nearest differs; or several do.
    """
    names = [network] if network else list(dict.fromkeys([*models.NETWORKS, *_patterned(shapes)]))
    fits = {name: _fit(name, shapes) for name in names}
    equal = [name for name, (_, wrong) in fits.items() if not wrong]
    # A pattern may also give a network that has a name of its own.
    equal = [name for name in equal if name in models.NETWORKS] or equal
    if len(equal) > 1:
        raise UserError(f"{', '.join(equal)} have these tensors; choose one with --network=NAME")
    if equal:
        return fits[equal[0]][0]
    nearest = min(names, key=lambda name: fits[name][1])
    fit = fits[nearest][0]
    wanted = torch_shapes(template_of(fit))
    try:
        check_shapes(renamed(shapes, wanted), wanted)
    except UserError as error:
        hint = "" if network else "no network has these tensors; the nearest is "
        raise UserError(f"{hint}{nearest}, {fit.classes} classes: {error}") from None
    raise AssertionError("unreachable: the shapes differ")


def _patterned(shapes: Shapes) -> list[str]:
    """The names that the patterns, which are not listed, give networks of such shapes."""
    names = []
    shapes = {name: shape for name, shape in shapes.items() if 0 not in shape}
    stem, last = shapes.get("block1.layer.0.conv1.weight"), shapes.get("blocks.6.0.conv.6.weight")
    blocks = len([n for n in shapes if n.startswith("block1.") and n.endswith(".conv1.weight")])
    if stem and blocks <= _MOST_BLOCKS:
        names.append(f"wrn_{6 * blocks + 4}_{max(1, stem[0] // 16)}")
    if last and last[0] >= 20:  # below, a stage would have no channel
        names.append(f"MobileNetV2_{last[0] / 320}")
    return names


@functools.cache
def _open_shapes(name: str) -> Shapes:
    """Shapes of a network with `_CLASSES` and `_CHANNELS` where a file may have other numbers."""
    return torch_shapes(template_of(Fit(name, _CLASSES, _CHANNELS)))


def _fit(name: str, shapes: Shapes) -> tuple[Fit, int]:
    """The network with the numbers that the file has, and how many tensors differ even so."""
    wanted = _open_shapes(name)
    shapes = renamed(shapes, wanted)
    numbers = {_CLASSES: 10, _CHANNELS: 3}
    for tensor, shape in wanted.items():
        found = shapes.get(tensor, ())
        if len(found) == len(shape) and 0 not in found:  # one without numbers can claim any size
            numbers |= {a: b for a, b in zip(shape, found, strict=True) if a in numbers}
    wanted = {k: tuple(numbers.get(axis, axis) for axis in shape) for k, shape in wanted.items()}
    wrong = sum(wanted.get(k) != shapes.get(k) for k in {*wanted, *shapes})
    return Fit(name, *numbers.values()), wrong


def template_of(fit: Fit) -> PyTree:
    """Shapes and types of the variables of a network, as `jax.eval_shape` gives them."""
    network = models.create(fit.name, fit.classes)
    side = max(32, network.smallest_image)
    return network_shapes(network, (side, side, fit.channels))


def renamed(tensors: Mapping[str, _Tensor], wanted: Mapping[str, object]) -> dict[str, _Tensor]:
    """The same tensors under the names of our network where a repository has others."""
    return {
        _ALIASES[k] if k not in wanted and _ALIASES.get(k) in wanted else k: x
        for k, x in tensors.items()
    }

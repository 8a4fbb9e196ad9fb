"""Infer the network of a PyTorch checkpoint from the names and shapes of its tensors."""

import functools
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from ipwd_jax import models
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch.names import differences, torch_shapes
from ipwd_jax.state import network_shapes
from ipwd_jax.typing import PyTree

Shapes = Mapping[str, tuple[int, ...]]
_Tensor = TypeVar("_Tensor")  # an array or a shape

# Names that some repositories give to tensors, and the names of the same tensors here.
_ALIASES = {f"classifier.{leaf}": f"classifier.0.{leaf}" for leaf in ("weight", "bias")}
# Placeholders for the numbers of classes and of image channels, which a file determines.
_CLASSES, _CHANNELS = 104_729, 7_919
# Most blocks in a group of a wide ResNet whose name is inferred, since every block takes time.
_MOST_BLOCKS = 100


class Fit(NamedTuple):
    """The network that a file belongs to, with its numbers of classes and of image channels."""

    name: str
    classes: int
    channels: int


def guess(shapes: Shapes, network: str = "") -> Fit:
    """Infer the network from the names and shapes of its tensors.

    Args:
        shapes: shapes in PyTorch's layout, by tensor name.
        network: the only network to consider; if empty, these are all of `models.NETWORKS` and
            `wrn_<depth>_<width>` and `MobileNetV2_<width>` of any depth and width.

    Raises:
        UserError: no network fits, in which case a table shows how the closest one differs; or
            several fit.
    """
    names = [network] if network else list(dict.fromkeys([*models.NETWORKS, *_patterned(shapes)]))
    fits = {name: _fit(name, shapes) for name in names}
    equal = [name for name, (_, wrong) in fits.items() if not wrong]
    # A pattern can also produce a network that is listed under a name of its own.
    equal = [name for name in equal if name in models.NETWORKS] or equal
    if len(equal) > 1:
        raise UserError(
            f"these tensors fit {', '.join(equal)}; choose one of them with --network=NAME"
        )
    if equal:
        return fits[equal[0]][0]
    nearest = min(names, key=lambda name: fits[name][1])
    fit = fits[nearest][0]
    wanted = torch_shapes(template_of(fit))
    hint = "" if network else "no network has these tensors; the closest is "
    differ = differences(renamed(shapes, wanted), wanted)
    raise UserError(f"{hint}{nearest}, {fit.classes} classes: {differ}")


def _patterned(shapes: Shapes) -> list[str]:
    """Return the networks that `models.NETWORKS` does not list but that may have such shapes."""
    names = []
    shapes = {name: shape for name, shape in shapes.items() if 0 not in shape}
    stem, last = shapes.get("block1.layer.0.conv1.weight"), shapes.get("blocks.6.0.conv.6.weight")
    blocks = len([n for n in shapes if n.startswith("block1.") and n.endswith(".conv1.weight")])
    if stem and blocks <= _MOST_BLOCKS:
        names.append(f"wrn_{6 * blocks + 4}_{max(1, stem[0] // 16)}")
    if last and last[0] >= 20:  # with fewer, a stage would have no channels
        names.append(f"MobileNetV2_{last[0] / 320}")
    return names


@functools.cache
def _open_shapes(name: str, constructor: object) -> Shapes:
    """Return a network's shapes with the placeholders `_CLASSES` and `_CHANNELS`.

    The constructor is a part of the key, because a notebook can register a network again.
    """
    return torch_shapes(template_of(Fit(name, _CLASSES, _CHANNELS)))


def _fit(name: str, shapes: Shapes) -> tuple[Fit, int]:
    """Return the network with the file's classes and channels, and how many tensors differ then."""
    wanted = _open_shapes(name, models.NETWORKS.get(name))
    shapes = renamed(shapes, wanted)
    numbers = {_CLASSES: 10, _CHANNELS: 3}
    for tensor, shape in wanted.items():
        found = shapes.get(tensor, ())
        if len(found) == len(shape) and 0 not in found:  # an empty tensor can claim any size
            numbers |= {a: b for a, b in zip(shape, found, strict=True) if a in numbers}
    wanted = {k: tuple(numbers.get(axis, axis) for axis in shape) for k, shape in wanted.items()}
    wrong = sum(wanted.get(k) != shapes.get(k) for k in {*wanted, *shapes})
    return Fit(name, *numbers.values()), wrong


def template_of(fit: Fit) -> PyTree:
    """Return the shapes and types of a network's variables, as `jax.eval_shape` does."""
    network = models.create(fit.name, fit.classes)
    side = max(32, network.smallest_image)
    return network_shapes(network, (side, side, fit.channels))


def renamed(tensors: Mapping[str, _Tensor], wanted: Mapping[str, object]) -> dict[str, _Tensor]:
    """Return `tensors` with the names of some repositories replaced by those that are used here."""
    return {
        _ALIASES[k] if k not in wanted and _ALIASES.get(k) in wanted else k: x
        for k, x in tensors.items()
    }

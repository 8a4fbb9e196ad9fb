"""Yim et al., 2017 (A gift from knowledge distillation): match the flow between layers."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, pool_to_smaller, sum_losses
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32


def fsp_matrices(maps: Sequence[jax.Array]) -> list[jax.Array]:
    """The matrices (B, C, C') of mean products between the channels of consecutive maps.

    The larger map of each pair is average-pooled to the size of the smaller one.

    Args:
        maps: maps of shape (B, H, W, C).
    """
    matrices = []
    for a, b in itertools.pairwise(at_least_float32(maps)):
        a, b = pool_to_smaller(a, b)
        products = jnp.einsum("bhwc,bhwd->bcd", a, b, precision="highest")
        matrices.append(products / (a.shape[1] * a.shape[2]))
    return matrices


def fsp_loss(student: Sequence[jax.Array], teacher: Sequence[jax.Array]) -> jax.Array:
    """Mean squared difference of the two networks' `fsp_matrices`, summed over the matrices.

    Agrees with `FSP` of RepDistiller.

    Args:
        student: maps (B, H, W, C).
        teacher: maps (B, H', W', C) with the same channels.

    Returns:
        (B,) loss.

    Raises:
        ValueError: the channels differ.
    """
    channels = [[x.shape[-1] for x in maps] for maps in (student, teacher)]
    if channels[0] != channels[1]:
        raise ValueError(
            f"FSP needs maps with equal numbers of channels, but the student's have {channels[0]} "
            f"and the teacher's {channels[1]}; choose another pair of networks"
        )
    gaps = (s - t for s, t in zip(fsp_matrices(student), fsp_matrices(teacher), strict=True))
    return sum_losses(jnp.square(gap).mean(axis=(1, 2)) for gap in gaps)


class FSP(Term):
    """`fsp_loss` of all maps, including the stem's, per sample.

    The loss is meant for a first stage, with no distillation in the main stage. The largest
    intermediate array is a pooled map (B, H, W, C), or the matrix (B, C, C') of the two widest
    maps.
    """

    paper = "Yim et al., 2017: A gift from knowledge distillation"
    teacher_taps = ("features",)
    mixed_images = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return fsp_loss(student.features, teacher.features)

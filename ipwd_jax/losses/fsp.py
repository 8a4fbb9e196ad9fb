"""Yim et al., 2017 (A gift from knowledge distillation): the flow between layers."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, pool_to_smaller, sum_losses
from ipwd_jax.models.base import Outputs


def fsp_matrices(maps: Sequence[jax.Array]) -> list[jax.Array]:
    """The matrices (B, C, C') of mean products of channels of consecutive maps.

    The larger map of each two is average-pooled to the size of the smaller.

    Args:
        maps: (B, H, W, C) each.
    """
    wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in maps]
    matrices = []
    for a, b in itertools.pairwise(wide):
        a, b = pool_to_smaller(a, b)
        products = jnp.einsum("bhwc,bhwd->bcd", a, b, precision="highest")
        matrices.append(products / (a.shape[1] * a.shape[2]))
    return matrices


def fsp_loss(student: Sequence[jax.Array], teacher: Sequence[jax.Array]) -> jax.Array:
    """Mean squared difference of the two networks' `fsp_matrices`, summed over them, per sample.

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
            f"FSP needs maps of equal channels, but the student's have {channels[0]} and the"
            f" teacher's {channels[1]}"
        )
    gaps = (s - t for s, t in zip(fsp_matrices(student), fsp_matrices(teacher), strict=True))
    return sum_losses(jnp.square(gap).mean(axis=(1, 2)) for gap in gaps)


class FSP(Term):
    """`fsp_loss` of all maps, the stem included, per sample.

    A loss of a first stage, without distillation in the main one. Largest intermediate: the
    pooled map (B, H, W, C), or the matrix (B, C, C') of the two widest maps.
    """

    paper = "Yim et al., 2017: A gift from knowledge distillation"
    teacher_taps = ("features",)

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return fsp_loss(student.features, teacher.features)

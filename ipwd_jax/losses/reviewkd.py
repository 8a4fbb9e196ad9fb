"""Chen et al., 2021 (Distilling knowledge via knowledge review): fuse maps from deep to shallow."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ipwd_jax.losses.base import Batch, Term, adaptive_avg_pool, sum_losses
from ipwd_jax.models.base import BatchNorm, Conv, Outputs
from ipwd_jax.precision import at_least_float32

# Kaiming's uniform initialiser with a = 1: U(-b, b), b = sqrt(3 / fan_in).
_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


def nearest_resize(x: jax.Array, height: int, width: int) -> jax.Array:
    """(B, H, W, C) -> (B, height, width, C); output pixel i is input pixel floor(i in / out).

    This is what `torch.nn.functional.interpolate(mode="nearest")` does. `jax.image.resize` takes
    the pixel under the centre, which is a different one unless the output size is a multiple of the
    input size.
    """
    for axis, size in ((1, height), (2, width)):
        old = x.shape[axis]
        if size % old == 0:  # the gradient is a sum, while that of indexing is a scatter
            x = jnp.repeat(x, size // old, axis=axis)
        else:
            x = jnp.take(x, np.arange(size) * old // size, axis=axis)
    return x


def hcl_loss(student: Sequence[jax.Array], teacher: Sequence[jax.Array]) -> jax.Array:
    """Hierarchical context loss of each sample, summed over the levels.

    Each level contributes a weighted mean of the mean squared difference between its two maps and,
    for each l in 4, 2, 1 that is less than the map's height, that between the maps pooled to l x l.
    The first weight is 1 and each further weight is half of the one before. Agrees with `HCL` of
    the authors' code.

    Args:
        student: maps (B, H, W, C).
        teacher: maps of the same shapes.

    Returns:
        (B,) loss.
    """
    return sum_losses(_level_loss(s, t) for s, t in zip(student, teacher, strict=True))


def _level_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    # Pooling is linear, so the pooled difference is the difference of the pooled maps.
    gap = student - teacher
    loss, weight, total = jnp.square(gap).mean(axis=(1, 2, 3)), 1.0, 1.0
    for size in (4, 2, 1):
        if size < gap.shape[1]:
            weight /= 2
            total += weight
            pooled = adaptive_avg_pool(gap, size, size)
            loss += weight * jnp.square(pooled).mean(axis=(1, 2, 3))
    return loss / total


class ABF(nn.Module):
    """Attention-based fusion of a student's map with the fused map of the next deeper level.

    Attributes:
        mid_channels: channels of the fused map.
        out_channels: channels of the teacher's map.
        axis_name: mapped axis over which batch statistics are synchronised.
    """

    mid_channels: int
    out_channels: int
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, deeper: jax.Array | None, size: tuple[int, int], mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Fuse the maps and bring the result to the teacher's shape.

        Args:
            x: (B, H, W, C), the student's map.
            deeper: (B, H', W', mid_channels), the fused map of the next deeper level; None at the
                deepest level.
            size: height and width of the teacher's map.
            mask: (B,), 0 for padding rows.

        Returns:
            The map (B, *size, out_channels) that is compared with the teacher's, and the fused map
            (B, *size, mid_channels) for the next shallower level.
        """

        def norm(name: str) -> BatchNorm:
            return BatchNorm(train=True, axis_name=self.axis_name, name=name)

        conv1 = Conv(self.mid_channels, 1, kernel_init=_kernel_init, name="conv1.0")
        conv2 = Conv(self.out_channels, 3, kernel_init=_kernel_init, name="conv2.0")
        x = norm("conv1.1")(conv1(x), mask)
        if deeper is not None:
            deeper = nearest_resize(deeper, *x.shape[1:3])
            both = jnp.concatenate([x, deeper], axis=-1)
            gate = nn.sigmoid(Conv(2, 1, use_bias=True, name="att_conv.0")(both))
            x = x * gate[..., :1] + deeper * gate[..., 1:]
        x = nearest_resize(x, *size)
        return norm("conv2.1")(conv2(x), mask), x


class ReviewKD(Term):
    """`hcl_loss` of the student's maps, fused from deep to shallow, and the teacher's, per sample.

    The levels are the maps after the stem, and the embedding as a map of 1 x 1 pixels. The
    teacher's maps are those before their last activation. The largest intermediate array is
    (B, H, W, 2 mid) at the size of the student's shallowest map, or (B, H, W, mid) at the size of
    the teacher's, where mid is `min(mid_channels, D)` and D is the width of the student's
    embedding.

    Attributes:
        mid_channels: channels of the fused maps, limited to the width of the student's embedding.
        warmup: number of epochs over which the factor of the loss rises to 1.
        first_epoch: number of the first epoch: 1 as in mdistiller, or 0 as in the authors' code,
            where the factor is 0 in the first epoch.
        student_preact: whether the student's maps, too, are those before their last activation, as
            on ImageNet.
        axis_name: mapped axis over which batch statistics are synchronised.
    """

    mid_channels: int = 512
    warmup: int = 20
    first_epoch: int = 1
    student_preact: bool = False
    axis_name: str | None = None

    paper = "Chen et al., 2021: Knowledge review"
    teacher_taps = ("preact", "embedding")
    mixed_images = True

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        """The loss, (B,).

        Raises:
            ValueError: the networks have different numbers of levels.
        """
        maps_s = _levels(student.preact if self.student_preact else student.features, student)
        maps_t = _levels(teacher.preact, teacher)
        if len(maps_s) != len(maps_t):
            raise ValueError(
                f"ReviewKD needs networks with equally many levels, but the student has "
                f"{len(maps_s)} and the teacher {len(maps_t)}; choose another pair of networks"
            )
        mid, fused, fitted = min(self.mid_channels, maps_s[-1].shape[-1]), None, []
        for depth, (s, t) in enumerate(reversed(list(zip(maps_s, maps_t, strict=True)))):
            level = ABF(mid, t.shape[-1], self.axis_name, name=str(depth))
            out, fused = level(s, fused, (t.shape[1], t.shape[2]), batch.mask)
            fitted.append(out)
        loss = hcl_loss(fitted, maps_t[::-1])
        ramp = jnp.minimum((batch.epoch + self.first_epoch) / max(self.warmup, 1), 1)
        return ramp.astype(loss.dtype) * loss


def _levels(maps: Sequence[jax.Array], outputs: Outputs) -> list[jax.Array]:
    """The maps after the stem, and the embedding as (B, 1, 1, D), in float32 or better."""
    return at_least_float32([*maps[1:], outputs.embedding[:, None, None, :]])

"""Kim et al., 2018 (Paraphrasing complex network): match factors of the last map."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from ipwd_jax.losses.at import attention
from ipwd_jax.losses.base import Batch, Term, pool_to_smaller
from ipwd_jax.models.base import BatchNorm, Conv, Outputs
from ipwd_jax.precision import at_least_float32

_leaky_relu = partial(nn.leaky_relu, negative_slope=0.1)


def factor_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean absolute difference between the two normalised factors of each sample.

    The larger map is first average-pooled to the size of the smaller one. A factor is the mean
    square over the channels, normalised to a unit vector over the pixels. Agrees with
    `FactorTransfer` of RepDistiller (p1 = 2, p2 = 1); the paper compares the whole normalised
    tensors.

    Args:
        student: (B, H, W, C).
        teacher: (B, H', W', C').

    Returns:
        (B,) loss.
    """
    s, t = map(attention, pool_to_smaller(student, teacher))
    return jnp.abs(s - t).mean(axis=1)


class Coder(nn.Module):
    """Three 3 x 3 convolutions, each with a leaky ReLU, as an encoder, a decoder or a translator.

    Attributes:
        transpose: whether the convolutions are transposed.
        batch_norm: whether a BatchNorm follows each convolution.
        axis_name: mapped axis over which batch statistics are synchronised.
    """

    transpose: bool = False
    batch_norm: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, channels: tuple[int, int, int], mask: jax.Array | None = None
    ) -> jax.Array:
        """(B, H, W, C), `channels` of the convolutions, mask (B,) -> (B, H, W, channels[-1])."""
        for i, width in enumerate(channels):
            layer = Conv(
                width, 3, padding=1, use_bias=True, transpose=self.transpose, name=str(3 * i)
            )
            x = layer(x)
            if self.batch_norm:
                norm = BatchNorm(train=True, axis_name=self.axis_name, name=str(3 * i + 1))
                x = norm(x, mask)
            x = _leaky_relu(x)
        return x


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's map, whose code has `rate` times as many channels.

    Attributes:
        rate: ratio of the code's channels to the map's.
    """

    rate: float = 0.5

    def setup(self) -> None:
        self.encoder = Coder()
        self.decoder = Coder(transpose=True)

    def encode(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, rate C). Raises `ValueError` if no channel is left."""
        channels, code = x.shape[-1], int(self.rate * x.shape[-1])
        if not code:
            raise ValueError(
                f"config.terms.ft.rate is {self.rate}, which leaves no channel of the {channels} "
                f"of the teacher's last map; set it to at least {1 / channels:.6g}"
            )
        return self.encoder(x, (channels, code, code))

    def decode(self, code: jax.Array, channels: int) -> jax.Array:
        """(B, H, W, rate C) and C -> (B, H, W, C)."""
        return self.decoder(code, (code.shape[-1], channels, channels))


class Translator(nn.Module):
    """Convolutions with BatchNorm that bring the student's map to the width of the teacher's code.

    Attributes:
        axis_name: mapped axis over which batch statistics are synchronised.
    """

    axis_name: str | None = None

    def setup(self) -> None:
        self.encoder = Coder(batch_norm=True, axis_name=self.axis_name)

    def __call__(self, x: jax.Array, channels: int, mask: jax.Array) -> jax.Array:
        """(B, H, W, C), channels and mask (B,) -> (B, H, W, channels)."""
        return self.encoder(x, (x.shape[-1], channels, channels), mask)


class FT(Term):
    """`factor_loss` between the student's translated last map and the teacher's code, per sample.

    The paraphraser computes the code from the teacher's last map. In a first stage it learns to
    reconstruct that map; afterwards it is fixed. The largest intermediate array is (B, H, W, C),
    the last map.

    Attributes:
        rate: ratio of the code's channels to those of the teacher's map; 0.5 in RepDistiller.
        axis_name: mapped axis over which batch statistics are synchronised.
    """

    rate: float = 0.5
    axis_name: str | None = None

    paper = "Kim et al., 2018: Paraphrasing complex network"
    teacher_taps = ("features",)
    mixed_images = True
    first_stage_params = ("paraphraser",)

    def setup(self) -> None:
        self.paraphraser = Paraphraser(self.rate)
        self.translator = Translator(self.axis_name)

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        source, target = _last_map(student), _last_map(teacher)
        if 1 in (source[0, ..., 0].size, target[0, ..., 0].size):
            raise ValueError(
                "ft compares how a map is distributed over its pixels, but the last map of one of "
                "the networks has a single pixel; use larger images or another network"
            )
        code = self.paraphraser.encode(target)
        if self.is_initializing():  # the decoder is used in the first stage alone
            self.paraphraser.decode(code, target.shape[-1])
        translated = self.translator(source, code.shape[-1], batch.mask)
        return factor_loss(translated, lax.stop_gradient(code))

    def pretrain(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        """Mean squared error, (B,), of the paraphraser's reconstruction of the teacher's map."""
        target = _last_map(teacher)
        reconstruction = self.paraphraser.decode(self.paraphraser.encode(target), target.shape[-1])
        return jnp.square(reconstruction - target).mean(axis=(1, 2, 3))


def _last_map(outputs: Outputs) -> jax.Array:
    return at_least_float32(outputs.features[-1])

"""What every network is built from: its output, batch normalisation, convolution, initialisers.

Networks follow the public PyTorch implementations that the distillation papers measured, so that
their checkpoints can be read and their tables compared. Where PyTorch and Flax differ (padding
of strided convolutions, the stored variance, initialisers) this module does as PyTorch does.
"""

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax
from jax.nn.initializers import Initializer

from ipwd_jax.typing import PyTree


@struct.dataclass
class Outputs:
    """What a network returns for a batch of B images.

    Attributes:
        logits: (B, classes), before the softmax.
        embedding: (B, D), the pooled vector that enters the classifier.
        features: maps (B, H, W, C) from shallow to deep, without the embedding.
        preact: the same maps before their last activation. As in the reference, the first one
            (the stem) is the same array in both.
        extra_logits: (B, classes) each, by name: the heads beside the main one, if any.
    """

    logits: jax.Array
    embedding: jax.Array
    features: tuple[jax.Array, ...]
    preact: tuple[jax.Array, ...]
    extra_logits: dict[str, jax.Array] = struct.field(default_factory=dict)


# N(0, 2 / (H W out)), not truncated, for a kernel (H, W, in, out); `out` is the full width, also
# when the convolution is grouped. He et al. 2015, https://arxiv.org/abs/1502.01852, eq. 14.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


# PyTorch's default for the kernels of Conv2d and Linear: U(-b, b), b = 1 / sqrt(fan_in).
torch_uniform_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_uniform(fan_in: int) -> Initializer:
    """Return PyTorch's initialiser of a bias: U(-b, b), b = 1 / sqrt(fan_in) of the kernel."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: jax.random.uniform(
        key, shape, dtype, -bound, bound, out_sharding=out_sharding
    )


def frozen_norms(trainable: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The collection `frozen` that keeps BatchNorm layers in inference mode while others train.

    Args:
        trainable: bools like the parameters of a network.

    Returns:
        A variable `norm` for each module of whose own parameters none is trained.
    """
    below = {name: frozen_norms(tree) for name, tree in trainable.items() if isinstance(tree, dict)}
    own = [leaf for leaf in trainable.values() if not isinstance(leaf, dict)]
    marked = {name: tree for name, tree in below.items() if tree}
    return {**marked, "norm": True} if own and not any(own) else marked


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with the semantics of PyTorch.

    A batch is normalised by its biased variance, while the running variance that is kept for
    evaluation is the unbiased one, n / (n - 1) times as large (`flax.linen.BatchNorm` keeps the
    biased one). Parameters `scale` and `bias`, statistics `mean` and `var` in `batch_stats`,
    all (C,) float32. The statistics change only in training, when that collection is mutable;
    initialisation leaves them at 0 and 1.

    Attributes:
        train: normalise by the statistics of the batch; otherwise, and where the collection
            `frozen` has a variable `norm` for the layer (`frozen_norms`), by the running ones.
        axis_name: the mapped axis over which the devices share their batches: every device
            normalises by the statistics of the global batch. None: each by its own.
        eps: added to the variance.
        momentum: share of the running statistics that a step keeps (PyTorch's is one minus this).
    """

    train: bool
    axis_name: str | None = None
    eps: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalise `x`.

        Args:
            x: (B, ..., C), any float type; statistics are taken in float32 or better.
            mask: (B,), float or bool; rows where it is 0 are padding: finite numbers of any size,
                which are normalised too but count in no statistic. A device may hold padding
                alone; without `axis_name` its statistics are then meaningless but finite.

        Returns:
            An array with the shape and type of `x`.
        """
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)

        dtype = jnp.promote_types(x.dtype, jnp.float32)
        row = (1,) * (x.ndim - 1) + (channels,)  # per-channel vectors against x, rank for rank
        # The sums below are of x - running mean. Any constant would give the same statistics and
        # gradients; one near the mean of the batch keeps E[d^2] - E[d]^2 from cancelling, which
        # is what lets a single pass over x (and a single collective) do in float32.
        d = x.astype(dtype) - lax.stop_gradient(running_mean.value).astype(dtype).reshape(row)
        var = running_var.value.astype(dtype)
        frozen = self.has_variable("frozen", "norm")
        if self.train and not frozen and not self.is_initializing():
            count, offset, var = self._moments(d, mask)
            d = d - offset.reshape(row)
            if self.is_mutable_collection("batch_stats"):
                unbiased = var * count / jnp.maximum(count - 1, 1)
                running_mean.value += (1 - self.momentum) * offset
                running_var.value += (1 - self.momentum) * (unbiased - running_var.value)
        gain = lax.rsqrt(var + self.eps) * scale.astype(dtype)
        return (d * gain.reshape(row) + bias.astype(dtype).reshape(row)).astype(x.dtype)

    def _moments(
        self, d: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Count (), mean (C,) and biased variance (C,) of the valid rows on all devices."""
        rows: jax.Array | int = d.shape[0]
        if mask is not None:
            valid = mask != 0
            rows = valid.sum(dtype=d.dtype)
            d = jnp.where(valid.reshape((-1,) + (1,) * (d.ndim - 1)), d, 0)
        count = jnp.asarray(rows * math.prod(d.shape[1:-1]), d.dtype)
        axes = tuple(range(d.ndim - 1))
        sums = count, d.sum(axes), jnp.square(d).sum(axes)
        if self.axis_name is not None:
            sums = lax.psum(sums, self.axis_name)
        count, total, squares = sums
        count = jnp.maximum(count, 1)  # a device by itself may hold padding alone
        mean = total / count
        # Rounding can take the difference below zero when a channel is constant. The gradient
        # that the clip stops is d - mean, which is zero for such a channel.
        return count, mean, jnp.maximum(squares / count - jnp.square(mean), 0)


class Linear(nn.Module):
    """A linear layer whose parameters `kernel` and `bias` start as PyTorch's do.

    Attributes:
        features: width of the output.
        kernel_init: initialiser of the kernel.
        bias_init: initialiser of the bias; None: PyTorch's, which follows the width of the input
            (so that `flax.linen.Dense`, whose initialiser does not see it, cannot draw it).
    """

    features: int
    kernel_init: Initializer = torch_uniform_kernel
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, D) -> (B, features), of the wider type of `x` and the bias."""
        fan_in = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (fan_in, self.features), jnp.float32)
        bias_init = self.bias_init or torch_uniform(fan_in)
        bias = self.param("bias", bias_init, (self.features,), jnp.float32)
        dtype = jnp.promote_types(x.dtype, bias.dtype)
        return jnp.dot(x, kernel, preferred_element_type=dtype) + bias[None]


class Conv(nn.Module):
    """A square convolution, or its transpose, with PyTorch's padding and initialisation.

    The padding is explicit because "SAME" pads a strided convolution on the far side only, which
    shifts the map against PyTorch's by one pixel. `flax.linen.Conv` would do but for the bias,
    whose initialiser does not see the fan-in. Parameters: `kernel` (H, W, in / groups, features),
    for a transpose (H, W, features, in), and `bias` (features,).

    Attributes:
        features: channels of the output.
        kernel: pixels a side.
        stride: of the output; of a transpose, by how much it enlarges.
        padding: pixels on each side; None: kernel // 2.
        groups: of channels that do not see each other.
        use_bias: whether there is a bias.
        kernel_init: initialiser of the kernel.
        bias_init: initialiser of the bias; None: PyTorch's.
        transpose: the transposed convolution, as `torch.nn.ConvTranspose2d`.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    use_bias: bool = False
    kernel_init: Initializer = torch_uniform_kernel
    bias_init: Initializer | None = None
    transpose: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H', W', features), of the type of `x` and the kernel."""
        # Of a transpose PyTorch takes the width of the output for the fan-in: its kernel is
        # stored the other way round.
        width = self.features if self.transpose else x.shape[-1] // self.groups
        other = x.shape[-1] if self.transpose else self.features
        shape = (self.kernel, self.kernel, width, other)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        padding = self.kernel // 2 if self.padding is None else self.padding
        dtype = jnp.promote_types(x.dtype, kernel.dtype)
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        strides, layout = (self.stride,) * 2, ("NHWC", "HWIO", "NHWC")
        if self.transpose:
            border = (self.kernel - 1 - padding,) * 2
            y = lax.conv_transpose(
                x, kernel, strides, (border,) * 2, dimension_numbers=layout, transpose_kernel=True
            )
        else:
            y = lax.conv_general_dilated(
                x,
                kernel,
                strides,
                ((padding, padding),) * 2,
                dimension_numbers=layout,
                feature_group_count=self.groups,
            )
        if self.use_bias:
            bias_init = self.bias_init or torch_uniform(self.kernel**2 * width)
            bias = self.param("bias", bias_init, (self.features,), jnp.float32)
            y = y + bias.astype(dtype).reshape(1, 1, 1, -1)
        return y


# A convolution without bias that starts He-normal, as most networks have them.
conv = partial(Conv, kernel_init=he_normal_fan_out)


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), shape and float type kept; gradient 0 at 0 as `flax.linen.relu`; NaN stays NaN.

    On a CPU as a selection: XLA computes an elementwise operation again for each of its readers
    if it reads one array (a maximum with 0), but not if it reads two (the selection: a condition
    and x). Here that saves the normalisation and activation inside the transposed copy that the
    gradient of the next kernel reads.
    """
    return jnp.where(x <= 0, 0, x) if jax.default_backend() == "cpu" else nn.relu(x)


def avg_pool(x: jax.Array, kernel: int, stride: int | None = None, padding: int = 0) -> jax.Array:
    """Average pooling as `torch.nn.AvgPool2d`: the padding counts as zeros.

    Sums are taken in float32 or better; the result has the type of `x`.
    """
    border = ((padding, padding),) * 2
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return nn.avg_pool(wide, (kernel, kernel), (stride or kernel,) * 2, border).astype(x.dtype)


def max_pool(x: jax.Array, kernel: int, stride: int | None = None, padding: int = 0) -> jax.Array:
    """Max pooling as `torch.nn.MaxPool2d`: the padding never wins."""
    border = ((padding, padding),) * 2
    return nn.max_pool(x, (kernel, kernel), (stride or kernel,) * 2, border)


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Deal the channels of `groups` groups out in turn, as the ShuffleNets do: (..., C)."""
    split = x.reshape(*x.shape[:-1], groups, -1)
    return split.swapaxes(-1, -2).reshape(x.shape)

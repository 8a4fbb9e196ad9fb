"""What every network is built from: its outputs, batch normalisation, convolutions, initialisers.

The networks follow the public PyTorch implementations with which the distillation papers measured
their results, so that their checkpoints can be imported and their tables compared. Where PyTorch
and Flax differ (padding of strided convolutions, the stored variance, initialisers), this module
follows PyTorch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax
from jax.nn.initializers import Initializer

from ipwd_jax.models.normalize import normalize
from ipwd_jax.typing import PyTree


@struct.dataclass
class Outputs:
    """What a network returns for a batch of B images.

    Attributes:
        logits: (B, classes), before the softmax.
        embedding: (B, D), the pooled vector that the classifier reads.
        features: maps (B, H, W, C) from shallow to deep, without the embedding.
        preact: the same maps before their last activation. As in the reference, the first map
            (the stem) is the same array in `features` and `preact`.
        extra_logits: logits (B, classes) of each extra head, by name.
        pre_pool: (B, H, W, D), the map whose spatial mean is the embedding; None if the network
            does not return it. It need not be the last of `features`.
        classifier: kernel (D, classes) and bias (classes,) of the linear layer that computes the
            logits from the embedding; None if the network does not return them.
        strong: the outputs for strong views of the same images, without `classifier`; None if no
            loss term asks for these views.
    """

    logits: jax.Array
    embedding: jax.Array
    features: tuple[jax.Array, ...]
    preact: tuple[jax.Array, ...]
    extra_logits: dict[str, jax.Array] = struct.field(default_factory=dict)
    pre_pool: jax.Array | None = None
    classifier: tuple[jax.Array, jax.Array] | None = None
    strong: "Outputs | None" = None

    def with_strong(self, strong: "Outputs") -> "Outputs":
        """Add the outputs for strong views of the same images."""
        return dataclasses.replace(self, strong=dataclasses.replace(strong, classifier=None))

    def map_rows(self, function: Callable[[jax.Array], jax.Array]) -> "Outputs":
        """Apply `function` to every array that has one row per image, so not to `classifier`."""
        mapped = jax.tree.map(function, dataclasses.replace(self, classifier=None))
        return dataclasses.replace(mapped, classifier=self.classifier)


# N(0, 2 / (H W out)), not truncated, for a kernel (H, W, in, out); in a grouped convolution, `out`
# is the number of channels of all groups. He et al. 2015, https://arxiv.org/abs/1502.01852, eq. 14.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


# PyTorch's default for the kernels of Conv2d and Linear: U(-b, b), b = 1 / sqrt(fan_in).
torch_uniform_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_uniform(fan_in: int) -> Initializer:
    """Return PyTorch's initialiser for biases: U(-b, b), b = 1 / sqrt(fan_in of the kernel)."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: jax.random.uniform(
        key, shape, dtype, -bound, bound, out_sharding=out_sharding
    )


def frozen_norms(trainable: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The collection `frozen`, which keeps some BatchNorm layers in inference mode during training.

    Args:
        trainable: bools in the structure of a network's parameters.

    Returns:
        A variable `norm` for each module that has parameters of its own but trains none of them.
    """
    below = {name: frozen_norms(tree) for name, tree in trainable.items() if isinstance(tree, dict)}
    own = [leaf for leaf in trainable.values() if not isinstance(leaf, dict)]
    marked = {name: tree for name, tree in below.items() if tree}
    return {**marked, "norm": True} if own and not any(own) else marked


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with the semantics of PyTorch.

    A batch is normalised by its biased variance, but the running variance, which is kept for
    evaluation, is the unbiased one, n / (n - 1) times as large (`flax.linen.BatchNorm` keeps the
    biased one). The parameters are `scale` and `bias`, and the running statistics in `batch_stats`
    are `mean` and `var`, all (C,) float32. The running statistics change only in training mode, and
    only if `batch_stats` is mutable; initialisation leaves them at 0 and 1.

    Attributes:
        train: whether to normalise by the statistics of the batch. The running statistics are used
            otherwise, and also if the collection `frozen` has a variable `norm` for the layer (see
            `frozen_norms`).
        axis_name: mapped axis over which batch statistics are synchronised: every device normalises
            by the statistics of the global batch. If None, each device uses its own.
        eps: added to the variance.
        momentum: fraction of the running statistics that a step keeps (PyTorch's momentum is one
            minus this).
    """

    train: bool
    axis_name: str | None = None
    eps: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalise `x`.

        Args:
            x: (B, ..., C), any float type; statistics are computed in float32 or better.
            mask: (B,), float or bool, 0 for padding rows. These must be finite; they are normalised
                like the others, but do not contribute to the statistics. Without `axis_name`, a
                device that holds nothing but padding rows normalises by their own statistics.

        Returns:
            An array of the shape and type of `x`.
        """
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)

        dtype = jnp.promote_types(x.dtype, jnp.float32)
        mean, var, gain, shift = (
            vector.astype(dtype)
            for vector in (lax.stop_gradient(running_mean.value), running_var.value, scale, bias)
        )
        frozen = self.has_variable("frozen", "norm")
        if not self.train or frozen or self.is_initializing():
            # The shape of per-channel vectors at the rank of x.
            row = (1,) * (x.ndim - 1) + (-1,)
            d = x.astype(dtype) - mean.reshape(row)
            gain = lax.rsqrt(var + self.eps) * gain
            return (d * gain.reshape(row) + shift.reshape(row)).astype(x.dtype)
        valid = None if mask is None else mask != 0
        if valid is not None and self.axis_name is None:
            # Without statistics, activations would grow from layer to layer until they overflow.
            valid |= ~valid.any()
        y, *moments = normalize(self.eps, self.axis_name, x, mean, gain, shift, valid)
        if self.is_mutable_collection("batch_stats"):
            count, offset, var = map(lax.stop_gradient, moments)
            unbiased = var * count / jnp.maximum(count - 1, 1)
            running_mean.value += (1 - self.momentum) * offset
            running_var.value += (1 - self.momentum) * (unbiased - running_var.value)
        return y


class Linear(nn.Module):
    """A linear layer whose parameters `kernel` and `bias` are initialised as in PyTorch.

    Attributes:
        features: width of the output.
        kernel_init: initialiser of the kernel.
        bias_init: initialiser of the bias. None stands for PyTorch's, which depends on the width of
            the input; `flax.linen.Dense` cannot use it, because it does not pass that width on.
    """

    features: int
    kernel_init: Initializer = torch_uniform_kernel
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, D) -> (B, features), in the wider type of `x` and the bias."""
        fan_in = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (fan_in, self.features), jnp.float32)
        bias_init = self.bias_init or torch_uniform(fan_in)
        bias = self.param("bias", bias_init, (self.features,), jnp.float32)
        dtype = jnp.promote_types(x.dtype, bias.dtype)
        return jnp.dot(x, kernel, preferred_element_type=dtype) + bias[None]


def pool_and_classify(
    pre_pool: jax.Array,
    classifier: Linear,
    features: tuple[jax.Array, ...],
    preact: tuple[jax.Array, ...],
) -> Outputs:
    """The outputs of a network that ends with a global average pooling and a linear classifier.

    Args:
        pre_pool: (B, H, W, D), the map that is pooled.
        classifier: the linear layer, which the network must have named.
        features: see `Outputs`.
        preact: see `Outputs`.
    """
    embedding = pre_pool.mean((1, 2))
    logits = classifier(embedding)
    params = classifier.variables["params"]
    weights = params["kernel"], params["bias"]
    return Outputs(logits, embedding, features, preact, pre_pool=pre_pool, classifier=weights)


class Conv(nn.Module):
    """A square convolution, or its transpose, with PyTorch's padding and initialisation.

    The padding is explicit because "SAME" pads a strided convolution only on the far side, which
    shifts the map by one pixel compared with PyTorch's. `flax.linen.Conv` would be sufficient if
    its bias initialiser had access to the fan-in. The parameters are `kernel` (H, W, in / groups,
    features), or (H, W, features, in) for a transposed convolution, and `bias` (features,).

    Attributes:
        features: channels of the output.
        kernel: side of the kernel in pixels.
        stride: factor by which the map shrinks, or by which a transposed convolution enlarges it.
        padding: pixels on each side; None stands for kernel // 2.
        groups: number of groups of channels that are convolved separately.
        use_bias: whether there is a bias.
        kernel_init: initialiser of the kernel.
        bias_init: initialiser of the bias; None stands for PyTorch's.
        transpose: whether the convolution is transposed, as in `torch.nn.ConvTranspose2d`.
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
        """(B, H, W, C) -> (B, H', W', features), in the wider type of `x` and the kernel."""
        # For a transposed convolution, PyTorch computes the fan-in from the output channels, since
        # its kernel stores input and output channels the other way round.
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
            # Added in the type of the bias, in which its gradient, a sum over the map, is then too.
            wide = y.astype(jnp.promote_types(dtype, bias.dtype)) + bias.reshape(1, 1, 1, -1)
            y = wide.astype(dtype)
        return y


# A convolution without bias and with He-normal initialisation, as most of the networks use it.
conv = partial(Conv, kernel_init=he_normal_fan_out)


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0) in the shape and type of `x`; as in `flax.linen.relu`, the gradient at 0 is 0.

    NaN stays NaN. On a CPU this is a select operation, because there XLA recomputes an elementwise
    operation for each of its consumers if it reads one array, as a maximum with 0 does, but not if
    it reads two, as a select does (the condition and x). This avoids repeating the normalisation
    and activation inside the transposed copy that the gradient of the next kernel reads.
    """
    return jnp.where(x <= 0, 0, x) if jax.default_backend() == "cpu" else nn.relu(x)


def avg_pool(x: jax.Array, kernel: int, stride: int | None = None, padding: int = 0) -> jax.Array:
    """Average pooling as in `torch.nn.AvgPool2d`, which counts the padding as zeros.

    Sums are computed in float32 or better; the result has the type of `x`.
    """
    border = ((padding, padding),) * 2
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return nn.avg_pool(wide, (kernel, kernel), (stride or kernel,) * 2, border).astype(x.dtype)


def max_pool(x: jax.Array, kernel: int, stride: int | None = None, padding: int = 0) -> jax.Array:
    """Max pooling as in `torch.nn.MaxPool2d`, where the padding is never the maximum."""
    border = ((padding, padding),) * 2
    return nn.max_pool(x, (kernel, kernel), (stride or kernel,) * 2, border)


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Interleave the channels of `groups` groups, as the ShuffleNets do: (..., C) -> (..., C)."""
    split = x.reshape(*x.shape[:-1], groups, -1)
    return split.swapaxes(-1, -2).reshape(x.shape)

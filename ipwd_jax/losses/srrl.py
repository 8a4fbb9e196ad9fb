"""Yang et al., 2021 (SRRL): the teacher's own classifier reads the student's features."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ipwd_jax.losses.base import Batch, Term, classifier_of, pre_pool_of
from ipwd_jax.models.base import (
    BatchNorm,
    Conv,
    Outputs,
    he_normal_fan_out,
    relu,
    torch_uniform_kernel,
)
from ipwd_jax.precision import at_least_float32


def srrl_loss(
    embedding: jax.Array,
    teacher_embedding: jax.Array,
    teacher_logits: jax.Array,
    classifier: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Feature matching plus softmax regression, each a mean squared difference, per sample.

    Agrees with the two losses of SRRL in https://github.com/DefangChen/SimKD.

    Args:
        embedding: (B, D), the student's embedding after the connector.
        teacher_embedding: (B, D).
        teacher_logits: (B, C).
        classifier: the teacher's kernel (D, C) and bias (C,).

    Returns:
        (B,) loss.
    """
    kernel, bias = classifier
    logits = embedding @ kernel + bias[None]
    features = jnp.square(embedding - teacher_embedding).mean(axis=1)
    return features + jnp.square(logits - teacher_logits).mean(axis=1)


class SRRL(Term):
    """`srrl_loss` of the student's embedding, brought to the teacher's width, per sample.

    The connector is a 1 x 1 convolution without bias, BatchNorm and ReLU. The teacher's classifier
    is not trained, but the gradient passes through it. The largest intermediate array is
    (B, H, W, D) with the size of the student's last map and the teacher's width, or (B, D) if the
    connector reads the embedding.

    Attributes:
        connector: "embedding" if the connector reads the embedding, as in the CIFAR-100 code of
            SimKD's authors; "map" if it reads the map before the pooling, as in the authors' own
            code for ImageNet.
        axis_name: mapped axis over which batch statistics are synchronised.
    """

    connector: str = "embedding"
    axis_name: str | None = None

    paper = "Yang et al., 2021: Softmax regression representation learning"
    teacher_taps = ("logits", "embedding", "classifier")
    mixed_images = True
    choices = {"connector": ("embedding", "map")}  # noqa: RUF012

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        """The loss, (B,). Raises `ValueError` if a network lacks a tap that is read."""
        target = at_least_float32(teacher.embedding)
        if self.connector == "map":
            init, x = he_normal_fan_out, pre_pool_of(student)
        else:
            init, x = torch_uniform_kernel, at_least_float32(student.embedding)[:, None, None]
        x = Conv(target.shape[1], 1, kernel_init=init, name="connector.0")(x)
        norm = BatchNorm(train=True, axis_name=self.axis_name, name="connector.1")
        embedding = relu(norm(x, batch.mask)).mean((1, 2))
        return srrl_loss(
            embedding, target, at_least_float32(teacher.logits), classifier_of(teacher)
        )

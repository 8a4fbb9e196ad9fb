"""What a loss term is, and the values that it sees.

A term is a small `flax.linen` module. Its fields are its hyper-parameters, its call takes
`(student: Outputs, teacher: Outputs | None, batch: Batch)` and returns the loss of every sample,
shape (B,), or a scalar when samples are compared with each other. Trainable parts, running
statistics and memories are ordinary linen variables of the collections `params`, `batch_stats`
and `memory`; the train step carries them. Class attributes say what a term asks of the rest:

* `needs_teacher`: the teacher's `Outputs` are used.
* `heads`: extra linear heads of the student whose logits are used, each with whether its gradient
  reaches the backbone.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Batch:
    """The rows of one step on one device.

    Attributes:
        image: (B, H, W, channels) float32, augmented and normalised.
        label: (B,) int32 in 0..classes-1.
        index: (B,) int32, position in the training set.
        view: (B,) int32, which of the augmented views of the image this is.
        mask: (B,) float32, 0 for rows that only pad the batch.
        epoch: scalar int32, epochs finished in this stage.
    """

    image: jax.Array
    label: jax.Array
    index: jax.Array
    view: jax.Array
    mask: jax.Array
    epoch: jax.Array


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each sample with its label.

    The target is `(1 - label_smoothing) * onehot + label_smoothing / C`, as in
    `torch.nn.CrossEntropyLoss`.

    Args:
        logits: (B, C).
        labels: (B,) integers in 0..C-1.
        label_smoothing: mass spread evenly over the classes, in 0..1.

    Returns:
        (B,) loss in nats, of the dtype of `logits`.
    """
    log_p = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(axis=1)
    return loss

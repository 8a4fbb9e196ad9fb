"""Lv et al., 2024 (WKD): Wasserstein distances of the predictions and of the last maps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp

from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Batch, Term, late_decay
from ipwd_jax.losses.modules import ConvRegressor
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32

if TYPE_CHECKING:
    from ipwd_jax.data.base import Dataset
    from ipwd_jax.teacher import Teacher

_EPS = 1e-8  # added to costs and to the divisors of Sinkhorn's iterations


def transport_cost(distances: jax.Array, sharpen: float = 1.0) -> jax.Array:
    """`1 - exp(-sharpen distance)`, the cost of moving probability from class to class: (C, C)."""
    return 1 - jnp.exp(-sharpen * distances)


def wasserstein(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    cost: jax.Array,
    temperature: float = 8.0,
    regularization: float = 0.05,
    iterations: int = 10,
) -> jax.Array:
    """Regularised Wasserstein distance between the predictions over the classes but the target.

    Sinkhorn's iterations scale the kernel `exp(-cost / regularization)`, from constant factors on.
    The gradient flows through all of them. The target has no mass in either distribution, so that
    its row and its column do not count, and no kernel is needed for each sample.

    Args:
        student_logits: (B, C), C >= 2.
        teacher_logits: (B, C).
        labels: (B,) integers in 0..C-1.
        cost: (C, C), at least 0.
        temperature: T > 0 of both softmaxes.
        regularization: weight of the entropy, positive.
        iterations: number of iterations.

    Returns:
        (B,) distances, at least 0.
    """
    classes = student_logits.shape[1]
    target = jax.nn.one_hot(labels, classes, dtype=bool)

    def within(logits: jax.Array) -> jax.Array:
        z = logits / temperature
        log_p = z - jax.nn.logsumexp(z, axis=1, where=~target, keepdims=True)
        return jnp.where(target, 0, jnp.exp(jnp.where(target, 0, log_p)))

    def product(rows: jax.Array, matrix: jax.Array) -> jax.Array:
        # Full precision, because divisions by small numbers follow.
        return jnp.matmul(rows, matrix, precision="highest")

    a, b = within(student_logits), within(teacher_logits)
    cost = jnp.maximum(cost, 0) + _EPS
    kernel = jnp.exp(-cost / regularization)
    u = jnp.where(target, 0, 1 / (classes - 1)).astype(a.dtype)
    for _ in range(iterations):
        v = b / (product(u, kernel) + _EPS)
        u = a / (product(v, kernel.T) + _EPS)
    return (u * product(v, (kernel * cost).T)).sum(axis=1)


class WKDLogits(Term):
    """WKD-L: the target's cross-entropy plus the `wasserstein` distance between the other classes.

    The loss of a sample is `-p_t(y) ln p_s(y) + gamma W`. The weight of W falls to 0 at the end of
    the training, as a `late_decay`. Agrees with the authors' code. The largest intermediate arrays
    are (B, C), the factors of each iteration, and (C, C), the cost.

    Attributes:
        temperature: T of the softmaxes over the other classes; 8 for resnet32x4 -> resnet8x4.
        gamma: weight of the distance; 600 for resnet32x4 -> resnet8x4.
        regularization: weight of the entropy in Sinkhorn's iterations.
        iterations: their number.
        distances: what the costs are computed from: "cka", how similarly the teacher's last maps
            represent two classes (see `ipwd_jax.class_distances`), or "classifier", the cosine
            distances between the rows of its classifier.
        sharpen: see `transport_cost`.
        decay_from: last epoch in which the weight of the distance is whole.
        class_distances: (C, C); if (), all classes are equally far apart.
        epochs: number of epochs in the stage.
    """

    temperature: float = 8.0
    gamma: float = 600.0
    regularization: float = 0.05
    iterations: int = 10
    distances: str = "cka"
    sharpen: float = 1.0
    decay_from: int = 150
    class_distances: tuple = ()
    epochs: int = 240

    paper = "Lv et al., 2024: Wasserstein distance rivals KL divergence"
    teacher_taps = ("logits",)
    choices = {"distances": ("cka", "classifier")}  # noqa: RUF012
    not_negative = ("sharpen",)

    @nn.nowrap
    def check(self, dataset: "Dataset", teacher: nn.Module | None) -> None:
        """Raise `UserError` if the distances cannot be computed from this teacher's outputs."""
        if teacher is None:
            return
        image = jnp.zeros((1, *dataset.train.images.shape[1:]))
        outputs = jax.eval_shape(lambda: teacher.init_with_output(jax.random.key(0), image)[0])
        read = {"cka": "features", "classifier": "classifier"}[self.distances]
        if not getattr(outputs, read):
            raise UserError(
                f"config.terms.wkd_l.distances is {self.distances!r}, but the teacher's Outputs "
                f"have no `{read}`; choose the other kind of distances"
            )

    @nn.nowrap
    def of_teacher(self, teacher: "Teacher") -> "WKDLogits":
        """The term with the distances between the classes as this teacher sees them."""
        found = teacher.class_distances(self.distances)
        return self.clone(class_distances=tuple(map(tuple, found.tolist())))

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        s, t = (at_least_float32(x.logits) for x in (student, teacher))
        cost = transport_cost(self._distances(s.shape[1], s.dtype), self.sharpen)
        distance = wasserstein(
            s, t, batch.label, cost, self.temperature, self.regularization, self.iterations
        )
        target = jax.nn.one_hot(batch.label, s.shape[1], dtype=s.dtype)
        of_target = -(target * jax.nn.softmax(t) * jax.nn.log_softmax(s)).sum(axis=1)
        decay = late_decay(batch.epoch, self.decay_from, self.epochs).astype(s.dtype)
        return of_target + decay * self.gamma * distance

    @nn.nowrap
    def _distances(self, classes: int, dtype: jnp.dtype) -> jax.Array:
        if len(self.class_distances):
            return jnp.asarray(self.class_distances, dtype)
        return 1 - jnp.eye(classes, dtype=dtype)


def cell_statistics(map_: jax.Array, grid: int) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of each channel over the pixels of each cell of a grid.

    The variance is the unbiased one, to which 1e-5 is added before the square root is taken.

    Args:
        map_: (B, H, W, C).
        grid: number of cells per side.

    Returns:
        Two arrays (B, grid, grid, C).

    Raises:
        ValueError: the grid does not divide the map into equal cells of at least two pixels, or the
            map has only one.
    """
    rows, height, width, channels = map_.shape
    pixels = height * width // grid**2
    if height * width < 2:
        raise ValueError(
            "the teacher's last map has a single pixel, so wkd_f cannot compute a deviation; use "
            "larger images or another teacher"
        )
    if height % grid or width % grid or pixels < 2:
        raise ValueError(
            f"config.terms.wkd_f.grid is {grid}, which does not divide the teacher's last map of "
            f"{height}x{width} pixels into equal cells of at least two pixels; set it to 1"
        )
    cells = map_.reshape(rows, grid, height // grid, grid, width // grid, channels)
    mean = cells.mean((2, 4), keepdims=True)
    variance = jnp.square(cells - mean).sum((2, 4)) / (pixels - 1)
    return mean[:, :, 0, :, 0], jnp.sqrt(variance + 1e-5)


def wkd_f_loss(
    student: Sequence[jax.Array], teacher: Sequence[jax.Array], mean_ratio: float
) -> jax.Array:
    """Squared 2-Wasserstein distance between Gaussians with diagonal covariances, per sample.

    Args:
        student: means and standard deviations (B, grid, grid, C).
        teacher: the same of the teacher.
        mean_ratio: weight of the means, relative to the standard deviations.

    Returns:
        (B,), summed over the channels and averaged over the cells.
    """
    means, deviations = (jnp.square(s - t) for s, t in zip(student, teacher, strict=True))
    return (mean_ratio * means + deviations).sum(axis=3).mean(axis=(1, 2))


class WKDFeatures(Term):
    """WKD-F: `wkd_f_loss` between the last maps, per sample.

    A convolution, BatchNorm and ReLU (`ConvRegressor`) bring the student's last map to the shape of
    the teacher's. The weight of the loss falls to 0 at the end of the training, as a `late_decay`.
    Agrees with the authors' code. The largest intermediate array is (B, H, W, C), the teacher's
    map.

    Attributes:
        mean_ratio: weight of the means, relative to the standard deviations.
        grid: number of cells per side, in each of which the Gaussians are compared.
        decay_from: last epoch in which the weight of the loss is whole.
        axis_name: mapped axis over which batch statistics are synchronised.
        epochs: number of epochs in the stage.
    """

    mean_ratio: float = 4.0
    grid: int = 1
    decay_from: int = 150
    axis_name: str | None = None
    epochs: int = 240

    paper = "Lv et al., 2024: Wasserstein distance rivals KL divergence"
    teacher_taps = ("features",)
    not_negative = ("mean_ratio",)
    mixed_images = True

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        """The loss, (B,). Raises `ValueError` if the maps do not fit the regressor or the grid."""
        s, t = (at_least_float32(x.features[-1]) for x in (student, teacher))
        regressor = ConvRegressor(t.shape, self.axis_name, name="regressor")
        found = cell_statistics(regressor(s, batch.mask), self.grid)
        loss = wkd_f_loss(found, cell_statistics(t, self.grid), self.mean_ratio)
        return late_decay(batch.epoch, self.decay_from, self.epochs).astype(loss.dtype) * loss

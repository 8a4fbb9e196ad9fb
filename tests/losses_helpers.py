"""What several tests of the losses share: batches, the outputs of networks, variables of a term."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ipwd_jax.losses.base import Batch
from ipwd_jax.models.base import Outputs

KEY = jax.random.key(0)
# The labels of a training set of 60 samples in five classes.
TRAIN_LABELS = jnp.arange(60, dtype=jnp.int32) % 5


def batch(rows, mask=None, epoch=0, labels=TRAIN_LABELS):
    """The first `rows` samples of a training set with these labels; the mask is 1 by default."""
    index = jnp.arange(rows, dtype=jnp.int32)
    return Batch(
        image=jnp.zeros((rows, 4, 4, 3)),
        label=labels[:rows],
        index=index,
        view=index,
        mask=jnp.ones(rows) if mask is None else jnp.asarray(mask, jnp.float32),
        epoch=jnp.int32(epoch),
        train_labels=labels,
        key=KEY,
    )


def _wave(a, b, scale):
    i = np.arange(1, 41)
    return (scale * (np.sin(a * i) + 0.5 * np.cos(b * i))).reshape(4, 10)


# Logits of two heads for four samples in ten classes, and the labels of the samples.
KD_LOGITS, CLS_LOGITS = _wave(0.7, 1.9, 2), _wave(1.1, 0.3, 3)
LABELS = jnp.array([1, 7, 3, 3])

# (H, W, C) of a network's maps, stem first, and the length of its embedding. Sizes and channels
# differ so that every kind of connector occurs.
STUDENT = (((8, 8, 2), (8, 8, 2), (4, 4, 3), (2, 2, 4)), 4)
TEACHER = (((8, 8, 2), (8, 8, 3), (8, 8, 3), (2, 2, 4)), 5)
# Two maps less, for what is slow to compile.
SHORT_STUDENT, SHORT_TEACHER = (((8, 8, 2), (4, 4, 3)), 4), (((8, 8, 2), (8, 8, 3)), 5)
# Smaller maps, and one less. After the stem, the student's map is larger once, the teacher's once.
SMALL_STUDENT = (((4, 4, 2), (4, 4, 3), (2, 2, 4)), 4)
SMALL_TEACHER = (((4, 4, 2), (2, 2, 5), (4, 4, 3)), 5)


def outputs(shapes, rows, make: Callable = jnp.zeros, classes=5):
    """`Outputs` with maps and an embedding of these shapes; `make` makes an array of a shape."""
    maps, width = shapes
    features = tuple(make((rows, *shape)) for shape in maps)
    return Outputs(
        logits=make((rows, classes)),
        embedding=make((rows, width)),
        features=features,
        preact=(features[0], *(make((rows, *shape)) for shape in maps[1:])),
    )


def normal(seed, scale=1.0):
    """A function that draws a normal NumPy array of a shape, each call another one."""
    rng = np.random.default_rng(seed)
    return lambda shape: scale * rng.standard_normal(shape)


def random_outputs(shapes, rows, seed):
    """`Outputs` of normal JAX arrays."""
    draw = normal(seed)
    return outputs(shapes, rows, lambda shape: jnp.asarray(draw(shape)))


# By name: a function that makes an array from a generator and a shape. Most are hard to handle.
KINDS = {
    "zero": lambda rng, shape: np.zeros(shape),
    "constant": lambda rng, shape: np.full(shape, 3.0),
    "identical": lambda rng, shape: np.broadcast_to(rng.standard_normal(shape[1:]), shape),
    "opposite": lambda rng, shape: np.broadcast_to(
        np.resize([1.0, -1.0], shape[0]).reshape(-1, *(1,) * (len(shape) - 1)), shape
    ),
    "sparse": lambda rng, shape: np.maximum(rng.standard_normal(shape) - 1, 0),
    "large": lambda rng, shape: 1e4 * rng.choice([-1, 1], shape),
    "huge": lambda rng, shape: 1e4 * rng.standard_normal(shape),
    "tiny": lambda rng, shape: 1e-12 * rng.standard_normal(shape),
    "normal": lambda rng, shape: rng.standard_normal(shape),
}


def init(term, student, teacher):
    """Variables of the term; drawn by NumPy, since the draws of many shapes compile slowly."""
    shapes = jax.eval_shape(term.init, KEY, student, teacher, batch(len(student.logits)))
    rng = np.random.default_rng(0)

    def draw(path, x):
        ones = path[-1].key in ("scale", "var")
        return jnp.asarray(
            np.ones(x.shape) if ones else 0.3 * rng.standard_normal(x.shape), x.dtype
        )

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnames=("term", "method"))
def value(term, variables, student, teacher, rows, method=None):
    """What the term (or its `method`) returns, compiled."""
    mutable = ["batch_stats", "memory"]
    return term.apply(variables, student, teacher, rows, mutable=mutable, method=method)[0]

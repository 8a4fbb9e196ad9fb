"""Batches, outputs of networks, and variables of terms for the tests of several losses."""

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
    """Return the first `rows` samples of a training set; by default none is a padding row."""
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

# The shapes (H, W, C) of a network's maps, stem first, and the width of its embedding. Sizes and
# channels differ so that every kind of connector occurs.
STUDENT = (((8, 8, 2), (8, 8, 2), (4, 4, 3), (2, 2, 4)), 4)
TEACHER = (((8, 8, 2), (8, 8, 3), (8, 8, 3), (2, 2, 4)), 5)
# Two maps fewer, for terms that are slow to compile.
SHORT_STUDENT, SHORT_TEACHER = (((8, 8, 2), (4, 4, 3)), 4), (((8, 8, 2), (8, 8, 3)), 5)
# Smaller maps, and one fewer. Of the two after the stem, first the student's map is larger, then
# the teacher's.
SMALL_STUDENT = (((4, 4, 2), (4, 4, 3), (2, 2, 4)), 4)
SMALL_TEACHER = (((4, 4, 2), (2, 2, 5), (4, 4, 3)), 5)


def outputs(shapes, rows, make: Callable = jnp.zeros, classes=5):
    """Return `Outputs` with maps and an embedding of these shapes; `make` makes each array."""
    maps, width = shapes
    features = tuple(make((rows, *shape)) for shape in maps)
    return Outputs(
        logits=make((rows, classes)),
        embedding=make((rows, width)),
        features=features,
        preact=(features[0], *(make((rows, *shape)) for shape in maps[1:])),
    )


def normal(seed, scale=1.0):
    """Return a function that draws a new normal NumPy array of a given shape in each call."""
    rng = np.random.default_rng(seed)
    return lambda shape: scale * rng.standard_normal(shape)


def random_outputs(shapes, rows, seed):
    """Return `Outputs` of normal JAX arrays."""
    draw = normal(seed)
    return outputs(shapes, rows, lambda shape: jnp.asarray(draw(shape)))


# Name -> a function that makes an array from a generator and a shape. Most of these arrays are hard
# to handle.
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
    """Return variables of the term, drawn with NumPy because JAX compiles each shape's draw."""
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
    """Return what the compiled term, or its `method`, returns."""
    mutable = ["batch_stats", "memory"]
    return term.apply(variables, student, teacher, rows, mutable=mutable, method=method)[0]


def assert_close(found, expected):
    """Compare two pytrees to 1e-9 of each number and of the largest one."""
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * scale), found, expected
    )

"""RKD against loops, and for samples that are close together."""

import jax
import jax.numpy as jnp
import numpy as np

from ipwd_jax.losses.rkd import rkd_losses


def test_rkd_against_loops():
    student, teacher = np.random.default_rng(0).standard_normal((2, 4, 3))

    def huber(x):
        return x * x / 2 if abs(x) < 1 else abs(x) - 0.5

    def distances(x):
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return d / d[d > 0].mean()

    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        return a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)

    distance = np.mean(
        [huber(x) for x in (distances(student) - distances(teacher)).ravel().tolist()]
    )
    angle = np.mean(
        [huber(cosine(student, *ijk) - cosine(teacher, *ijk)) for ijk in np.ndindex(4, 4, 4)]
    )
    with jax.enable_x64(True):
        found = rkd_losses(jnp.asarray(student), jnp.asarray(teacher), jnp.ones(4))
    np.testing.assert_allclose(found, [distance, angle], rtol=1e-9)


def test_rkd_of_near_samples_does_not_cancel():
    x = 100 + 1e-2 * np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    exact = x.astype(np.float64)
    teacher = np.random.default_rng(1).standard_normal((4, 8))
    with jax.enable_x64(True):
        expected = rkd_losses(jnp.asarray(exact), jnp.asarray(teacher), jnp.ones(4))
    found = rkd_losses(jnp.asarray(x), jnp.asarray(teacher, jnp.float32), jnp.ones(4))
    np.testing.assert_allclose(found, expected, rtol=1e-4)

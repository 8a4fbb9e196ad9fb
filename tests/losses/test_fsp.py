"""FSP against loops, and networks that it cannot compare."""

import numpy as np
import pytest
from losses_helpers import STUDENT, TEACHER, outputs, random_outputs

from ipwd_jax.losses.fsp import fsp_loss


class TestFSP:
    def test_against_loops(self):
        student, teacher = (random_outputs(STUDENT, 2, seed).features for seed in (1, 2))

        def pooled(x, size):
            k = x.shape[0] // size
            return x.reshape(size, k, size, k, -1).mean(axis=(1, 3))

        def matrix(a, b):
            size = min(len(a), len(b))
            a, b = (pooled(x, size).reshape(size * size, -1) for x in (a, b))
            return sum(np.outer(x, y) for x, y in zip(a, b, strict=True)) / size**2

        expected = np.zeros(2)
        for row in range(2):
            for k in range(3):
                s, t = (
                    matrix(*(np.asarray(x[row]) for x in maps[k : k + 2]))
                    for maps in (student, teacher)
                )
                expected[row] += ((s - t) ** 2).mean()
        np.testing.assert_allclose(fsp_loss(student, teacher), expected, rtol=1e-4)

    def test_equal_networks_have_no_loss(self):
        maps = random_outputs(STUDENT, 2, 1).features
        assert np.array_equal(fsp_loss(maps, maps), np.zeros(2))

    def test_unequal_channels_are_an_error(self):
        maps = [outputs(s, 2).features for s in (STUDENT, TEACHER)]
        with pytest.raises(ValueError, match=r"\[2, 2, 3, 4\].*\[2, 3, 3, 4\]"):
            fsp_loss(*maps)

"""OFD's margins against numerical integrals, and its distance against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_helpers import STUDENT, TEACHER, batch, init, random_outputs, value
from scipy import integrate, stats

from ipwd_jax.losses.ofd import OFD, ofd_distance, ofd_margin


class TestOFD:
    @given(st.floats(0.05, 3), st.floats(-3, 3), st.booleans())
    @settings(max_examples=50)
    def test_margin_is_the_mean_of_the_negative_part(self, spread, mean, flipped):
        tail = stats.norm.cdf(0, mean, spread)
        moment, _ = integrate.quad(
            lambda x: x * stats.norm.pdf(x, mean, spread), min(mean, 0) - 12 * spread, 0,
            points=[min(mean, 0) - spread], limit=200,
        )  # fmt: skip
        if abs(tail - 0.001) < 1e-6:
            return
        expected = moment / tail if tail > 0.001 else -3 * spread
        with jax.enable_x64(True):
            scale = jnp.asarray([-spread if flipped else spread], jnp.float64)
            margin = ofd_margin(scale, jnp.asarray([mean], jnp.float64))
        np.testing.assert_allclose(margin, [expected], rtol=1e-7)

    def test_channels_without_spread(self):
        margin = ofd_margin(jnp.zeros(3), jnp.array([-2.0, 0.0, 2.0]))
        np.testing.assert_allclose(margin, [-2, 0, 0])

    def test_distance_against_loops(self):
        rng = np.random.default_rng(0)
        s, t = rng.normal(size=(2, 2, 3, 3, 4))
        margin = -np.abs(rng.normal(size=4))
        expected = np.zeros(2)
        for row, i, j, c in np.ndindex(s.shape):
            x, y, m = s[row, i, j, c], t[row, i, j, c], margin[c]
            if y > 0 or (m < y <= 0 and x > y):
                expected[row] += (x - y) ** 2
            elif y <= m and x > m:
                expected[row] += (x - m) ** 2
        found = ofd_distance(*(jnp.asarray(x, jnp.float32) for x in (s, t, margin)))
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_margins_of_the_teacher(self):
        student, teacher = random_outputs(STUDENT, 3, 1), random_outputs(TEACHER, 3, 2)
        channels = [shape[-1] for shape in TEACHER[0][1:]]
        norms = {scale: tuple(((scale,) * c, (0.0,) * c) for c in channels) for scale in (1.0, 2.0)}
        variables = init(OFD(), student, teacher)
        default, same, other = (
            value(OFD(preact_norms=given), variables, student, teacher, batch(3))
            for given in ((), norms[1.0], norms[2.0])
        )
        assert np.array_equal(default, same) and not np.allclose(default, other)
        with pytest.raises(ValueError, match="preact_norms"):
            value(OFD(preact_norms=norms[1.0][1:]), variables, student, teacher, batch(3))

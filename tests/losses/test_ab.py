"""AB's loss by hand."""

import jax.numpy as jnp
import numpy as np

from ipwd_jax.losses.ab import ab_loss


def test_ab_counts_only_neurons_on_the_wrong_side_of_the_margin():
    student = np.array([-2.0, -0.5, 0.5, 2.0, -2.0, -0.5, 0.5, 2.0]).reshape(1, 2, 2, 2)
    teacher = np.array([-1.0, -1.0, 0.0, -1.0, 1.0, 1.0, 1.0, 1.0]).reshape(1, 2, 2, 2)
    one_map = (0.5**2 + 1.5**2 + 3**2) + (3**2 + 1.5**2 + 0.5**2)
    maps = [[jnp.asarray(x)] * 3 for x in (student, teacher)]
    expected = one_map * (1 + 1 / 2 + 1 / 4) * 3 / 1000
    np.testing.assert_allclose(ab_loss(*maps), [expected], rtol=1e-6)

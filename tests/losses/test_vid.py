"""The initial variances of VID."""

import jax
import numpy as np
import pytest
from losses_helpers import SMALL_STUDENT, SMALL_TEACHER, batch, outputs

from ipwd_jax.losses.vid import VID


def test_vid_variance_starts_at_five():
    student, teacher = (outputs(shapes, 2) for shapes in (SMALL_STUDENT, SMALL_TEACHER))
    params = jax.jit(VID().init)(jax.random.key(1), student, teacher, batch(2))["params"]
    for part in params.values():
        variance = np.log1p(np.exp(part["log_scale"])) + 1e-5
        np.testing.assert_allclose(variance, 5, rtol=1e-6)


@pytest.mark.parametrize("variance", [2e-5, 5.0, 45.0, 1e4])
def test_variances_start_where_they_are_set(variance):
    maps = outputs((((2, 2, 3), (2, 2, 3)), 3), 4)
    variables = VID(variance=variance).init(jax.random.key(0), maps, maps, batch(4))
    log_scale = np.float64(variables["params"]["0"]["log_scale"])
    np.testing.assert_allclose(np.logaddexp(0, log_scale) + 1e-5, variance, rtol=1e-5)

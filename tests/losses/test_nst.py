"""NST against the sum over all pairs of channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_helpers import normal

from ipwd_jax.losses.nst import nst_loss


@pytest.mark.parametrize("channels", [2, 40])
def test_nst_against_all_products(channels):
    with jax.enable_x64(True):
        s, t = (jnp.asarray(normal(c)((2, 3, 3, c))) for c in (3, channels))
        found = nst_loss(s, t)

    def unit(x):
        x = np.asarray(x).reshape(2, 9, -1)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def kernel(a, b):
        return (np.einsum("bpc,bpd->bcd", a, b) ** 2).mean(axis=(1, 2))

    s, t = unit(s), unit(t)
    np.testing.assert_allclose(found, kernel(s, s) + kernel(t, t) - 2 * kernel(s, t), rtol=1e-9)

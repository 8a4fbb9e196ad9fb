"""MixUp and CutMix: what is drawn, and what becomes of pixels and shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ipwd_jax.data import mixing

RNG = np.random.default_rng(0)
draw = jax.jit(mixing.draw, static_argnums=(2, 3, 4))


def test_draws_follow_their_distributions():
    index = jnp.arange(4000)
    drawn = draw(jax.random.key(0), index, 10, 0.4, 1.0)
    share = np.asarray(drawn.share)
    assert share[~drawn.pastes].min() >= 0.5 and share.min() >= 0 and share.max() <= 1
    assert np.bincount(drawn.partner).min() > 330  # of 400 on average
    assert abs(np.mean(drawn.pastes) - 0.5) < 0.03
    expected = scipy.stats.beta(0.4, 0.4).expect(lambda x: np.maximum(x, 1 - x))
    assert share[~drawn.pastes].mean() == pytest.approx(expected, abs=0.01)
    # CutMix keeps the share that is drawn: a box can cover more than half of the image.
    assert scipy.stats.kstest(share[drawn.pastes], "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("mixup", "cutmix", "pastes"), [(1.0, 0.0, False), (0.0, 1.0, True)])
def test_one_of_them_alone(mixup, cutmix, pastes):
    assert (draw(jax.random.key(0), jnp.arange(50), 10, mixup, cutmix).pastes == pastes).all()


def test_a_sample_is_mixed_alike_in_any_batch():
    index = jnp.array([4, 0, 7, 2])
    whole = draw(jax.random.key(3), index, 10, 0.4, 1.0)
    part = draw(jax.random.key(3), index[2:], 10, 0.4, 1.0)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:], b), whole, part)


def test_mixup_averages_pixels():
    images, partners = jnp.asarray(RNG.normal(size=(2, 3, 5, 6, 2)), jnp.float32)
    share = jnp.array([0.5, 0.75, 1.0])
    rest = jnp.zeros(3)
    how = mixing.Mixing(jnp.zeros(3, jnp.int32), share, jnp.zeros(3, bool), rest, rest)
    mixed, found = mixing.apply(images, partners, how)
    by_hand = [s * a + (1 - s) * b for s, a, b in zip(share, images, partners, strict=True)]
    np.testing.assert_allclose(mixed, jnp.stack(by_hand), rtol=1e-6)
    np.testing.assert_array_equal(found, share)


@pytest.mark.parametrize(
    ("share", "row", "column", "box"),
    [
        (0.75, 0.5, 0.5, (slice(2, 6), slice(3, 9))),  # half of each side, in the middle
        (0.75, 0.0, 0.99, (slice(0, 2), slice(8, 12))),  # cut off at the corner
        (1.0, 0.3, 0.3, (slice(0, 0), slice(0, 0))),  # nothing
    ],
)
def test_cutmix_pastes_a_box(share, row, column, box):
    images, partners = jnp.zeros((1, 8, 12, 1)), jnp.ones((1, 8, 12, 1))
    one = jnp.ones(1)
    how = mixing.Mixing(
        jnp.zeros(1, jnp.int32), share * one, jnp.ones(1, bool), row * one, column * one
    )
    mixed, found = mixing.apply(images, partners, how)
    expected = np.zeros((8, 12))
    expected[box] = 1
    np.testing.assert_array_equal(mixed[0, :, :, 0], expected)
    assert found[0] == pytest.approx(1 - expected.mean())

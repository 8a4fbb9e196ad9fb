"""Crops and flips agree with NumPy and depend on nothing but seed, epoch and index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ipwd_jax.data import augment

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("padding", "flip", "views"), [(4, True, 162), (1, False, 9), (0, True, 2)]
)
def test_every_view_is_a_crop_of_the_black_bordered_image(padding, flip, views):
    assert augment.num_views(padding, flip) == views
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (views, 6, 5, 3), np.uint8)
    got = augment.apply_views(jnp.asarray(images), jnp.arange(views), padding, flip)
    assert got.dtype == jnp.uint8
    border = ((padding, padding), (padding, padding), (0, 0))
    expected = []
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            for mirrored in range(1 + flip):
                image = np.pad(images[len(expected)], border)[row : row + 6, column : column + 5]
                expected.append(image[:, ::-1] if mirrored else image)
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(("padding", "flip"), [(1, True), (2, False), (0, True)])
def test_rotations_are_those_of_numpy(padding, flip):
    """SSKD's loader mirrors an image, rotates it, and then crops each rotation by itself."""
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (8, 6, 6, 3), np.uint8)
    index = jnp.arange(8)
    views = augment.draw_rotated_views(KEY, jnp.int32(1), index, padding, flip)
    got = augment.apply_rotated_views(jnp.asarray(images), views, padding, flip)
    assert got.shape == (32, 6, 6, 3) and got.dtype == jnp.uint8
    border, side = ((padding, padding), (padding, padding), (0, 0)), 2 * padding + 1
    expected = []
    for image, of_image in zip(images, views.tolist(), strict=True):
        mirrored = bool(flip and of_image[0] % 2)
        for turn, view in enumerate(of_image):
            row, column = divmod(view // (1 + flip), side)
            column = side - 1 - column if mirrored else column  # the corner is given unmirrored
            turned = np.rot90(image[:, ::-1] if mirrored else image, turn)
            expected.append(np.pad(turned, border)[row : row + 6, column : column + 6])
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("flip", [True, False])
def test_each_rotation_has_a_crop_of_its_own(flip):
    count, index = augment.num_views(4, flip), jnp.arange(3000)
    views = np.asarray(augment.draw_rotated_views(KEY, jnp.int32(2), index, 4, flip))
    assert np.array_equal(views[:, 0], augment.draw_views(KEY, jnp.int32(2), index, count))
    if flip:  # all four are mirrored, or none is
        assert (views % 2 == views[:, :1] % 2).all() and 0.4 < (views % 2).mean() < 0.6
    crops = views // (1 + flip)
    for first in range(4):
        assert set(crops[:, first]) == set(range(81))
        for second in range(first):
            assert (crops[:, first] == crops[:, second]).mean() < 0.05


def test_normalised_border_is_as_black_as_a_black_pixel():
    image = jnp.zeros((1, 4, 4, 3), jnp.uint8).at[:, 1:3, 1:3].set(255)
    mean, std = jnp.array([0.5, 0.4, 0.3]), jnp.array([0.2, 0.25, 0.5])
    corner = augment.normalize(augment.apply_views(image, jnp.array([0]), 4, False), mean, std)
    np.testing.assert_allclose(corner[0, 0, 0], -mean / std, rtol=1e-6)
    white = augment.normalize(image, mean, std)[0, 1, 1]
    np.testing.assert_allclose(white, (1 - mean) / std, rtol=1e-6)


def test_views_are_uniform():
    drawn = np.concatenate(
        [augment.draw_views(KEY, jnp.int32(epoch), jnp.arange(5000), 162) for epoch in range(4)]
    )
    counts = np.bincount(drawn, minlength=162)
    assert len(counts) == 162
    chi2 = ((counts - 20000 / 162) ** 2 / (20000 / 162)).sum()
    assert 100 < chi2 < 235  # 161 degrees of freedom: 0.01 % to 99.99 %


def test_views_depend_on_seed_epoch_and_index_alone():
    together = augment.draw_views(KEY, jnp.int32(3), jnp.arange(100), 162)
    alone = augment.draw_views(KEY, jnp.int32(3), jnp.array([70, 7]), 162)
    assert np.array_equal(alone, together[jnp.array([70, 7])])
    for other in (
        augment.draw_views(KEY, jnp.int32(4), jnp.arange(100), 162),
        augment.draw_views(jax.random.key(1), jnp.int32(3), jnp.arange(100), 162),
    ):
        assert (np.asarray(other) == together).mean() < 0.1


def test_order_is_a_new_permutation_for_each_seed_and_epoch():
    orders = [augment.epoch_order(jax.random.key(s), e, 1000) for s, e in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert order.dtype == np.int32 and np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(orders[0], augment.epoch_order(KEY, 0, 1000))
    assert all((orders[0] == other).mean() < 0.02 for other in orders[1:])


@pytest.mark.parametrize(
    ("size", "batch_size", "devices"),
    [(50, 16, 1), (50, 16, 8), (48, 16, 4), (50, 15, 4), (3, 8, 8)],
)
def test_batches_hold_each_sample_once_in_order(size, batch_size, devices):
    order = augment.epoch_order(KEY, 0, size)
    index, mask = augment.epoch_batches(order, batch_size, devices)
    steps = -(-size // batch_size)
    assert index.shape == mask.shape == (steps, devices, -(-batch_size // devices))
    assert np.array_equal(index[mask > 0], order)
    per_step = mask.sum(axis=(1, 2))
    assert (per_step[:-1] == batch_size).all() and per_step[-1] == size - (steps - 1) * batch_size
    assert index.min() >= 0 and index.max() < size


def test_cifar_has_782_steps_the_last_of_16_images():
    index, mask = augment.epoch_batches(np.arange(50_000, dtype=np.int32), 64, 1)
    assert index.shape == (782, 1, 64) and mask[-1].sum() == 16

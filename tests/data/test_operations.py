"""Every operation of RandAugment equals Pillow's, pixel by pixel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from ipwd_jax.data import operations

RNG = np.random.default_rng(0)
IMAGES = {
    "noise": RNG.integers(0, 256, (12, 15, 3), np.uint8),
    "dark": RNG.integers(30, 90, (12, 15, 3), np.uint8),
    "smooth": (np.arange(16 * 16 * 3).reshape(16, 16, 3) // 3 % 256).astype(np.uint8),
    "flat": np.full((12, 15, 3), 77, np.uint8),
}


def transform(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def enhance(kind):
    return lambda image, change: kind(image).enhance(1 + change)


BY_PILLOW = {
    operations.identity: (lambda image, _: image, [0.0]),
    operations.shear_x: (lambda i, s: transform(i, (1, s, 0, 0, 1, 0)), [0.09, -0.3, 0.27]),
    operations.shear_y: (lambda i, s: transform(i, (1, 0, 0, s, 1, 0)), [0.09, -0.3, 0.27]),
    operations.translate_x: (
        lambda i, s: transform(i, (1, 0, -int(s), 0, 1, 0)), [0.0, 2.9, -4.2, 20.0],
    ),
    operations.translate_y: (
        lambda i, s: transform(i, (1, 0, 0, 0, 1, -int(s))), [0.0, 2.9, -4.2, 20.0],
    ),
    operations.rotate: (lambda i, s: i.rotate(s, Image.Resampling.NEAREST), [9.0, -17.0, 30.0]),
    operations.brightness: (enhance(ImageEnhance.Brightness), [0.27, -0.9, 0.9]),
    operations.color: (enhance(ImageEnhance.Color), [0.27, -0.9, 0.9]),
    operations.contrast: (enhance(ImageEnhance.Contrast), [0.27, -0.9, 0.9]),
    operations.sharpness: (enhance(ImageEnhance.Sharpness), [0.27, -0.9, 0.9]),
    operations.posterize: (lambda i, s: ImageOps.posterize(i, int(s)), [4.0, 7.0, 8.0]),
    operations.solarize: (lambda i, s: ImageOps.solarize(i, s), [0.0, 127.5, 255.0]),
    operations.autocontrast: (lambda i, _: ImageOps.autocontrast(i), [0.0]),
    operations.equalize: (lambda i, _: ImageOps.equalize(i), [0.0]),
}  # fmt: skip


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("operation", BY_PILLOW, ids=lambda f: f.__name__)
def test_equals_pillow(operation, image):
    by_pillow, strengths = BY_PILLOW[operation]
    ours = jax.jit(operation)
    for strength in strengths:
        expected = np.asarray(by_pillow(Image.fromarray(image), strength))
        found = ours(jnp.asarray(image), jnp.float32(strength))
        if (
            operation is operations.autocontrast
        ):  # Pillow rounds twice; the exact value is never less
            assert set(np.unique(found - expected)) <= {0, 1}
        else:
            np.testing.assert_array_equal(found, expected)


def test_every_operation_is_compared():
    assert [operation for operation, _, _ in operations.OPERATIONS] == list(BY_PILLOW)


def test_strengths_are_those_of_torchvision():
    """The ranges that torchvision documents, at magnitude 9 of 30 and for 32x32 pixels."""
    found = {f.__name__: strength(9, 32, 32) for f, strength, _ in operations.OPERATIONS}
    expected = {"identity": 0, "shear_x": 0.09, "shear_y": 0.09, "rotate": 9, "posterize": 7}
    expected |= {"translate_x": 4.350453, "translate_y": 4.350453, "solarize": 178.5}
    expected |= dict.fromkeys(["brightness", "color", "contrast", "sharpness"], 0.27)
    assert found == pytest.approx(expected | {"autocontrast": 0, "equalize": 0}, abs=1e-6)


def test_a_sample_is_distorted_alike_in_any_batch():
    images = jnp.asarray(RNG.integers(0, 256, (6, 8, 8, 1), np.uint8))
    distort = jax.jit(operations.rand_augment, static_argnums=(3, 4))
    key, index = jax.random.key(0), jnp.array([5, 3, 9, 9, 1, 0])
    whole = distort(key, images, index, 2, 15)
    assert whole.shape == images.shape and whole.dtype == jnp.uint8
    np.testing.assert_array_equal(distort(key, images[:3], index[:3], 2, 15), whole[:3])
    assert not np.array_equal(whole, distort(jax.random.key(1), images, index, 2, 15))


def test_strengths_of_strong_views():
    """The operations of Jin et al., 2023, with the ranges of their strengths."""
    found = {
        f.__name__: tuple(ends) for f, *ends in operations.STRONG_OPERATIONS if f.__name__[0] != "<"
    }
    expected = {"shear_x": (-0.3, 0.3), "shear_y": (-0.3, 0.3), "rotate": (-30, 30)}
    expected |= {"posterize": (4, 8), "solarize": (0, 256)}
    # A factor of 0.05 to 0.95 is a change by -0.95 to -0.05.
    weaker = ("brightness", "color", "contrast", "sharpness")
    expected |= dict.fromkeys(weaker, (-0.95, -0.05))
    assert found == expected | dict.fromkeys(["identity", "autocontrast", "equalize"], (0, 0))
    assert [f.__name__ for f, _, _ in operations.OPERATIONS if f.__name__ not in found] == [
        "translate_x", "translate_y",
    ]  # fmt: skip
    image = jnp.asarray(IMAGES["noise"])
    (move_x, *ends_x), (move_y, *ends_y) = operations.STRONG_OPERATIONS[3:5]
    assert ends_x == ends_y == [-0.3, 0.3]
    np.testing.assert_array_equal(move_x(image, 0.3)[:, 4:], image[:, :-4])  # 4.5 pixels
    np.testing.assert_array_equal(move_y(image, -0.3)[:-4], image[4:])  # 3.6 pixels


def test_cut_out():
    image = jnp.asarray(IMAGES["noise"])  # of 12x15 pixels
    found = np.asarray(operations.cut_out(image, 0.8, 0.5, 0.1))  # side 6, centre (6, 1.5)
    expected = np.array(image)
    expected[3:9, :4] = 125, 123, 114
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(operations.cut_out(image, 0.0, 0.5, 0.5), image)
    np.testing.assert_array_equal(
        operations.cut_out(image[..., :1], 1.0, 0.5, 0.5)[3:9, 4:11], np.full((6, 7, 1), 123)
    )


def test_all_operations_are_drawn():
    """Of 400 copies of one image, each of the 14 operations has changed about as many."""
    image = jnp.asarray(IMAGES["noise"])
    copies = jnp.broadcast_to(image, (400, *image.shape))
    distort = jax.jit(operations.rand_augment, static_argnums=(3, 4))
    found = np.asarray(distort(jax.random.key(0), copies, jnp.arange(400), 1, 15))
    kinds, counts = np.unique(found.reshape(400, -1), axis=0, return_counts=True)
    # Nine operations have a sign. Autocontrast leaves noise unchanged, because it fills 0..255.
    assert len(kinds) == 2 * 9 + 3 + 1
    assert counts.min() >= 4

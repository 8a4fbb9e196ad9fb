"""Strong views: crops and flips of their own, which depend on nothing but seed, epoch and index."""

import jax
import jax.numpy as jnp
import numpy as np

from ipwd_jax.data import augment, operations, views
from ipwd_jax.data.resident import Resident

HOW = views.Augmentation(crop_padding=1, flip=True)
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), np.uint8)
DATA = Resident(jnp.asarray(IMAGES), jnp.arange(40) % 2, jnp.full(3, 0.5), jnp.full(3, 0.25))
INDEX = jnp.arange(40)
strong = jax.jit(views.strong, static_argnums=0)


def test_they_do_not_depend_on_the_batch():
    key = jax.random.key(0)
    whole = strong(HOW, key, 3, DATA, INDEX)
    np.testing.assert_array_equal(strong(HOW, key, 3, DATA, INDEX[7:9]), whole[7:9])
    for other in (strong(HOW, key, 4, DATA, INDEX), strong(HOW, jax.random.key(1), 3, DATA, INDEX)):
        assert (np.asarray(other) != np.asarray(whole)).any((1, 2, 3)).mean() > 0.9


def test_their_crops_and_flips_are_their_own(monkeypatch):
    """Without distortions, each is one of the 18 views of its image, mostly not the weak one."""
    monkeypatch.setattr(operations, "strong_augment", lambda key, images, index: images)
    key = jax.random.key(0)
    weak = views.load(HOW, key, 3, DATA, INDEX)
    found = np.asarray(views.strong(HOW, key, 3, DATA, INDEX))
    drawn = []
    for i in range(40):
        every = augment.apply_views(
            jnp.broadcast_to(DATA.images[i], (18, 6, 6, 3)), jnp.arange(18), 1, True
        )
        every = np.asarray(augment.normalize(every, DATA.mean, DATA.std))
        drawn.append(int(np.flatnonzero((every == found[i]).all((1, 2, 3)))[0]))
    assert len(set(drawn)) > 10
    assert (np.array(drawn) == np.asarray(weak.view)).mean() < 0.3

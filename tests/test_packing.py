"""A packed state holds the same numbers, and an optimiser changes them in the same way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu.metrics import Average

from ipwd_jax import config as config_lib
from ipwd_jax import optim
from ipwd_jax.packing import Flat, Packing, flatten, unflatten
from ipwd_jax.state import TrainState

RNG = np.random.default_rng(0)
SHAPES = {"conv": {"kernel": (3, 3, 2, 4)}, "fc": {"bias": (5,), "kernel": (4, 5)}, "gain": ()}


def params():
    return jax.tree.map(
        lambda shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def optimizer(name):
    config = config_lib.default().optimizer
    config.name = name
    return optim.create(config, lambda step: 0.1)


def state(name):
    values = params()
    return TrainState(
        step=jnp.int32(3),
        params=values,
        batch_stats={},
        memory={},
        opt_state=optimizer(name).init(values),
        metrics={key: Average(jnp.float32(i), jnp.int32(8)) for i, key in enumerate("ab")},
        nonfinite={"a": jnp.int32(-1), "b": jnp.int32(7)},
        key=jax.random.key(0),
    )


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_unpacking_gives_back_the_state(name, flat):
    before = state(name)
    packing = Packing(jax.eval_shape(lambda: before), flat)
    packed = packing.pack(before)
    assert packed.nonfinite.tolist() == [-1, 7] and packed.metrics.total.tolist() == [0, 1]
    if flat:
        assert packed.params.kernels.shape == (3 * 3 * 2 * 4 + 4 * 5,)
        moments = [x for x in jax.tree.leaves(packed.opt_state, is_leaf=is_flat) if is_flat(x)]
        assert len(moments) == {"sgd": 1, "adamw": 2}[name]
    equal(packing.unpack(packed).replace(key=0), before.replace(key=0))


def is_flat(tree):
    return isinstance(tree, Flat)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_one_vector_is_updated_like_many_arrays(name):
    values, made = params(), optimizer(name)
    like = jax.eval_shape(lambda: values)

    def two_steps(values, pack, unpack):
        values, opt_state = pack(values), made.init(pack(values))
        for _ in range(2):
            grads = pack(jax.tree.map(jnp.sin, unpack(values)))
            updates, opt_state = made.update(grads, opt_state, values)
            values = optax.apply_updates(values, updates)
        return unpack(values)

    expected = jax.jit(lambda x: two_steps(x, lambda t: t, lambda t: t))(values)
    found = jax.jit(lambda x: two_steps(x, flatten, lambda flat: unflatten(flat, like)))(values)
    gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), expected, found)
    assert (max(jax.tree.leaves(gaps)) < 1e-6) == optim.elementwise(name)

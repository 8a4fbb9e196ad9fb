"""PyTorch's SGD, step by step by hand, optax's optimisers, and the learning rates of recipes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ipwd_jax import config as config_lib
from ipwd_jax import optim
from ipwd_jax.errors import UserError


def settings(**changes):
    optimizer = config_lib.default().optimizer
    optimizer.update(changes)
    return optimizer


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_follows_pytorch_over_a_change_of_learning_rate(nesterov):
    optimizer = settings(
        learning_rate=0.1, nesterov=nesterov, weight_decay=0.01, milestones=(1,), momentum=0.9
    )
    sgd = optim.sgd(optimizer, optim.schedule(optimizer, steps_per_epoch=2, epochs=2))
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}
    state = sgd.init(params)
    by_hand = {k: np.asarray(p, np.float64) for k, p in params.items()}
    velocity = None
    for step in range(4):
        grads = {"kernel": jnp.array([0.3, 0.1]) * (step + 1), "bias": jnp.array([-1.0])}
        updates, state = sgd.update(grads, state, params)
        params = {k: params[k] + updates[k] for k in params}
        rate = 0.1 if step < 2 else 0.01
        g = {k: np.asarray(grads[k], np.float64) + 0.01 * by_hand[k] for k in by_hand}
        velocity = {k: 0.9 * velocity[k] + g[k] for k in g} if velocity else g
        move = {k: g[k] + 0.9 * velocity[k] if nesterov else velocity[k] for k in g}
        by_hand = {k: by_hand[k] - rate * move[k] for k in by_hand}
        for name in params:
            np.testing.assert_allclose(params[name], by_hand[name], rtol=1e-6)


def assert_three_steps(optimizer, by_hand):
    """Compare with `by_hand(step, p, m, v, g)`, which returns the next parameters and moments."""
    method = optim.create(optimizer, optim.schedule(optimizer, steps_per_epoch=2, epochs=2))
    params = jnp.array([1.0, -2.0])
    state = method.init(params)
    p, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for step in range(1, 4):
        grads = jnp.array([0.3, -0.1]) * step
        updates, state = method.update(grads, state, params)
        params = params + updates
        p, m, v = by_hand(step, p, m, v, np.asarray(grads, np.float64))
        np.testing.assert_allclose(params, p, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_follows_pytorch(name):
    """PyTorch's Adam adds the weight decay to the gradient; its AdamW shrinks the parameters."""

    def by_hand(step, p, m, v, g):
        g = g + (0.01 * p if name == "adam" else 0)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        move = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        return p - 0.1 * (move + (0.01 * p if name == "adamw" else 0)), m, v

    changes = {"learning_rate": 0.1, "weight_decay": 0.01, "b2": 0.95, "milestones": ()}
    assert_three_steps(settings(name=name, **changes), by_hand)


@pytest.mark.parametrize("name", ["nadam", "nadamw"])
def test_nadam_follows_its_equations(name):
    """Dozat, 2016, with a constant momentum: a step of Adam that looks one gradient ahead."""

    def by_hand(step, p, m, v, g):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        ahead = 0.9 * m / (1 - 0.9 ** (step + 1)) + 0.1 * g / (1 - 0.9**step)
        return p - 0.1 * ahead / (np.sqrt(v / (1 - 0.999**step)) + 1e-8), m, v

    changes = {"learning_rate": 0.1, "weight_decay": 0.0, "milestones": ()}
    assert_three_steps(settings(name=name, **changes), by_hand)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_descends(name):
    optimizer = settings(name=name, learning_rate=1e-2, milestones=())
    method = optim.create(optimizer, optim.schedule(optimizer, steps_per_epoch=2, epochs=2))
    params = jnp.array([[1.0, -2.0]])

    @jax.jit
    def after_two_steps(params):
        state = method.init(params)
        for _ in range(2):
            updates, state = method.update(params, state, params)  # gradient of half the square
            params += updates
        return params

    assert (jnp.abs(after_two_steps(params)) < jnp.abs(params)).all()


def test_step_schedule_falls_once_a_milestone_is_finished():
    rate = optim.schedule(settings(milestones=(150, 180, 210)), steps_per_epoch=782, epochs=240)
    epochs = {1: 0.05, 150: 0.05, 151: 5e-3, 180: 5e-3, 181: 5e-4, 210: 5e-4, 211: 5e-5, 240: 5e-5}
    for epoch, expected in epochs.items():
        for step in (782 * (epoch - 1), 782 * epoch - 1):
            np.testing.assert_allclose(rate(step), expected, rtol=1e-5)


def test_cosine_schedule():
    rate = optim.schedule(settings(schedule="cosine"), steps_per_epoch=10, epochs=4)
    for step in (0, 1, 10, 20, 39, 40):
        expected = 0.05 / 2 * (1 + np.cos(np.pi * step / 40))
        np.testing.assert_allclose(rate(step), expected, rtol=1e-5, atol=1e-9)


def test_trainable_mask():
    params = {"student": {"fc": {"kernel": 0}, "fc2": {"kernel": 0}}, "heads": {"cls": 0}}
    assert optim.trainable_mask(params, ("student/fc",)) == {
        "student": {"fc": {"kernel": True}, "fc2": {"kernel": False}},
        "heads": {"cls": False},
    }
    assert optim.trainable_mask(params, ())["heads"]["cls"]
    features = optim.trainable_mask(params, ("student/features",), head_modules=("fc",))
    assert features["student"] == {"fc": {"kernel": False}, "fc2": {"kernel": True}}
    with pytest.raises(UserError, match="head_modules name 'classifier', but its modules are fc"):
        optim.trainable_mask(params, ("student/features",), head_modules=("classifier",))
    frozen = optim.trainable_mask(params, (), frozen=("student/fc",))
    assert frozen["student"] == {"fc": {"kernel": False}, "fc2": {"kernel": True}}
    with pytest.raises(UserError, match=r"student/fc3.*there is only student/features, student/fc"):
        optim.trainable_mask(params, ("student/fc3",))

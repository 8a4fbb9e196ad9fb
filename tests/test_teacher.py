"""A teacher answers with the network, and in the mode, that the settings ask for."""

import jax
import numpy as np
import pytest
from helpers import settings

from ipwd_jax import checkpoint, models, teacher
from ipwd_jax.checkpoint import Checkpoints, Position


@pytest.fixture(scope="module")
def variables(squares):
    network = models.create("tiny_net", 2)
    return jax.device_get(network.init(jax.random.key(0), squares.train.images[:1]))


@pytest.mark.parametrize("train_mode", [False, True])
def test_statistics_of_the_batch_in_training_mode_alone(train_mode, variables, squares):
    config = settings(teacher__train_mode=train_mode, sync_batch_norm=False)
    asked = teacher.from_variables(config, variables, squares)
    images, mask = squares.train.images[:4] / np.float32(255), np.array([1, 1, 1, 0], np.float32)
    network = models.create("tiny_net", 2)
    expected = [
        network.apply(variables, images).logits[:3],
        network.apply(variables, images, train=True, mask=mask).logits[:3],
    ]
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    found = asked.ask(asked.inputs, images, mask).logits[:3]
    np.testing.assert_allclose(found, expected[train_mode], atol=1e-5)


@pytest.mark.parametrize("which", ["last", "best"])
def test_the_epoch_that_teaches(which, variables, squares, tmp_path):
    items = {"last": variables, "best": jax.tree.map(lambda x: 2 * x, variables)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints._write(0, items, checkpoint._meta(Position(), items))
        checkpoints.wait()
    (tmp_path / "result.json").write_text("{}")
    loaded = teacher.load(settings(teacher__which=which), tmp_path, squares)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, items[which])

"""A network of your own, as the student and, twice as wide, as the teacher.

    python -m ipwd_jax.main --config=examples/own_network.py
    python -m ipwd_jax.convert export --config=examples/own_network.py runs/own_network_seed0 it.pth

The network is built from the layers in `ipwd_jax/models/base.py`. Their BatchNorm ignores padding
rows, computes its statistics over all devices, and uses the running statistics in frozen modules.
The modules have the names that a PyTorch state dict gives them. `features` and `preact` are the
maps that feature losses compare.
"""

from functools import partial
from typing import ClassVar

from flax import linen as nn

from ipwd_jax import models
from ipwd_jax.config import default
from ipwd_jax.models.base import BatchNorm, Linear, conv, pool_and_classify, relu


class Plain(nn.Module):
    """Three 3x3 convolutions, two of which halve the map, and a classifier of the mean."""

    classes: int  # the run sets this field and the next one
    axis_name: str | None = None
    width: int = 16
    smallest_image: ClassVar[int] = 4
    head_modules: ClassVar[tuple[str, ...]] = ("fc",)  # what `student/features` does not train

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        features, preact = (), ()
        for i in range(3):
            x = conv(self.width * 2**i, stride=min(i + 1, 2), name=f"conv{i}")(x)
            x = BatchNorm(train, self.axis_name, name=f"bn{i}")(x, mask)
            features, preact, x = (*features, relu(x)), (*preact, x), relu(x)
        return pool_and_classify(x, Linear(self.classes, name="fc"), features, preact)


models.NETWORKS |= {"plain": Plain, "plain_x2": partial(Plain, width=32)}


def get_config():
    """Distil the wide network into the narrow one on the digits, with KD and AT."""
    config = default()
    config.name = "own_network"
    config.data.update({"name": "digits", "crop_padding": 1, "flip": False})
    config.model.name, config.teacher.name = "plain", "plain_x2"
    config.epochs = config.teacher.epochs = 30
    config.optimizer.schedule = config.teacher.optimizer.schedule = "cosine"
    config.loss.update({"ce": 0.1, "kd": 0.9, "at": 100.0})
    return config

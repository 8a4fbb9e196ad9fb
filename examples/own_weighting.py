"""A weighting of your own: a sample counts as much as the teacher trusts its label.

    python -m ipwd_jax.main --config=examples/own_weighting.py
    python -m ipwd_jax.main --config=examples/own_weighting.py --config.weighting.sharpness=2

The settings of `config.weighting` for clipping, running means, normalisation and the start epoch
apply to it as to every weighting. The values that `memory` names and the weight are remembered for
every training sample, and both are in the checkpoints. The fields of the class become settings of
`config.weighting`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ipwd_jax import losses
from ipwd_jax.config import default


@dataclasses.dataclass(frozen=True)
class Trust(losses.Weighting):
    """The teacher's probability of the label, raised to the power of `sharpness`."""

    sharpness: float = 1.0
    teacher_taps = ("logits",)
    memory = ("trust",)

    def weights(self, student, teacher, batch):
        p = jax.nn.softmax(teacher.logits)
        trust = jnp.take_along_axis(p, batch.label[:, None], axis=1)[:, 0]  # (B,)
        return trust**self.sharpness, {"trust": trust}


losses.WEIGHTINGS["trust"] = Trust  # before `default()`, which creates its settings


def get_config():
    """Distil resnet14 into resnet8 on the digits with weighted KD."""
    config = default()
    config.name = "own_weighting"
    config.data.update({"name": "digits", "crop_padding": 1, "flip": False})
    config.model.name, config.teacher.name = "resnet8", "resnet14"
    config.epochs = config.teacher.epochs = 30
    config.optimizer.schedule = config.teacher.optimizer.schedule = "cosine"
    config.loss.update({"ce": 0.1, "kd": 0.9})
    config.weighting.update({"name": "trust", "terms": ("kd",), "batch_normalize": True})
    return config

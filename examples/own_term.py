"""A loss term of your own: the student's logits should equal the teacher's up to a constant.

    python -m ipwd_jax.main --config=examples/own_term.py
    python -m ipwd_jax.main --config=examples/own_term.py --config.terms.logit_gap.scale=0.5

The key of the class in `TERMS` is its name everywhere: `config.loss.logit_gap` is its weight,
`config.terms.logit_gap` has its fields, `train_logit_gap` is its column in metrics.csv, and
`config.weighting.terms` can name it. `ipwd_jax/losses/base.py` describes what else a term can have:
trained parts, memories, extra heads, rotated images, strong views and a first stage.
"""

import jax
import jax.numpy as jnp

from ipwd_jax import losses
from ipwd_jax.config import default
from ipwd_jax.losses.base import Batch, Term
from ipwd_jax.models.base import Outputs


class LogitGap(Term):
    """Variance over the classes of `scale` times the difference of the two networks' logits."""

    scale: float = 1.0  # every field is a setting and needs a default
    paper = "Ba and Caruana, 2014: Do deep nets really need to be deep?"
    teacher_taps = ("logits",)  # no other outputs are computed or cached for it

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        gap = self.scale * (teacher.logits - student.logits)
        return jnp.square(gap - gap.mean(axis=1, keepdims=True)).mean(axis=1)  # (B,)


losses.TERMS["logit_gap"] = LogitGap  # before `default()`, which creates its settings


def get_config():
    """Distil resnet14 into resnet8 on the digits."""
    config = default()
    config.name = "own_term"
    config.data.update({"name": "digits", "crop_padding": 1, "flip": False})
    config.model.name, config.teacher.name = "resnet8", "resnet14"
    config.epochs = config.teacher.epochs = 30
    config.optimizer.schedule = config.teacher.optimizer.schedule = "cosine"
    config.loss.update({"ce": 0.5, "logit_gap": 0.1})
    return config

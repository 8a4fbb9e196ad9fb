"""Li et al., 2023 (Curriculum temperature): the temperature is learned against the student."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ipwd_jax.losses.base import Batch, Term
from ipwd_jax.losses.dkd import dkd_loss
from ipwd_jax.losses.kd import kd_loss
from ipwd_jax.models.base import Outputs
from ipwd_jax.typing import PyTree


def reversal(epoch: jax.Array, warmup: int) -> jax.Array:
    """The factor of the temperature's gradient, which falls from 0 to -1 along half a cosine.

    Args:
        epoch: number of epochs finished, e. In the epoch after them, the factor is
            `(cos(pi (e + 1) / warmup) - 1) / 2`, and -1 from epoch `warmup` on.
        warmup: number of epochs until the factor is -1; 0 is treated as 1.
    """
    progress = jnp.minimum((epoch + 1) / max(warmup, 1), 1)
    return (jnp.cos(math.pi * progress) - 1) / 2


class CTKD(Term):
    """KD or DKD at a temperature that is trained to make the loss larger, per sample.

    The temperature is `start_temperature + temperature_range sigmoid(g)`, where g is one trained
    number for all samples. T is in both softmaxes and in the factor T^2. The gradient with respect
    to g is multiplied by `reversal`; g is then updated like all parameters, weight decay included.
    Agrees with the authors' code. The largest intermediate array is (B, C), the logits.

    Attributes:
        form: the loss at this temperature, "kd" or "dkd".
        alpha: weight of TCKD in DKD.
        beta: weight of NCKD in DKD.
        start_temperature: the temperature that no g falls below.
        temperature_range: width of the range of temperatures. With g = 1 at the beginning, the
            temperature is first 15.6.
        warmup: number of epochs after which the factor of the gradient is -1; 10 on CIFAR-100, 5 on
            ImageNet.
        standardize: whether both networks' logits are first standardised (Sun et al., 2024).
    """

    form: str = "kd"
    alpha: float = 1.0
    beta: float = 2.0
    start_temperature: float = 1.0
    temperature_range: float = 20.0
    warmup: int = 10
    standardize: bool = False

    paper = "Li et al., 2023: Curriculum temperature for knowledge distillation"
    teacher_taps = ("logits",)
    choices = {"form": ("kd", "dkd")}  # noqa: RUF012
    not_negative = ("alpha", "beta")

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        g = self.param("temperature", nn.initializers.ones, (1,), jnp.float32)[0]
        fixed = lax.stop_gradient(g)
        # The value is that of g.
        reversed_g = fixed + reversal(batch.epoch, self.warmup).astype(g.dtype) * (g - fixed)
        temperature = self._temperature(jax.nn.sigmoid(reversed_g))
        s, t = student.logits, teacher.logits
        if self.form == "kd":
            return kd_loss(s, t, temperature, standardize=self.standardize)
        return dkd_loss(s, t, batch.label, self.alpha, self.beta, temperature, self.standardize)

    def _temperature(self, share: jax.Array) -> jax.Array:
        return self.start_temperature + self.temperature_range * share

    @nn.nowrap
    def unread(self) -> dict[str, str]:
        """The weights of DKD's parts, if the loss is that of KD."""
        return {"alpha": "form", "beta": "form"} if self.form == "kd" else {}

    @nn.nowrap
    def scalars(self, variables: Mapping[str, PyTree]) -> dict[str, float]:
        """The temperature."""
        (g,) = np.asarray(variables["params"]["temperature"], np.float64)
        return {"temperature": float(self._temperature(1 / (1 + np.exp(-g))))}

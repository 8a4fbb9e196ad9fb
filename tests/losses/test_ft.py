"""The parts of FT that each of its two stages trains."""

import jax
import numpy as np
from losses_helpers import STUDENT, TEACHER, batch, init, random_outputs, value

from ipwd_jax.losses.ft import FT


class TestFT:
    def gradients(self, method=None):
        student, teacher = random_outputs(STUDENT, 3, 1), random_outputs(TEACHER, 3, 2)
        variables = init(FT(), student, teacher)

        def mean(params):
            given = variables | {"params": params}
            return value(FT(), given, student, teacher, batch(3), method).mean()

        grads = jax.grad(mean)(variables["params"])
        return {k: [bool(np.any(g)) for g in jax.tree.leaves(v)] for k, v in grads.items()}

    def test_the_call_trains_the_translator_alone(self):
        moved = self.gradients()
        assert any(moved["translator"]) and not any(moved["paraphraser"])

    def test_the_first_stage_trains_the_paraphraser_alone(self):
        moved = self.gradients("pretrain")
        assert all(moved["paraphraser"]) and not any(moved["translator"])
        assert set(moved) - {"translator"} == set(FT.first_stage_params)

"""ReviewKD: resizing, the hierarchical loss by hand, the warm-up, and its modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_helpers import (
    KEY,
    SHORT_STUDENT,
    SHORT_TEACHER,
    STUDENT,
    TEACHER,
    batch,
    init,
    outputs,
    random_outputs,
    value,
)

from ipwd_jax.losses.reviewkd import ABF, ReviewKD, hcl_loss, nearest_resize


class TestReviewKD:
    @pytest.mark.parametrize("sizes", [(1, 4), (4, 8), (5, 5), (3, 7), (7, 3), (8, 4)])
    def test_nearest_resize(self, sizes):
        old, new = sizes
        x = jax.random.normal(KEY, (2, old, old + 1, 3))
        resized = nearest_resize(x, new, new)
        for i in range(new):
            for j in range(new):
                source = x[:, int(i * old / new), int(j * (old + 1) / new)]
                assert np.array_equal(resized[:, i, j], source)

    def test_hcl_of_constant_difference_is_its_square(self):
        maps = [jnp.zeros((2, size, size, 3)) for size in (8, 4, 2, 1)]
        np.testing.assert_allclose(hcl_loss(maps, [x + 3 for x in maps]), 4 * 9, rtol=1e-5)

    def test_hcl_weighs_the_pooled_maps(self):
        difference = np.zeros((1, 2, 2, 1))
        difference[0, 0, 0, 0] = 4
        expected = (16 / 4 + 0.5 * 1) / 1.5
        loss = hcl_loss([jnp.asarray(difference)], [jnp.zeros((1, 2, 2, 1))])
        np.testing.assert_allclose(loss, [expected], rtol=1e-6)

    @pytest.mark.parametrize("first_epoch", [0, 1])
    def test_warmup(self, first_epoch):
        student, teacher = random_outputs(SHORT_STUDENT, 3, 1), random_outputs(SHORT_TEACHER, 3, 2)
        term = ReviewKD(first_epoch=first_epoch)
        variables = init(term, student, teacher)
        full = value(term, variables, student, teacher, batch(3, epoch=20))
        for epoch in (0, 10, 19, 30):
            found = value(term, variables, student, teacher, batch(3, epoch=epoch))
            factor = min((epoch + first_epoch) / 20, 1)
            np.testing.assert_allclose(found, factor * full, rtol=1e-5)

    def test_unequal_levels_are_an_error(self):
        maps, width = STUDENT
        shallow = outputs((maps[1:], width), 2)
        with pytest.raises(ValueError, match="student has 3 and the teacher 4"):
            ReviewKD().init(KEY, shallow, outputs(TEACHER, 2), batch(2))

    def test_maps_before_the_activation_and_narrow_fusion(self):
        student, teacher = random_outputs(SHORT_STUDENT, 3, 1), random_outputs(SHORT_TEACHER, 3, 2)
        term = ReviewKD(student_preact=True, mid_channels=3)
        variables = init(term, student, teacher)
        moved = student.replace(features=tuple(x + 1 for x in student.features))
        found = [value(term, variables, s, teacher, batch(3)) for s in (student, moved)]
        assert np.array_equal(*found)
        shapes = jax.tree.map(jnp.shape, variables["params"])
        assert shapes["1"]["conv2.0"]["kernel"] == (3, 3, 3, 3)

    def test_first_kernels_are_kaiming_uniform(self):
        x = jnp.zeros((2, 1, 1, 300))
        variables = jax.jit(lambda: ABF(20, 3).init(KEY, x, None, (1, 1), jnp.ones(2)))()
        bound = np.sqrt(3 / 300)
        largest = np.abs(variables["params"]["conv1.0"]["kernel"]).max()
        assert 0.99 * bound < largest <= bound

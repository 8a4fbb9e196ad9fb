"""Closed forms of functions that several terms use."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_helpers import KD_LOGITS, LABELS

from ipwd_jax.losses import TERMS, WEIGHTINGS, Term, Weighting
from ipwd_jax.losses.base import Batch, cross_entropy
from ipwd_jax.models.base import Outputs


def test_label_smoothing_mixes_label_and_uniform_targets():
    logits = jnp.asarray(KD_LOGITS, jnp.float32)
    target = 0.9 * np.eye(10)[np.asarray(LABELS)] + 0.1 / 10
    expected = -(target * jax.nn.log_softmax(logits)).sum(axis=1)
    np.testing.assert_allclose(cross_entropy(logits, LABELS, 0.1), expected, rtol=1e-5)


def test_labels_of_mixed_images():
    """The term `ce` equals the cross-entropy with the targets mixed by the shares."""
    logits = jnp.asarray(KD_LOGITS, jnp.float32)
    size, share = len(LABELS), jnp.linspace(0.5, 1, len(LABELS))
    partner = (LABELS + 3) % 10
    rows = jnp.zeros(size, jnp.int32)
    batch = Batch(
        image=logits, label=LABELS, index=rows, view=rows, mask=jnp.ones(size), epoch=rows[0],
        train_labels=LABELS, key=jax.random.key(0), partner_label=partner, share=share,
    )  # fmt: skip
    student = Outputs(logits, logits, (), ())
    onehot = np.eye(10)
    target = share[:, None] * onehot[LABELS] + (1 - share[:, None]) * onehot[partner]
    expected = -(target * jax.nn.log_softmax(logits)).sum(axis=1)
    found = TERMS["ce"]().apply({}, student, None, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [*TERMS.values(), *WEIGHTINGS.values()])
def test_what_is_defined_for_mixed_images_reads_labels_by_their_shares(kind):
    """Other ways to read the label would take a mixed image for one of its two classes."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("ipwd_jax.losses.")]
    source = "".join(inspect.getsource(base) for base in own if base not in (Term, Weighting))
    if kind.mixed_images:
        assert "batch.label" not in source and "train_labels" not in source

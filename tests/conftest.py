"""Strict arithmetic in every test: what would be promoted or broadcast silently is an error."""

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Each compiled program maps memory, of which a process may have 65,530 pieces on Linux.

    A process that keeps the programs of all tests ends in a segmentation fault inside XLA.
    """
    yield
    jax.clear_caches()

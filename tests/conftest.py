"""What holds in every test.

Most of the time would go into optimising programs that then run for a second, so XLA does little of
it here and in the processes that tests start. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 python -m pytest`
takes longer and tests what users run.
"""

import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

# What would be promoted or broadcast silently is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Each compiled program maps memory, of which a process may have 65,530 pieces on Linux.

    A process that keeps the programs of all tests ends in a segmentation fault inside XLA.
    """
    yield
    jax.clear_caches()

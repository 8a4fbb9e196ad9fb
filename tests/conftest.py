"""What holds in every test.

Most of the time would go into optimising programs that then run for a second, so XLA does little of
it here and in the processes that tests start. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 python -m pytest`
takes longer and tests what users run.
"""

import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import helpers
import jax
import pytest

from ipwd_jax import data

# What would be promoted or broadcast silently is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Each compiled program maps memory, of which a process may have 65,530 pieces on Linux.

    A process that keeps the programs of all tests ends in a segmentation fault inside XLA.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def keep_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Many tests compile the same programs, and so do the processes that they start."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def squares() -> data.Dataset:
    return helpers.squares()

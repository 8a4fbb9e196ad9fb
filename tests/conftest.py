"""Settings and fixtures of all tests.

Most of the time would be spent on compiling programs that then run for a second. XLA therefore
skips most optimisations, here and in the processes that tests start, and uses the emitters that
compile fastest. With `JAX_DISABLE_MOST_OPTIMIZATIONS=0 python -m pytest`, the tests take longer and
test the programs that users run.
"""

import importlib.metadata
import os

if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    quick = ["--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions have no choice
        quick.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([*quick, os.environ.get("XLA_FLAGS", "")])

import helpers
import hypothesis
import jax
import pytest

from ipwd_jax import data, xla

# As the commands do, so that a test and the processes that it starts compute the same.
xla.apply()
# Arrays of different ranks are never broadcast silently.
jax.config.update("jax_numpy_rank_promotion", "raise")
# The same examples every time, however long each takes.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drop the compiled programs after each test module.

    Each of them maps memory, and a process on Linux can have only 65,530 such mappings. A process
    that keeps the programs of all tests ends in a segmentation fault inside XLA.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def keep_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep compiled programs on disk for other tests and for the processes that tests start."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment in which programs are compiled once for all processes."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="session")
def squares() -> data.Dataset:
    return helpers.squares()

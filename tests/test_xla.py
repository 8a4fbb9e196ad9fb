"""Compiler settings are applied if they are asked for, and not otherwise."""

import os
import subprocess
import sys

import pytest

from ipwd_jax import xla
from ipwd_jax.errors import UserError


def test_nothing_is_set_unasked(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    xla.apply("")
    assert "XLA_FLAGS" not in os.environ


def test_flags_join_those_that_are_there(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_gpu_autotune_level=0")
    xla.apply("gpu-quick-compile")
    assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_gpu_autotune_level=0"
    xla.apply("gpu-graphs")
    assert os.environ["XLA_FLAGS"].endswith("+CONVOLUTION,+WHILE --xla_gpu_graph_min_graph_size=1")


def test_wrong_profiles(monkeypatch):
    with pytest.raises(UserError, match="Did you mean 'gpu-graphs'"):
        xla.apply("gpu-graph")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    with pytest.raises(UserError, match="XLA_FLAGS has --xla_gpu_autotune_level=4"):
        xla.apply("gpu-quick-compile")


@pytest.mark.slow
@pytest.mark.parametrize("profile", xla.PROFILES)
def test_jax_accepts_the_flags(profile, tmp_path):
    """XLA would end the process if it did not know a flag."""
    code = f"""
from ipwd_jax import xla
xla.apply({profile!r}, {str(tmp_path / "cache")!r})
import jax, jax.numpy as jnp
x = jnp.ones((1, 8, 8, 3))
print(jax.jit(lambda x: jax.lax.conv_general_dilated(x, jnp.ones((3, 3, 3, 4)), (1, 1), "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC")).sum())(x))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache").iterdir())

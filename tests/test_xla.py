"""Compiler settings: the default on a CPU, and those that are asked for."""

import os
import subprocess
import sys

import jax
import pytest

from ipwd_jax import xla
from ipwd_jax.errors import UserError


def test_a_cpu_gets_the_fastest_convolutions_unless_told_otherwise(monkeypatch):
    jax.default_backend()  # reads XLA_FLAGS before this test changes them
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    xla.apply("none")
    assert os.environ["XLA_FLAGS"] == "--xla_a=1" and xla.active() == ""
    xla.apply()
    (flag,) = xla.PROFILES["cpu-eigen"]
    assert os.environ["XLA_FLAGS"] == f"--xla_a=1 {flag}" and xla.active() == "cpu-eigen"
    own = flag.replace("reduce", "none")
    monkeypatch.setenv("XLA_FLAGS", own)
    xla.apply()
    assert os.environ["XLA_FLAGS"] == own and xla.active() == ""


def test_flags_join_those_that_are_there(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_gpu_autotune_level=0")
    xla.apply("gpu-quick-compile")
    assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_gpu_autotune_level=0"
    xla.apply("gpu-graphs")
    assert os.environ["XLA_FLAGS"].endswith("+CONVOLUTION,+WHILE --xla_gpu_graph_min_graph_size=1")


def test_what_the_same_bits_on_a_gpu_need(monkeypatch):
    jax.default_backend()
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    xla.check_deterministic(True)  # on a CPU there is nothing to do
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    xla.check_deterministic(False)
    with pytest.raises(UserError, match=r"--xla_gpu_deterministic_ops=true in XLA_FLAGS before"):
        xla.check_deterministic(True)
    xla.apply("gpu-quick-compile", deterministic=True)
    assert "--xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=true" in os.environ["XLA_FLAGS"]
    xla.check_deterministic(True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    with pytest.raises(UserError, match=r"but config\.deterministic needs"):
        xla.apply("none", deterministic=True)


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

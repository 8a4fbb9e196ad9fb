"""Compiler settings, by name. None of them is applied unless it is asked for.

They must be set before the first array exists: `python -m ipwd_jax.main --xla_profile=cpu-eigen`.
The measurements of each are in benchmarks/RESULTS.md. The results of a run do not depend on a
profile beyond rounding, and every run records its flags. One setting is out of reach of a profile,
because a process reads it when it starts: on Linux, `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` saves
most page faults of a step.
"""

import os
import pathlib
from typing import NamedTuple

import jax

from ipwd_jax.errors import UserError, unknown_name


class Profile(NamedTuple):
    """Flags for XLA and their purpose."""

    purpose: str
    flags: tuple[str, ...]


PROFILES = {
    "gpu-graphs": Profile(
        "launch whole steps as CUDA graphs, convolutions and loops included",
        (
            "--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE",
            "--xla_gpu_graph_min_graph_size=1",
        ),
    ),
    "gpu-conv-fusion": Profile(
        "fuse what surrounds a convolution into it through cuDNN; experimental",
        ("--xla_gpu_experimental_enable_conv_fusion=true",),
    ),
    "gpu-quick-compile": Profile(
        "take the first algorithm of each convolution instead of timing them",
        ("--xla_gpu_autotune_level=0",),
    ),
    "cpu-eigen": Profile(
        "convolutions and products by Eigen and oneDNN, faster than YNN's, which keeps the sums",
        ("--xla_cpu_experimental_ynn_fusion_type=reduce",),
    ),
}


def apply(profile: str, compilation_cache: str | os.PathLike = "") -> None:
    """Sets the flags of a profile and the folder in which compiled programs are kept.

    Args:
        profile: one of `PROFILES`, or empty: no flags.
        compilation_cache: folder; empty: programs are compiled anew in each process.

    Raises:
        UserError: there is no such profile, one of its flags is set to another value in XLA_FLAGS,
            or the folder cannot be made.
    """
    if profile and profile not in PROFILES:
        raise unknown_name("XLA profile", profile, PROFILES)
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0]: flag for flag in given}
    flags = PROFILES[profile].flags if profile else ()
    for flag in flags:
        there = names.get(flag.partition("=")[0], flag)
        if there != flag:
            raise UserError(f"XLA_FLAGS has {there}, and the profile {profile} has {flag}")
    if flags:
        os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys([*given, *flags]))
    if compilation_cache:
        try:
            pathlib.Path(compilation_cache).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the compilation cache: {error}") from error
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

"""Named profiles of compiler settings.

The settings must be made before the first array exists, as the commands do: by default they apply
`DEFAULT`, which concerns CPUs alone, and `--xla_profile` names another profile. Python code calls
`apply` first thing. Measurements of the profiles are in benchmarks/RESULTS.md. A profile changes
the results of a run by rounding only, and every run records its flags. One useful setting cannot be
part of a profile, because a process reads it when it starts: on Linux,
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1` avoids most page faults of a step.
"""

import os
import pathlib

import jax

from ipwd_jax.errors import UserError, unknown_name

# Profile -> its flags for XLA.
PROFILES: dict[str, tuple[str, ...]] = {
    # Launch whole steps as CUDA graphs, convolutions and loops included.
    "gpu-graphs": (
        "--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE",
        "--xla_gpu_graph_min_graph_size=1",
    ),
    # Fuse a convolution with the operations around it through cuDNN; experimental.
    "gpu-conv-fusion": ("--xla_gpu_experimental_enable_conv_fusion=true",),
    # Take the first algorithm for each convolution instead of timing all of them.
    "gpu-quick-compile": ("--xla_gpu_autotune_level=0",),
    # Compute convolutions and matrix products with Eigen and oneDNN, which are faster than YNN; YNN
    # still computes the sums.
    "cpu-eigen": ("--xla_cpu_experimental_ynn_fusion_type=reduce",),
}


# The profile of a run that asks for none; a GPU ignores its flags.
DEFAULT = "cpu-eigen"


# What makes a program compute the same bits whenever it runs on a GPU, at the cost of the fastest
# algorithms. Programs on a CPU do so anyway.
_DETERMINISTIC = ("--xla_gpu_deterministic_ops=true",)


def apply(
    profile: str = "", compilation_cache: str | os.PathLike = "", deterministic: bool = False
) -> None:
    """Set the flags of a profile and the folder in which compiled programs are cached.

    Args:
        profile: one of `PROFILES`; "none" means no flags. Empty means those of `DEFAULT`, except
            for flags that XLA_FLAGS already sets.
        compilation_cache: folder of the cache; if empty, every process compiles its programs anew.
        deterministic: whether to set the flags that `config.deterministic` needs as well.

    Raises:
        UserError: there is no such profile, XLA_FLAGS sets one of the flags to a different value,
            or the folder cannot be created.
    """
    if profile and profile not in (*PROFILES, "none"):
        raise unknown_name("XLA profile", profile, (*PROFILES, "none"))
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0]: flag for flag in given}
    flags = () if profile == "none" else PROFILES[profile or DEFAULT]
    wanted = dict.fromkeys(flags if profile else (), f"the profile {profile}")
    wanted |= dict.fromkeys(_DETERMINISTIC if deterministic else (), "config.deterministic")
    for flag, why in wanted.items():
        there = names.get(flag.partition("=")[0], flag)
        if there != flag:
            raise UserError(f"XLA_FLAGS has {there}, but {why} needs {flag}; drop one of them")
    flags = tuple(dict.fromkeys((*flags, *wanted)))
    new = [flag for flag in flags if flag.partition("=")[0] not in names]
    if new:
        os.environ["XLA_FLAGS"] = " ".join([*given, *new])
    if compilation_cache:
        compilation_cache = os.path.expanduser(compilation_cache)
        try:
            pathlib.Path(compilation_cache).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the compilation cache: {error}") from error
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def check_deterministic(wanted: bool) -> None:
    """Raise `UserError` if it is `wanted`, and a GPU need not compute the same bits every time."""
    if not wanted or jax.default_backend() == "cpu":
        return
    if missing := set(_DETERMINISTIC) - set(os.environ.get("XLA_FLAGS", "").split()):
        raise UserError(
            f"config.deterministic needs {' '.join(missing)} in XLA_FLAGS before the first array "
            "exists. The commands set it; in Python, begin with `from ipwd_jax import xla; "
            "xla.apply(deterministic=True)`."
        )


def active() -> str:
    """Return the names of the profiles whose flags are set, with commas between them."""
    given = os.environ.get("XLA_FLAGS", "").split()
    on_cpu = jax.default_backend() == "cpu"
    return ", ".join(
        name
        for name, flags in PROFILES.items()
        if name.startswith("cpu-") == on_cpu and set(flags) <= set(given)
    )

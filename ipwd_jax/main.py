"""Train, distil and evaluate image classifiers.

  python -m ipwd_jax.main --config=configs/digits_ipwd.py
  python -m ipwd_jax.main --config=configs/cifar_ipwd.py:resnet110,resnet32 --config.seed=1
  python -m ipwd_jax.main --config=configs/cifar_ipwd.py --config.data.download
  python -m ipwd_jax.main --config=configs/digits_ipwd.py --mode=eval

Any setting of the config is changed with --config.NAME=VALUE. ipwd_jax/config.py lists them with
their meaning, and docs/methods/ those of each loss term and weighting. The same command resumes a
run that was stopped. A run leaves in its folder: config.json, parameters.txt, metrics.csv,
tensorboard/, checkpoints/, predictions.npz, samples.npz (if it weights its samples), classes.csv
and result.json.
"""

import contextlib
import itertools
import logging as python_logging
import pathlib
import re
import sys
import traceback

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from ipwd_jax import signals
from ipwd_jax.errors import UserError

# Imports that take seconds are made within functions: `main` reports an interrupt of them.
_CONFIG_MODULE = "config_config"  # what ml_collections calls the file of the flag "config"
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File of the run's settings, for example configs/digits_ipwd.py."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the run. Empty: runs/NAME_seedSEED, as the config names it."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "teacher", "eval"],
    "train: the whole run. teacher: only the teacher. eval: measure the checkpoint in the work "
    "directory.",
)
_EXTEND = flags.DEFINE_bool(
    "extend", False, "Continue a run with fewer epochs up to those of the config."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Print what the run would do, and what time and space it needs; write nothing.",
)
_XLA_PROFILE = flags.DEFINE_string(
    "xla_profile",
    "",
    "Compiler settings: one of ipwd_jax.xla.PROFILES, or none. Empty: cpu-eigen on a CPU.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Train together with other processes, which JAX finds in SLURM, Open MPI or Kubernetes, or "
    "which --coordinator, --num_processes and --process_id describe.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT at which the first process listens for the others."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0.", lower_bound=0
)
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", "", "Folder that keeps compiled programs for later runs. Empty: none."
)


def _parse(argv: list[str]) -> list[str]:
    """Parse the flags; a mistake in them, in the config or in its overrides becomes one line."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.present:
            _CONFIG.value.keys()  # a file that could not be loaded says so here
        return rest
    except SystemExit as stop:  # --help and its like leave with 1
        helped = any(re.fullmatch(r"--?(help\w*|\?)", argument) for argument in argv)
        sys.exit(0 if helped else stop.code)
    except Exception as error:
        raise _explained(error, argv) from None


def _explained(error: Exception, argv: list[str]) -> UserError:
    """Say what is wrong with the flags, the config file or its overrides."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for cause in chain:
        if found := _in_config_file(cause):
            return found
    path = _config_path(argv)
    if isinstance(error, OSError) and not pathlib.Path(path).exists():
        return UserError(f"the config file {path} does not exist")
    if isinstance(error, OSError):
        return UserError(f"the config file {path} cannot be read: {chain[-1]}")
    if isinstance(error, flags.Error):
        return UserError(str(error).strip().splitlines()[-1])
    from ipwd_jax.config import default, flat, unknown_key

    for argument in argv:  # an override of what the config does not have
        name = argument.lstrip("-").partition("=")[0].removeprefix("config.")
        if argument.lstrip("-").startswith("config.") and name not in flat(default()):
            return unknown_key(name, default())
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return UserError(
            f"{path} has no function get_config, which every config file needs; a file with "
            "get_runs is for `ipwd-jax sweep`"
        )
    if _CONFIG.present and not isinstance(_CONFIG.value, ConfigDict):
        return UserError(f"get_config() of {path} returns {_CONFIG.value}, not the config")
    return UserError(f"the config {path} cannot be read: {error}")


def _in_config_file(error: BaseException) -> UserError | None:
    """Say where in the config file the error was raised; None if it comes from elsewhere."""
    lines: list[tuple[str, int | None]] = [
        (frame.f_code.co_filename, number)
        for frame, number in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == _CONFIG_MODULE
    ]
    words = " ".join(str(error).split())
    # The names of what was no file, such as a value on the command line, begin with "<".
    if isinstance(error, SyntaxError) and error.filename and error.filename[0] != "<":
        lines, words = [(error.filename, error.lineno)], error.msg
    if not lines:
        return None
    if isinstance(error, UserError):
        return error
    path, number = lines[-1]
    return UserError(f"{path}, line {number}: {type(error).__name__}: {words}")


def _config_path(argv: list[str]) -> str:
    """Return the file that --config names, without the argument after its colon."""
    for argument, following in itertools.pairwise([*argv, ""]):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return (value if equals else following).partition(":")[0]
    return ""


def _main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; settings are --config.NAME=VALUE")
    if _CONFIG.value is None:
        found = ", ".join(sorted(str(path) for path in pathlib.Path("configs").glob("*.py")))
        raise UserError(f"--config=FILE is missing{f'; here: {found}' if found else ''}")
    described = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    if described != ("", None, None) and not _DISTRIBUTED.value:
        raise UserError("--coordinator, --num_processes and --process_id need --distributed")
    if _MODE.value != "train" and (_DRY_RUN.value or _EXTEND.value):
        raise UserError(f"--dry_run and --extend are for whole runs, not for --mode={_MODE.value}")
    from ipwd_jax import parallel, xla

    logging.set_verbosity(logging.ERROR)
    python_logging.captureWarnings(True)
    deterministic = _CONFIG.value.get("deterministic") is True
    xla.apply(_XLA_PROFILE.value, _COMPILATION_CACHE.value, deterministic)
    with parallel.distributed(*described) if _DISTRIBUTED.value else contextlib.nullcontext():
        _run(_CONFIG.value)


def _run(config: ConfigDict) -> None:
    from ipwd_jax import report, train

    suffix = "" if config.get("seeds") else f"_seed{config.get('seed')}"
    workdir = pathlib.Path(_WORKDIR.value or f"runs/{config.get('name') or 'run'}{suffix}")
    workdir = workdir.expanduser()  # the shell leaves `--workdir=~/runs` as it is
    if _DRY_RUN.value:
        for text in train.planned(config, workdir, extend=_EXTEND.value):
            print(text, flush=True)
        return
    if _MODE.value == "eval":
        result = train.evaluate_run(config, workdir)
    else:
        teacher_only = _MODE.value == "teacher"
        result = train.run(config, workdir, teacher_only=teacher_only, extend=_EXTEND.value)
    print(report.summary(result))
    if _MODE.value == "teacher":
        return
    workdirs = f"{workdir}{'_seed*' if 'seeds' in result else ''}"
    print(f"Written to {workdirs}")
    if _MODE.value == "train":
        print(f"Next: python -m ipwd_jax.report {workdirs}")


def main() -> None:
    """Run the command line; exit with status 2 after a mistake, and 128 + signal when stopped."""
    if __name__ != "__main__":  # absl explains the main module, which is a script of `ipwd-jax`
        sys.modules["__main__"].__doc__ = __doc__
        for flag in flags.FLAGS.flags_by_module_dict()[__name__]:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    resumes = not {"--mode=eval", "--dry_run"} & {*sys.argv}
    with signals.exit_statuses(resumes), signals.acknowledged():
        app.run(_main, flags_parser=_parse)


if __name__ == "__main__":
    main()

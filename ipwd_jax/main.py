"""Train, distil and evaluate image classifiers.

  python -m ipwd_jax.main --config=configs/digits_ipwd.py
  python -m ipwd_jax.main --config=configs/cifar_ipwd.py:resnet110,resnet32 --config.seed=1
  python -m ipwd_jax.main --config=configs/cifar_ipwd.py --config.data.download
  python -m ipwd_jax.main --config=configs/digits_ipwd.py --mode=eval

Any setting of the config is changed with --config.NAME=VALUE; ipwd_jax/config.py lists them all
with their meaning. The same command goes on where a run was stopped. A run leaves in its work
directory: config.json, metrics.csv, tensorboard/, checkpoints/, predictions.npz, result.json.
"""

import logging as python_logging
import pathlib
import sys
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from ipwd_jax.config import default, has_key, unknown_key
from ipwd_jax.errors import Interrupted, UserError

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

_XLA_PROFILE = flags.DEFINE_string(
    "xla_profile", "", "Compiler settings: one of ipwd_jax.xla.PROFILES. Empty: JAX's own."
)
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", "", "Folder that keeps compiled programs for later runs. Empty: none."
)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; what is wrong with them, the config or its overrides becomes one line."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            _CONFIG.value.keys()  # a file that could not be loaded says so here
        return rest
    except (KeyError, AttributeError) as error:  # an override of what the config does not have
        for argument in argv:
            path = argument.lstrip("-").partition("=")[0].removeprefix("config.")
            if argument.lstrip("-").startswith("config.") and not has_key(default(), path):
                _exit(unknown_key(path, default()))
        _exit(UserError(f"the config cannot be read: {error}"))
    except flags.Error as error:
        _exit(UserError(str(error).strip().splitlines()[-1]))
    except OSError:
        _exit(UserError(f"the config file {flags.FLAGS['config'].config_filename} does not exist"))


def _exit(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are --config.NAME=VALUE")
    if _CONFIG.value is None:
        found = ", ".join(sorted(str(path) for path in pathlib.Path("configs").glob("*.py")))
        raise app.UsageError(f"--config=FILE is missing{f'; here: {found}' if found else ''}")
    from ipwd_jax import report, train, xla  # the slow imports, once the flags are right

    logging.set_verbosity(logging.ERROR)
    python_logging.captureWarnings(True)
    xla.apply(_XLA_PROFILE.value, _COMPILATION_CACHE.value)
    config = _CONFIG.value
    suffix = "" if config.seeds else f"_seed{config.seed}"
    workdir = pathlib.Path(_WORKDIR.value or f"runs/{config.name or 'run'}{suffix}")
    if _MODE.value == "eval":
        result = train.evaluate_run(config, workdir)
    else:
        result = train.run(config, workdir, teacher_only=_MODE.value == "teacher")
    print(report.summary(result))
    print(f"Written to {workdir}{'_seed*' if 'seeds' in result else ''}")


def main() -> None:
    """The command line. Exits with 2 on a user's mistake, with 128 + signal when stopped."""
    try:
        app.run(_main, flags_parser=_parse)
    except UserError as error:
        _exit(error)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except Interrupted as stop:
        print(f"\n{stop}; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + stop.signum)


if __name__ == "__main__":
    main()

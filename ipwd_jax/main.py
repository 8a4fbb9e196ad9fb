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

from absl import app, flags, logging
from ml_collections import config_flags

from ipwd_jax.config import default, unknown_key
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


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; errors of a config or of its overrides become one line."""
    try:
        return app.parse_flags_with_usage(argv)
    except (KeyError, AttributeError) as error:
        names = [a.lstrip("-").partition("=")[0] for a in argv if a.startswith("--config.")]
        for name in names:
            node = default()
            for key in name.split(".")[1:]:
                if key not in node:
                    _exit(unknown_key(name.partition(".")[2], default()))
                node = node[key]
        _exit(UserError(f"the config cannot be read: {error}"))
    except (TypeError, ValueError, OSError) as error:
        _exit(UserError(f"the config cannot be read: {error}"))


def _exit(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are --config.NAME=VALUE")
    if _CONFIG.value is None:
        found = ", ".join(sorted(str(path) for path in pathlib.Path("configs").glob("*.py")))
        raise app.UsageError(f"--config=FILE is missing{f'; here: {found}' if found else ''}")
    from ipwd_jax import report, train  # JAX is loaded once the command line is known to be right

    logging.set_verbosity(logging.ERROR)
    python_logging.captureWarnings(True)
    config = _CONFIG.value
    workdir = pathlib.Path(_WORKDIR.value or f"runs/{config.name or 'run'}_seed{config.seed}")
    if _MODE.value == "eval":
        result = train.evaluate_run(config, workdir)
    else:
        result = train.run(config, workdir, teacher_only=_MODE.value == "teacher")
    print(report.summary(result))
    print(f"Written to {workdir}")


def main() -> None:
    """The command line. Exits with 2 on a user's mistake, with 128 + signal when stopped."""
    try:
        app.run(_main, flags_parser=_parse)
    except UserError as error:
        _exit(error)
    except Interrupted as stop:
        print(f"\n{stop}; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + stop.signum)


if __name__ == "__main__":
    main()

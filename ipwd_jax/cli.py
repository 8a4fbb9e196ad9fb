"""The command `ipwd-jax`: one name for the modules `main`, `report`, `sweep` and `convert`.

  ipwd-jax train --config=configs/digits_ipwd.py --config.epochs=10
  ipwd-jax eval --config=configs/digits_ipwd.py
  ipwd-jax predict runs/mine_seed0 cat.jpg dog.jpg
  ipwd-jax report runs/mine_seed*
  ipwd-jax sweep --config=configs/sweeps/digits.py
  ipwd-jax export runs/mine_seed0 student.pth
  ipwd-jax import resnet32x4.pth --workdir=runs/teacher

`ipwd-jax COMMAND --help` explains the arguments of a command.
"""

import argparse
import importlib
import pathlib
import sys
from collections.abc import Sequence

from ipwd_jax import signals
from ipwd_jax.errors import UserError

# Command -> module whose `main` it runs, and what is put before the arguments.
_COMMANDS: dict[str, tuple[str, list[str]]] = {
    "train": ("main", []),
    "eval": ("main", ["--mode=eval"]),
    "report": ("report.__main__", []),
    "sweep": ("sweep", []),
    "export": ("convert", ["export"]),
    "import": ("convert", ["import"]),
}


def main() -> None:
    """Run the command line; exit with status 2 after a mistake of the user."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    with signals.exit_statuses(resumes=command in ("train", "sweep")):
        if command == "predict":
            predict(sys.argv[2:])
        elif command in _COMMANDS:
            module, before = _COMMANDS[command]
            sys.argv = [f"ipwd-jax {command}", *before, *sys.argv[2:]]
            importlib.import_module(f"ipwd_jax.{module}").main()
        elif command in ("-h", "--help", "help"):
            print(__doc__)
        else:
            known = ", ".join([*_COMMANDS, "predict"])
            raise UserError(f"unknown command {command!r}; valid: {known}")


def predict(argv: Sequence[str]) -> None:
    """Print, for each image file, the most probable classes and their probabilities.

    Raises:
        UserError: the run, its network or an image cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="ipwd-jax predict", description="Classify images with the network of a run."
    )
    parser.add_argument("run", help="work directory of the run")
    parser.add_argument("images", nargs="+", metavar="image", help="image files")
    parser.add_argument("--which", choices=("last", "best"), default="last", help="epoch")
    parser.add_argument("--top", type=int, default=3, help="number of classes to print per image")
    parser.add_argument(
        "--config", help="config file that adds the network, if ipwd_jax does not have it"
    )
    given = parser.parse_args(argv)
    if given.top < 1:
        parser.error(f"--top must be at least 1, found {given.top}")
    from absl import logging

    from ipwd_jax.api import load_module
    from ipwd_jax.runs import load_student

    logging.set_verbosity(logging.ERROR)
    if given.config:
        load_module(pathlib.Path(given.config.partition(":")[0]))
    student = load_student(given.run, given.which)
    found = student.predict(given.images)
    for image, row in zip(given.images, found.probabilities, strict=True):
        best = row.argsort()[::-1][: given.top]
        shown = ", ".join(f"{student.class_names[label]} {row[label]:.1%}" for label in best)
        # Names of files need not be UTF-8.
        print(f"{image}: {shown}".encode(errors="replace").decode())


if __name__ == "__main__":
    main()

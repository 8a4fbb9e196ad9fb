"""Import PyTorch checkpoints into work directories, and export them; PyTorch is not needed.

  python -m ipwd_jax.convert import resnet32x4.pth
  python -m ipwd_jax.convert import teacher.safetensors --workdir=runs/teacher --network=wrn_40_2
  python -m ipwd_jax.convert export runs/digits_ipwd_seed0 student.pth --which=best
  python -m ipwd_jax.convert export runs/own_seed0 it.pth --config=examples/own_network.py

An imported network is used as a teacher by --config.teacher.workdir=DIR and evaluated by
`python -m ipwd_jax.main --config=FILE --workdir=DIR --mode=eval`.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from absl import logging

from ipwd_jax.api import load_module
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch import export_file, import_file


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exits with 2 on a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m ipwd_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="PyTorch's file -> work directory of a teacher")
    into.add_argument("file", type=pathlib.Path, help=".pth, .pt or .safetensors")
    into.add_argument("--workdir", type=pathlib.Path, help="default: runs/ and the file's name")
    into.add_argument("--network", default="", help="default: inferred from names and shapes")
    into.add_argument("--key", default="", help="entry of the file that has the state dict")
    out = commands.add_parser("export", help="work directory -> PyTorch's file")
    out.add_argument("workdir", type=pathlib.Path)
    out.add_argument("file", type=pathlib.Path, help="ends in .pth, .pt or .safetensors")
    out.add_argument("--which", choices=("last", "best"), default="last", help="epoch")
    for command in (into, out):
        command.add_argument(
            "--config",
            type=lambda name: pathlib.Path(name.partition(":")[0]),
            help="config file that adds the network, if it is not one of ipwd_jax",
        )
    given = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    try:
        if given.config:
            load_module(given.config)
        if given.command == "import":
            import_file(given.file, given.workdir, given.network, given.key)
            print(f"Written to {given.workdir or pathlib.Path('runs') / given.file.stem}")
        else:
            fit = export_file(given.workdir, given.file, given.which)
            print(f"{fit.name}, {fit.classes} classes, written to {given.file}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

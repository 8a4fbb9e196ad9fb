"""Import PyTorch checkpoints as work directories, and export the networks of runs.

  python -m ipwd_jax.convert import resnet32x4.pth
  python -m ipwd_jax.convert import teacher.safetensors --workdir=runs/teacher --network=wrn_40_2
  python -m ipwd_jax.convert export runs/digits_ipwd_seed0 student.pth --which=best
  python -m ipwd_jax.convert export runs/digits_ipwd_seed0 student.stablehlo
  python -m ipwd_jax.convert export runs/digits_ipwd_seed0 student.onnx
  python -m ipwd_jax.convert export runs/own_seed0 it.pth --config=examples/own_network.py

The suffix of an exported file decides its format. PyTorch files (.pth, .pt or .safetensors) hold
the weights alone; they are read and written without PyTorch. StableHLO and ONNX files hold the
whole computation, from uint8 images to logits, and run without ipwd_jax (see `ipwd_jax.export`).

`--config.teacher.workdir=DIR` uses an imported network as the teacher of a run, and
`python -m ipwd_jax.main --config=FILE --workdir=DIR --mode=eval` evaluates it.
"""

import argparse
import pathlib
from collections.abc import Sequence

from absl import logging

from ipwd_jax import export, signals
from ipwd_jax.api import load_module
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch import export_file, import_file

_SUFFIXES = (".pth", ".pt", ".safetensors", *export.SUFFIXES)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 after a mistake of the user."""
    parser = argparse.ArgumentParser(
        prog="python -m ipwd_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="turn a PyTorch file into the run of a teacher")
    into.add_argument("file", type=pathlib.Path, help=".pth, .pt or .safetensors file to read")
    into.add_argument("--workdir", type=pathlib.Path, help="default: runs/ plus the file's name")
    into.add_argument("--network", default="", help="default: inferred from its tensors")
    into.add_argument("--key", default="", help="entry of the file that holds the state dict")
    out = commands.add_parser("export", help="write the network of a run to a file")
    out.add_argument("workdir", type=pathlib.Path, help="work directory of the run")
    out.add_argument("file", type=pathlib.Path, help=f"file to write: {', '.join(_SUFFIXES)}")
    out.add_argument("--which", choices=("last", "best"), default="last", help="epoch to export")
    for command in (into, out):
        command.add_argument(
            "--config",
            type=lambda name: pathlib.Path(name.partition(":")[0]),
            help="config file that adds the network, if ipwd_jax does not have it",
        )
    given = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    with signals.exit_statuses(resumes=False):
        if given.config:
            load_module(given.config)
        if given.command == "import":
            workdir = (given.workdir or pathlib.Path("runs") / given.file.stem).expanduser()
            import_file(given.file.expanduser(), workdir, given.network, given.key)
            print(f"Written to {workdir}")
        else:
            print(f"{_export(given.workdir, given.file, given.which)} written to {given.file}")


def _export(workdir: pathlib.Path, file: pathlib.Path, which: str) -> str:
    """Write a file in the format of its suffix; return the name of the network."""
    if file.suffix not in _SUFFIXES:
        raise UserError(
            f"the file to write must end in one of {', '.join(_SUFFIXES)}, found {file}"
        )
    if file.suffix in export.SUFFIXES:
        return export.export_run(workdir, file, which)["network"]
    return export_file(workdir, file, which)


if __name__ == "__main__":
    main()

"""Import PyTorch checkpoints into work directories, and export them; PyTorch is not needed.

  python -m ipwd_jax.convert import resnet32x4.pth
  python -m ipwd_jax.convert import teacher.safetensors --workdir=runs/teacher --network=wrn_40_2
  python -m ipwd_jax.convert export runs/digits_ipwd_seed0 student.pth --which=best
  python -m ipwd_jax.convert export runs/own_seed0 it.pth --config=examples/own_network.py

An imported network is used as a teacher by --config.teacher.workdir=DIR and evaluated by
`python -m ipwd_jax.main --config=FILE --workdir=DIR --mode=eval`.
"""

import argparse
import hashlib
import importlib.util
import json
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from ipwd_jax import checkpoint, models, torch_files, writers
from ipwd_jax import config as config_lib
from ipwd_jax.errors import UserError
from ipwd_jax.models.torch_names import from_torch, to_torch, torch_shapes
from ipwd_jax.state import not_finite
from ipwd_jax.torch_networks import Fit, guess, renamed, template_of
from ipwd_jax.typing import PyTree

# Where training scripts keep the network's tensors in what they save.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "student", "teacher")
_COUNTER = "num_batches_tracked"


def import_file(
    path: pathlib.Path, workdir: pathlib.Path | None = None, network: str = "", key: str = ""
) -> dict[str, Any]:
    """Make a work directory of a finished teacher from a PyTorch checkpoint.

    Args:
        path: written by `torch.save`, or a `.safetensors` file.
        workdir: made here, whole or not at all; None: `runs/` and the file's name.
        network: one of `models.NETWORKS`; empty: inferred from tensor names and shapes.
        key: entry of the file that has the tensors; empty: one of the usual ones.

    Returns:
        What `result.json` holds.

    Raises:
        UserError: the file cannot be read, matches no known network or several, or has weights
            that are NaN, infinite or near to it; or the work directory exists. Nothing is written
            then.
    """
    workdir = workdir or pathlib.Path("runs") / path.stem
    if workdir.exists():
        raise UserError(f"{workdir} exists already; choose another --workdir or delete it")
    tensors, metadata = unwrap(torch_files.load(path), key)
    fit = guess({name: x.shape for name, x in tensors.items()}, network)
    template = template_of(fit)
    tensors = renamed(tensors, torch_shapes(template))
    if (claimed := sum(x.nbytes for x in tensors.values())) > path.stat().st_size:
        raise UserError(
            f"the tensors of {path} share their numbers: they would take {claimed:,} bytes, the "
            f"file has {path.stat().st_size:,}. In PyTorch, save a tensor.clone() of each."
        )
    variables = _float32(from_torch(tensors, template))
    _check_finite(path, variables)
    result = {
        "name": path.stem,
        "network": fit.name,
        "classes": fit.classes,
        "parameters": sum(x.size for x in jax.tree.leaves(variables["params"])),
        "imported": {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "metadata": metadata,
        },
        "versions": writers.versions(),
    }
    print(f"{fit.name}, {fit.classes} classes, {result['parameters']:,} parameters", flush=True)
    config = config_lib.default()
    config.name, config.model.name = path.stem, fit.name
    _write(workdir, variables, json.loads(config.to_json_best_effort()), result)
    return result


def _write(workdir: pathlib.Path, variables: PyTree, config: dict, result: dict) -> None:
    """Writes a work directory under another name first, so that it appears whole."""
    unfinished = workdir.with_name(f".{workdir.name}.tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        checkpoint.save_network(unfinished, variables)
        writers.write_json(unfinished / "config.json", {"config": config, "checksums": {}})
        writers.write_json(unfinished / "result.json", result)
        unfinished.rename(workdir)
    except OSError as error:
        raise UserError(f"{workdir} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def export_file(workdir: pathlib.Path, path: pathlib.Path, which: str = "last") -> Fit:
    """Write the network of a run as a state dict that PyTorch loads strictly.

    Args:
        workdir: of the run, or of an imported network.
        path: ends in .pth, .pt or .safetensors and must not exist.
        which: "last" or "best".

    Raises:
        UserError: the run has no readable checkpoint, or `path` cannot be written.
    """
    fit = _fit_of_run(workdir, which)
    variables, _ = checkpoint.load_network(workdir, which, template_of(fit))
    tensors = to_torch(jax.device_get(variables))
    counters = [name for name in tensors if name.endswith(".running_mean")]
    for name in counters:
        tensors[name.removesuffix("running_mean") + _COUNTER] = np.zeros((), np.int64)
    torch_files.save(path, tensors)
    return fit


def _fit_of_run(workdir: pathlib.Path, which: str) -> Fit:
    path = workdir / "config.json"
    try:
        name = json.loads(path.read_text())["config"]["model"]["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        detail = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({detail}); is {workdir} a run?") from error
    try:
        models.create(name, classes=1)
    except UserError as error:
        raise UserError(
            f"{workdir} is a run of {name!r}, which is not a network of ipwd_jax; if a config file "
            "of yours adds it, name that file with --config=FILE"
        ) from error
    folder = workdir.resolve() / "checkpoints"
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
    if not steps:
        raise UserError(f"no checkpoint in {folder}; train first, or choose another run")
    try:
        saved = ocp.StandardCheckpointer().metadata(folder / str(max(steps)) / which).item_metadata
        shapes = torch_shapes({name: saved[name] for name in ("params", "batch_stats")})
    except Exception as error:  # Orbax raises many kinds
        raise UserError(f"the checkpoint in {folder} cannot be read: {error}") from error
    return guess(shapes, name)


def unwrap(tree: Any, key: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Find the network's tensors in what a file holds, and print which of them are left out.

    Args:
        tree: a state dict, or a dictionary with one in a usual place.
        key: of the entry that has it; empty: a usual one.

    Returns:
        Tensors by the names that the network itself gave them, and the single numbers and strings
        beside them, such as an epoch.

    Raises:
        UserError: there are no such tensors, or in several places.
    """
    if not isinstance(tree, Mapping):
        raise UserError(f"the file holds a {type(tree).__name__} instead of a state dict")
    tree = _named(tree)
    metadata = {k: v for k, x in tree.items() if (v := _scalar(x)) is not None}
    place = _place(tree, key)
    tree = _named(tree[place]) if place else tree
    tensors = {k.removeprefix("module."): np.asarray(x) for k, x in tree.items() if _is_tensor(x)}
    tensors = {k: x for k, x in tensors.items() if not k.endswith(_COUNTER)}
    if any(name.startswith("backbone.") for name in tensors):
        extra = [name for name in tensors if name.startswith("proj_head.")]
        if extra:
            print(f"left out, not of the classifier: {', '.join(extra)}", flush=True)
        tensors = {k.removeprefix("backbone."): x for k, x in tensors.items() if k not in extra}
    return tensors, {k: v for k, v in metadata.items() if k not in tree}


def load_config_file(path: pathlib.Path) -> None:
    """Runs a config file, so that the networks that it adds to `models.NETWORKS` are known.

    Raises:
        UserError: it is missing, or raises an error.
    """
    try:
        spec = importlib.util.spec_from_file_location("config_of_convert", path)
        if spec is None or spec.loader is None:
            raise ImportError("not the name of a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file raises
        raise UserError(
            f"the config file {path} cannot be run: {type(error).__name__}: {error}"
        ) from error


def _named(tree: Mapping) -> dict[str, Any]:
    """The entries of `tree` that have names: those under numbers are no layer's."""
    return {name: value for name, value in tree.items() if isinstance(name, str)}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _is_state_dict(value: Any) -> bool:
    """Whether it is a dictionary with the kernel of a layer among its values."""
    return isinstance(value, Mapping) and any(
        _is_tensor(x) and x.ndim > 1 for x in _named(value).values()
    )


def _place(tree: Mapping, key: str) -> str:
    """The entry of `tree` that is the state dict; empty: `tree` itself."""
    found = [name for name, value in tree.items() if _is_state_dict(value)]
    places = [name for name in ([key] if key else _WRAPPERS) if name in found]
    if len(places) == 1:
        return places[0]
    if not key and not places and _is_state_dict(tree):
        return ""
    if not found:
        entries = ", ".join(list(tree)[:20]) or "none"
        raise UserError(
            f"the file holds no state dict; its entries: {entries}. Save model.state_dict()."
        )
    what = f"no state dict under {key!r}" if key else "state dicts under other names than usual"
    raise UserError(
        f"the file holds {'several state dicts' if places else what}; "
        f"choose one with --key=NAME: {', '.join(found)}"
    )


def _scalar(value: Any) -> bool | int | float | str | None:
    """A value for `result.json`; None for one that is not a single number or a short string."""
    if _is_tensor(value):
        return value.item() if value.size == 1 and value.dtype.kind in "biuf" else None
    is_scalar = isinstance(value, bool | int | float) or (
        isinstance(value, str) and len(value) <= 200
    )
    return value if is_scalar else None


def _float32(variables: PyTree) -> PyTree:
    types = {x.dtype for x in jax.tree.leaves(variables)} - {np.dtype(np.float32)}
    for dtype in types:
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"the file has weights of type {dtype}; save them as float32")
        print(f"converted from {dtype} to float32", flush=True)
    with np.errstate(over="ignore"):  # found by `_check_finite`
        return jax.tree.map(lambda x: np.asarray(x, np.float32), variables)


def _check_finite(path: pathlib.Path, variables: PyTree) -> None:
    """Raises `UserError` with the names of tensors that are NaN, infinite or near to it."""
    if names := not_finite(to_torch(variables)):
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        raise UserError(
            f"{path} has weights that are not finite in float32, or near to it, in "
            f"{', '.join(names[:20])}{more}. Use a checkpoint from before the training diverged."
        )


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
            load_config_file(given.config)
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

"""Import PyTorch checkpoints as work directories, and export the networks of runs to PyTorch."""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ipwd_jax import checkpoint, models, writers
from ipwd_jax import config as config_lib
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch import files
from ipwd_jax.pytorch.names import from_torch, to_torch, torch_shapes
from ipwd_jax.pytorch.networks import Fit, guess, renamed, template_of
from ipwd_jax.pytorch.state_dicts import COUNTER, unwrap
from ipwd_jax.state import not_finite
from ipwd_jax.student import term_with_head
from ipwd_jax.typing import PyTree


def import_file(
    path: str | pathlib.Path,
    workdir: str | pathlib.Path | None = None,
    network: str = "",
    key: str = "",
    checksums: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Make the work directory of a finished teacher from a PyTorch checkpoint.

    Args:
        path: a file that `torch.save` wrote, or a `.safetensors` file.
        workdir: the work directory, which is created whole or not at all; None means `runs/`
            followed by the name of the file without its suffix.
        network: one of `models.NETWORKS`; if empty, it is inferred from tensor names and shapes.
        key: the entry of the file that holds the tensors; empty means one of the usual entries.
        checksums: of the data that it was trained on, if that is known, under the key `data`. A run
            on other data then refuses this teacher.

    Returns:
        The content of `result.json`.

    Raises:
        UserError: the file cannot be read, matches no known network or several, or has weights
            that are NaN or infinite or whose squares overflow; or the work directory exists.
            Nothing is written in these cases.
    """
    path = pathlib.Path(path).expanduser()
    workdir = pathlib.Path(workdir or f"runs/{path.stem}").expanduser()
    checkpoint.check_path(workdir)
    if os.path.exists(workdir):  # False for a name that no folder can have
        raise UserError(f"{workdir} exists already; choose another --workdir or delete it")
    fit, variables, metadata = _read(path, network, key)
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
    noted = {"config": config_lib.plain(config), "checksums": dict(checksums or {})}
    _write(workdir, variables, noted, result)
    return result


def load_variables(path: pathlib.Path, network: str = "") -> PyTree:
    """Return the variables, float32, of a network that is in a run's folder or a PyTorch file.

    Args:
        path: work directory of a finished run, whose last epoch is taken, or a file as
            `import_file` takes it.
        network: the network of a file; if empty, it is inferred.

    Raises:
        UserError: there is neither a finished run nor a file, or it cannot be read.
    """
    if not path.is_dir():
        return _read(path, network)[1]
    _, template, term = _of_run(path, "last")
    if not (path / "result.json").exists():
        raise UserError(f"the run in {path} is not finished; run its command again first")
    if term:
        raise UserError(
            f"{path} was trained with the loss term {term}, whose head makes the predictions, so "
            "its network cannot be read alone; name another run"
        )
    return checkpoint.load_network(path, "last", template)[0]


def _read(path: pathlib.Path, network: str, key: str = "") -> tuple[Fit, PyTree, dict[str, Any]]:
    """Return the network that a file holds, its variables, and the metadata beside them."""
    try:
        return _network_of(path, network, key)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _network_of(path: pathlib.Path, network: str, key: str) -> tuple[Fit, PyTree, dict[str, Any]]:
    tensors, metadata = unwrap(files.load(path), key)
    fit = guess({name: x.shape for name, x in tensors.items()}, network)
    template = template_of(fit)
    tensors = renamed(tensors, torch_shapes(template))
    if (claimed := sum(x.nbytes for x in tensors.values())) > path.stat().st_size:
        raise UserError(
            f"the tensors of {path} share memory: they would take {claimed:,} bytes apart, but the "
            f"file has {path.stat().st_size:,}. In PyTorch, save a tensor.clone() of each."
        )
    variables = _float32(from_torch(tensors, template))
    _check_finite(path, variables)
    return fit, variables, metadata


def _write(workdir: pathlib.Path, variables: PyTree, config: dict, result: dict) -> None:
    """Write a work directory under a temporary name and rename it, so that it appears whole."""
    unfinished = workdir.with_name(f".{workdir.name}.{os.getpid()}.tmp")  # others may do the same
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        checkpoint.save_network(unfinished, variables)
        writers.write_json(unfinished / "config.json", config)
        writers.write_json(unfinished / "result.json", result)
        unfinished.rename(workdir)
    except OSError as error:
        raise UserError(f"{workdir} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def export_file(workdir: str | pathlib.Path, path: str | pathlib.Path, which: str = "last") -> str:
    """Write the network of a run as a state dict that PyTorch loads strictly.

    If a term has replaced the head, as SimKD does, the tensors of the network have the prefix
    `backbone.` and those of the head `head.`, and their names are those of an `nn.Module` with two
    such modules.

    Args:
        workdir: the work directory of the run or of an imported network.
        path: the file to write; it must end in .pth, .pt or .safetensors and must not exist.
        which: the epoch to export, "last" or "best".

    Returns:
        The name of the network.

    Raises:
        UserError: the run has no readable checkpoint, or `path` cannot be written.
    """
    workdir, path = (pathlib.Path(p).expanduser() for p in (workdir, path))
    name, template, _ = _of_run(workdir, which)
    variables, _ = checkpoint.load_network(workdir, which, template)
    tensors = to_torch(jax.device_get(variables))
    counters = [tensor for tensor in tensors if tensor.endswith(".running_mean")]
    for tensor in counters:
        tensors[tensor.removesuffix("running_mean") + COUNTER] = np.zeros((), np.int64)
    files.save(path, tensors)
    return name


def _of_run(workdir: pathlib.Path, which: str) -> tuple[str, PyTree, str]:
    """Return a run's network, the shapes of the variables, and the term that has its head."""
    path = workdir / "config.json"
    try:
        config = ConfigDict(json.loads(path.read_text())["config"])
        name, term = config.model.name, term_with_head(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        detail = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} cannot be read ({detail}); check that {workdir} is the work directory of a run"
        ) from error
    models.check_run(workdir, name)
    saved = checkpoint.saved_arrays(checkpoint.newest(workdir) / which)
    arrays = {collection: saved[collection] for collection in ("params", "batch_stats")}
    return name, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays), term


def _float32(variables: PyTree) -> PyTree:
    types = {x.dtype for x in jax.tree.leaves(variables)} - {np.dtype(np.float32)}
    for dtype in types:
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"the file has weights of type {dtype}; save them in float32")
        print(f"converted from {dtype} to float32", flush=True)
    with np.errstate(over="ignore"):  # `_check_finite` finds what overflows
        return jax.tree.map(lambda x: np.asarray(x, np.float32), variables)


def _check_finite(path: pathlib.Path, variables: PyTree) -> None:
    """Raise `UserError` with the names of tensors that are not finite or whose squares are not."""
    if names := not_finite(to_torch(variables)):
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        raise UserError(
            f"{path} has weights that are NaN or infinite in float32, or whose squares are, in "
            f"{', '.join(names[:20])}{more}. Use a checkpoint from before the training diverged."
        )

"""Trained teachers that come with the package, by names such as `vgg8@cifar100-16ep`.

Each has two files in this folder: `NAME.safetensors` holds its kernels as float16 and the rest as
float32, and `NAME.json` says how it was trained, how accurate it was before that rounding, and the
checksum of the first.
`python -m ipwd_jax.teachers` lists them; `ipwd_jax.teachers.add` adds one.
"""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from ipwd_jax import config, writers
from ipwd_jax.errors import UserError, unknown_name
from ipwd_jax.pytorch import files, import_file
from ipwd_jax.pytorch.convert import load_variables
from ipwd_jax.pytorch.names import to_torch

_FOLDER = pathlib.Path(__file__).parent


def names() -> list[str]:
    """Return the names of all teachers."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def about(name: str) -> dict[str, Any]:
    """Return what is known of a teacher: network, data, accuracy, settings and versions.

    Raises:
        UserError: there is no teacher of this name.
    """
    if name not in names():
        raise unknown_name("teacher", name, names())
    found = json.loads((_FOLDER / f"{name}.json").read_text())
    return {**found, "config": config.filled(found["config"])}


def check(pretrained: str, network: str) -> None:
    """Raise `UserError` unless `pretrained` is a teacher's name or a file, for a `network`.

    A file is read as this network later, and is checked then.
    """
    if pathlib.Path(pretrained).expanduser().is_file():
        return
    if "@" not in pretrained:
        raise UserError(
            f"config.teacher.pretrained names {pretrained}, which is neither a file nor a teacher; "
            f"the teachers are {', '.join(names()) or 'none'}"
        )
    if (found := about(pretrained)["network"]) != network:
        raise UserError(
            f"config.teacher.pretrained={pretrained} is a {found}, but config.teacher.name is "
            f"{network!r}; set it to {found}"
        )


def ensure(pretrained: str, network: str, workdir: pathlib.Path) -> None:
    """Import a teacher, or the file of one, into `workdir`, unless that was done before.

    Args:
        pretrained: name of a teacher, or path of a PyTorch or `.safetensors` file.
        network: name of its network.
        workdir: the folder in which it appears as a finished run.

    Raises:
        UserError: the file cannot be read or is damaged, or the folder holds something else.
    """
    named, path = {}, pathlib.Path(pretrained).expanduser()
    if not path.is_file():
        named, path = about(pretrained), _FOLDER / f"{pretrained}.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if named and digest != named["sha256"]:
        raise UserError(f"{path} is damaged: its SHA-256 is {digest}; install the package again")
    if not workdir.exists():
        try:
            import_file(path, workdir, network, checksums=named.get("checksums"))
        except UserError:
            if not workdir.exists():  # otherwise another process was faster
                raise
    try:
        there = json.loads((workdir / "result.json").read_text())["imported"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        there = ""
    if there != digest:
        raise UserError(
            f"{workdir} was not imported from {path}, so it is another teacher; move it away, or "
            "choose another --workdir for the student"
        )


def add(workdir: pathlib.Path, name: str, folder: pathlib.Path = _FOLDER) -> dict[str, Any]:
    """Store the last epoch of a finished run as a teacher of the package.

    Args:
        workdir: work directory of the run.
        name: of the teacher, such as `vgg8@cifar100-16ep`.
        folder: where its two files are written.

    Returns:
        The content of the `.json` file.

    Raises:
        UserError: the run is not finished, a kernel overflows float16, or the files exist.
    """
    try:
        noted = json.loads((workdir / "config.json").read_text())
        result = json.loads((workdir / "result.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir} holds no finished run: {error}") from error
    tensors = to_torch(load_variables(workdir))
    # A variance can be smaller than what float16 represents well; there are few of them.
    with np.errstate(over="ignore"):
        half = {k: x.astype(np.float16) if x.ndim > 1 else x for k, x in tensors.items()}
    if bad := [k for k, x in half.items() if not np.isfinite(x).all()]:
        raise UserError(f"{bad[0]} of {workdir} overflows float16")
    path, beside = folder / f"{name}.safetensors", folder / f"{name}.json"
    if beside.exists():
        raise UserError(f"{beside} exists already; choose another name")
    files.save(path, half)
    found = {
        "network": result["network"],
        "data": result["data"],
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "last": result["last"],
        "checksums": {"data": noted["checksums"]["data"]},
        "config": noted["config"],
        "device": result["device"],
        "versions": result["versions"],
    }
    writers.write_json(beside, found)
    return found

"""A work directory belongs to one run: one process at a time, one config, one set of inputs."""

import contextlib
import fcntl
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from ipwd_jax import writers
from ipwd_jax.config import default, differences
from ipwd_jax.errors import UserError

# Settings that may change between two starts of a run: they leave its numbers as they are, or
# what they lead to is compared by checksum.
_FREE = (
    "checkpoint",
    "data.dir",
    "data.download",
    "data.threads",
    "eval_batch_size",
    "log_every_steps",
    "seeds",
    "steps_per_call",
    "teacher.look_ahead",
    "teacher.view_cache",
    "teacher.workdir",
)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the directory and keeps other processes out of it.

    Raises:
        UserError: it cannot be written, or another process is using it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to the work directory {workdir}: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process is using {workdir}; wait for it or choose another --workdir"
            ) from None
        yield


def claim(workdir: pathlib.Path, config: ConfigDict, checksums: Mapping[str, str]) -> None:
    """Notes in `config.json` what a work directory is for, or refuses one that is for other things.

    Args:
        workdir: of the run.
        config: of the run.
        checksums: of what the run reads (`data`, `teacher`); those noted earlier are kept.

    Raises:
        UserError: the directory is of another config, data or teacher; the message says what
          differs.
    """
    path = workdir / "config.json"
    plain = json.loads(config.to_json_best_effort())
    noted = {}
    if path.exists():
        try:
            there = json.loads(path.read_text())
            noted = there["checksums"]
            lines = differences(_binding(there["config"]), _binding(plain), "config.")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}); choose another --workdir") from error
        lines += differences(
            {name: noted.get(name, value) for name, value in checksums.items()},
            dict(checksums),
            "checksum of the ",
        )
        if lines:
            raise UserError(
                f"{workdir} holds a run of another config:\n  "
                + "\n  ".join(lines)
                + "\nChoose another --workdir, or delete this one if it is not needed."
            )
    elif any(workdir.glob("checkpoints/*")):
        raise UserError(
            f"{workdir} holds checkpoints but no {path.name}, so it is not known what they are of; "
            "choose another --workdir"
        )
    writers.write_json(path, {"config": plain, "checksums": {**noted, **checksums}})


def _binding(config: dict) -> dict:
    """A deep copy without the settings that may change.

    Settings that it lacks, of terms added since it was written, for example, have their defaults.
    """
    config = _filled(config, json.loads(default().to_json()))
    for path in _FREE:
        parent, _, key = path.rpartition(".")
        (config[parent] if parent else config).pop(key, None)
    return config


def _filled(config: dict, defaults: dict) -> dict:
    missing = {key: value for key, value in defaults.items() if key not in config}
    return missing | {
        key: _filled(value, defaults.get(key, {})) if isinstance(value, dict) else value
        for key, value in config.items()
    }


def check_space(workdir: pathlib.Path, needed: int) -> None:
    """Raises `UserError` when fewer than `needed` bytes are free where `workdir` is."""
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise UserError(
            f"{workdir} has {free / 2**20:.0f} MiB free; the checkpoints of this run need "
            f"{needed / 2**20:.0f} MiB. Make space or choose another --workdir."
        )

"""A work directory belongs to one run: one process at a time, one config, one set of inputs."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, TextIO

from ml_collections import ConfigDict

from ipwd_jax import writers
from ipwd_jax.config import default, differences
from ipwd_jax.errors import UserError
from ipwd_jax.losses import WEIGHTINGS

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
def locked(workdir: pathlib.Path, wait: bool = False) -> Iterator[None]:
    """Makes the directory and keeps other processes out of it.

    A directory that is made here and in which a refused run has left nothing but its settings is
    removed again.

    Args:
        workdir: the directory.
        wait: until another process has finished with it, instead of refusing.

    Raises:
        UserError: it cannot be written, or another process is using it.
    """
    made = not workdir.exists()
    lock = _lock(workdir, wait)
    with lock:
        try:
            yield
        except UserError:
            if made and {path.name for path in workdir.iterdir()} <= {".lock", "config.json"}:
                shutil.rmtree(workdir)
            raise


def _lock(workdir: pathlib.Path, wait: bool) -> TextIO:
    path = workdir / ".lock"
    while True:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
        except OSError as error:
            raise UserError(f"cannot write to the work directory {workdir}: {error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not wait:
                lock.close()
                raise UserError(
                    f"another process is using {workdir}; wait for it or choose another --workdir"
                ) from None
            print(f"Waiting for another process that is using {workdir}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # The other process may have removed the directory, and with it the file that we hold.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno())):
            return lock
        lock.close()


def claim(
    workdir: pathlib.Path,
    config: ConfigDict,
    checksums: Mapping[str, str],
    data: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Notes in `config.json` what a work directory is for, or refuses one that is for other things.

    Args:
        workdir: of the run.
        config: of the run.
        checksums: of what the run reads (`data`, `teacher`); those noted earlier are kept.
        data: what a user of the trained network must know of the data: `Dataset.description`.

    Raises:
        UserError: the directory is of another config, data or teacher; the message says what
          differs.
    """
    path = workdir / "config.json"
    plain = json.loads(config.to_json_best_effort())
    noted, kept = {}, {}
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
        kept = {key: there[key] for key in ("chosen", "data") if key in there}
    elif any(workdir.glob("checkpoints/*")):
        raise UserError(
            f"{workdir} holds checkpoints but no {path.name}, so it is not known what they are of; "
            "choose another --workdir"
        )
    note = {"config": plain, "checksums": {**noted, **checksums}, **kept}
    writers.write_json(path, note | ({"data": dict(data)} if data else {}))


def chosen(workdir: pathlib.Path, setting: str) -> Any:
    """What an automatic setting of this run was resolved to when it began; None: not yet."""
    return json.loads((workdir / "config.json").read_text()).get("chosen", {}).get(setting)


def choose(workdir: pathlib.Path, setting: str, value: Any) -> None:
    """Notes in `config.json` what an automatic setting is resolved to, for when the run resumes."""
    path = workdir / "config.json"
    there = json.loads(path.read_text())
    writers.write_json(path, {**there, "chosen": {**there.get("chosen", {}), setting: value}})


def identity(config: ConfigDict, checksums: Mapping[str, str]) -> str:
    """Checksum of what decides the numbers of a run, but for its seed: 6 hexadecimal digits."""
    binding = _numbers(json.loads(config.to_json_best_effort()))
    binding.pop("seed")
    text = json.dumps([binding, dict(checksums)], sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"[:6]


def holds(workdir: pathlib.Path, config: ConfigDict, checksums: Mapping[str, str]) -> bool:
    """Whether a finished run of this config and these inputs is there, whatever it is called."""
    try:
        there = json.loads((workdir / "config.json").read_text())
        same = all(there["checksums"].get(name) == value for name, value in checksums.items())
        wanted = _numbers(json.loads(config.to_json_best_effort()))
        return same and _numbers(there["config"]) == wanted and (workdir / "result.json").exists()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no run of ours, or a damaged one


def _numbers(config: dict) -> dict:
    """The settings that decide the numbers of a run: the binding ones but for the name.

    Terms that are off, and settings of weightings that are, decide nothing: a teacher is the same
    whether or not the config of its student adds some of its own.
    """
    config = _binding(config)
    config["loss"], config["first_stage"]["loss"] = (
        {name: weight for name, weight in loss.items() if weight}
        for loss in (config["loss"], config["first_stage"]["loss"])
    )
    on = {*config["loss"], *config["first_stage"]["loss"]}
    config["terms"] = {name: fields for name, fields in config["terms"].items() if name in on}
    if not WEIGHTINGS[config["weighting"]["name"]].weighs:
        del config["weighting"]
    return {key: value for key, value in config.items() if key != "name"}


def _binding(config: dict) -> dict:
    """A deep copy without the settings that may change.

    Settings that it lacks, of terms added since it was written, for example, have their defaults.
    """
    config = _filled(config, json.loads(default().to_json()))
    # The order of the samples and their views are those of the first seed.
    shared = list(config["seeds"])[:1] if config["share_order"] else []
    for path in _FREE:
        parent, _, key = path.rpartition(".")
        (config[parent] if parent else config).pop(key, None)
    return {**config, **({"seeds[0]": shared[0]} if shared else {})}


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

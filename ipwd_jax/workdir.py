"""A work directory belongs to one run: one process at a time, one config, one set of inputs."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TextIO

from ml_collections import ConfigDict

from ipwd_jax import parallel, writers
from ipwd_jax.config import default, differences, filled, plain
from ipwd_jax.errors import Interrupted, InUse, UserError
from ipwd_jax.losses import WEIGHTINGS

FAILURE = "failed.json"  # the note about a run that could not be trained
# Settings that can change when a run is started again: they do not change its numbers, or the data
# and the teacher that they select are compared by checksum.
FREE = (
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
    """Create the directory if it is missing, and keep other runs out of it.

    Of several processes that train together, the first one alone holds the lock.

    If the directory was missing and the run is then refused, the directory is removed again, unless
    the run has left more than its settings there.

    Args:
        workdir: the directory.
        wait: whether to wait for another process that is using it, instead of raising an error.

    Raises:
        UserError: the directory cannot be written to.
        InUse: another process is using it.
    """
    made = not os.path.exists(workdir) and parallel.is_first()
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(_lock(workdir, wait))

        parallel.from_first(lock)
        try:
            yield
        except UserError:
            if made and {path.name for path in workdir.iterdir()} <= {".lock", "config.json"}:
                shutil.rmtree(workdir)
            raise


@contextlib.contextmanager
def failures_noted(workdirs: Iterable[pathlib.Path]) -> Iterator[None]:
    """Write `failed.json`, which says why and when, into each directory if training fails.

    A directory of a finished run is left alone, and so is one whose run was only stopped. When
    training starts again, the note is removed.
    """
    workdirs = list(workdirs) if parallel.is_first() else []
    for workdir in workdirs:
        (workdir / FAILURE).unlink(missing_ok=True)
    try:
        yield
    except (Interrupted, BrokenPipeError):  # after `| head`, the run can resume
        raise
    except Exception as error:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        note = {"reason": f"{type(error).__name__}: {error}", "time": now}
        for workdir in workdirs:
            if not (workdir / "result.json").exists():
                with contextlib.suppress(UserError):  # the first error is the one to show
                    writers.write_json(workdir / FAILURE, note)
        raise


def _noted(path: pathlib.Path, key: str) -> Any:
    """Return an entry of a JSON file; None if the file or the entry is missing or damaged."""
    try:
        return json.loads(path.read_text())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def has_network(workdir: pathlib.Path) -> bool:
    """Return whether a finished run and its checkpoints are in a directory."""
    return parallel.from_first(
        lambda: (workdir / "result.json").exists() and any(workdir.glob("checkpoints/*"))
    )


def is_finished(workdir: pathlib.Path, epochs: int) -> bool:
    """Return whether the run in a directory has finished with this number of epochs."""
    noted = _noted(workdir / "config.json", "config") or {}
    return noted.get("epochs") == epochs and (workdir / "result.json").exists()


def check_begun_with(teacher: pathlib.Path, workdirs: Iterable[pathlib.Path], epochs: int) -> None:
    """Raise `UserError` if a run has begun with a teacher that is not in the directory `teacher`.

    A teacher that is trained again need not have the same bits, and its students would be refused
    only then. Runs that have all finished their `epochs` need no teacher.
    """

    def check() -> None:
        runs = list(workdirs)
        begun = [p for p in runs if "teacher" in (_noted(p / "config.json", "checksums") or ())]
        finished = all(is_finished(path, epochs) for path in runs)
        if begun and not finished and not any(teacher.glob("checkpoints/*")):
            raise UserError(
                f"{begun[0]} has begun with a teacher that is not in {teacher}. Move the teacher's "
                "folder there, or name it with --config.teacher.workdir. With --mode=teacher it is "
                "trained again, and its students go on if it has the same bits."
            )

    parallel.from_first(check)


def failure(workdir: pathlib.Path) -> str:
    """Return why the latest training in a directory failed; empty if it did not."""
    return str(_noted(workdir / FAILURE, "reason") or "")


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
        except BlockingIOError:
            if not wait:
                lock.close()
                raise InUse(
                    f"another process is using {workdir}; wait until it has finished, or choose "
                    "another --workdir"
                ) from None
            print(f"Waiting for another process that is using {workdir}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            lock.close()
            raise UserError(
                f"{path} cannot be locked ({error}), so that two processes could write to this "
                "folder at once; choose one on another file system"
            ) from error
        # The other process may have removed the directory, and with it the file locked here.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno())):
            return lock
        lock.close()


def check(
    workdir: pathlib.Path, config: ConfigDict, checksums: Mapping[str, str], extend: bool = False
) -> dict[str, Any]:
    """Return what `config.json` in a work directory records of this run; empty if it is new there.

    Args:
        workdir: work directory of the run.
        config: config of the run.
        checksums: checksums of the inputs of the run (`data`, `teacher`).
        extend: whether the run that is there may have fewer epochs.

    Raises:
        UserError: the directory belongs to a run with another config, other data or another
            teacher, and the message says what differs; or it is not known to which run it belongs.
    """
    path = workdir / "config.json"
    if not os.path.exists(path):  # also if the name is too long
        if os.path.exists(workdir / "checkpoints") and any(workdir.glob("checkpoints/*")):
            raise UserError(
                f"{workdir} holds checkpoints but no {path.name}, so it is not known to which run "
                "they belong; choose another --workdir"
            )
        return {}
    try:
        there = json.loads(path.read_text())
        noted = there["checksums"]
        before, now = _binding(there["config"]), _binding(plain(config))
        if longer := before["epochs"] < now["epochs"]:
            longer = not differences({**before, "epochs": now["epochs"]}, now)
        lines = [] if longer and extend else differences(before, now, "config.")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another --workdir") from error
    lines += differences(
        {name: noted.get(name, value) for name, value in checksums.items()},
        dict(checksums),
        "checksum of the ",
    )
    if lines:
        raise UserError(
            f"{workdir} holds another run:\n  "
            + "\n  ".join(lines)
            + "\nChoose another --workdir, or delete this one if it is not needed."
            + (" To train that run for more epochs, add --extend." if longer else "")
        )
    ended = (workdir / "result.json").exists()
    if longer and ended and before["epochs"] % now["eval_every_epochs"]:
        raise UserError(
            f"{workdir} has evaluated its last epoch, {before['epochs']}, as a longer run with "
            f"config.eval_every_epochs={now['eval_every_epochs']} would not, so it cannot be "
            "extended; start a new run with --config.model.pretrained=FOLDER instead"
        )
    return there


def claim(
    workdir: pathlib.Path,
    config: ConfigDict,
    checksums: Mapping[str, str],
    data: Mapping[str, Any] = MappingProxyType({}),
    extend: bool = False,
) -> None:
    """Record in `config.json` which run a work directory belongs to.

    Args:
        workdir: as for `check`.
        config: as for `check`.
        checksums: as for `check`. Others that are already recorded are kept.
        data: what a user of the trained network must know about the data, which is
            `Dataset.description()`. If it is empty, what is already recorded is kept.
        extend: as for `check`. The results of a run with fewer epochs are kept under names that
            end in the number of its epochs.

    Raises:
        UserError: as `check`.
    """
    there = check(workdir, config, checksums, extend)
    if there and (epochs := there["config"]["epochs"]) < config.epochs:
        _keep_results(workdir, epochs)
    note = {"config": plain(config), "checksums": {**there.get("checksums", {}), **checksums}}
    note |= {key: there[key] for key in ("data", "chosen") if key in there}
    writers.write_json(workdir / "config.json", note | ({"data": dict(data)} if data else {}))


def _keep_results(workdir: pathlib.Path, epochs: int) -> None:
    """Rename the results of a finished run that is extended; `result.json` last of all."""
    names = ("eval.json", "classes.csv", "samples.npz", "predictions.npz", "result.json")
    for name in names:
        path = workdir / name
        if path.exists():
            path.rename(path.with_stem(f"{path.stem}_{epochs}epochs"))


def chosen(workdir: pathlib.Path, setting: str) -> Any:
    """Return what an automatic setting of this run was resolved to; None if it never was."""
    return json.loads((workdir / "config.json").read_text()).get("chosen", {}).get(setting)


def choose(workdir: pathlib.Path, setting: str, value: Any) -> None:
    """Record in `config.json` what an automatic setting is resolved to; a resumed run reads it."""
    path = workdir / "config.json"
    there = json.loads(path.read_text())
    writers.write_json(path, {**there, "chosen": {**there.get("chosen", {}), setting: value}})


def identity(config: ConfigDict, checksums: Mapping[str, str]) -> str:
    """Return a checksum, 6 hexadecimal digits, of everything that decides the numbers of a run.

    The seed is left out, and so are settings that have their defaults, so that the checksum stays
    the same when settings are added to the package.
    """
    binding = _numbers(plain(config))
    binding.pop("seed")
    changed = _changed(binding, json.loads(default().to_json()))
    changed["loss"] = binding["loss"]  # it lacks the terms that are off, whatever their default
    text = json.dumps([changed, dict(checksums)], sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"[:6]


def holds(workdir: pathlib.Path, config: ConfigDict, checksums: Mapping[str, str]) -> bool:
    """Return whether a finished run of this config and these inputs is there, whatever its name."""
    try:
        there = json.loads((workdir / "config.json").read_text())
        same = all(there["checksums"].get(name) == value for name, value in checksums.items())
        same = same and _numbers(there["config"]) == _numbers(plain(config))
        # The `config.json` of an imported network does not tell its recipe.
        result = workdir / "result.json"
        return same and result.exists() and _noted(result, "imported") is None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # not a run of this package, or a damaged one


def _numbers(config: dict) -> dict:
    """Return the settings that decide the numbers of a run: the binding ones except the name.

    Terms that are switched off are left out, and so is a weighting that weights no samples. The
    teacher is therefore the same whether or not the config of its student adds terms or weightings.
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
    """Return a deep copy without the settings that can change.

    Missing settings get their defaults, for example those of terms that were added to the package
    after the config was written.
    """
    config = filled(config)
    # With `share_order`, the first seed decides the order and the views of the samples.
    shared = list(config["seeds"])[:1] if config["share_order"] else []
    for path in FREE:
        parent, _, key = path.rpartition(".")
        (config[parent] if parent else config).pop(key, None)
    return {**config, **({"seeds[0]": shared[0]} if shared else {})}


def _changed(config: dict, defaults: dict) -> dict:
    """Return the settings that differ from their defaults."""
    return {
        key: _changed(value, defaults.get(key, {})) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in defaults or value != defaults[key]
    }


def check_space(workdirs: Collection[pathlib.Path], needed: int) -> None:
    """Raise `UserError` if the checkpoints of runs, of `needed` bytes, do not fit on their disk.

    Those that are there already count as free, because new ones take their place.
    """
    workdir = next(iter(workdirs))
    there = [p for folder in workdirs for p in folder.glob("checkpoints/**/*") if p.is_file()]
    free = shutil.disk_usage(workdir).free + sum(path.stat().st_size for path in there)
    if free < needed:
        raise UserError(
            f"{workdir} has {free / 2**20:.0f} MiB free; the checkpoints of this run need "
            f"{needed / 2**20:.0f} MiB. Free some space, or choose another --workdir."
        )

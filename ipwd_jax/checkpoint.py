"""Checkpoints of a run, written asynchronously and atomically by Orbax, and resumed bit for bit.

A checkpoint has four items: `last`, the variables of the student when the checkpoint is taken;
`best`, its variables after the best epoch so far (see `Position`); `state`, everything else
in the `TrainState`; and `meta`, JSON with the position of the run and a checksum of each item,
because changed bytes in a file of numbers would otherwise go unnoticed. A teacher or an evaluation
needs only the numbers of `last` or those of `best`.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ipwd_jax import orbax_reads, parallel
from ipwd_jax.errors import UserError, first_line, warn
from ipwd_jax.state import TrainState, not_finite
from ipwd_jax.typing import PyTree

_FOLDER = "checkpoints"


@dataclasses.dataclass
class Position:
    """The position of a run: everything that it has to remember besides its arrays.

    Attributes:
        stage: index of the stage in the list that `config.stages` returns.
        step: number of steps taken in this stage.
        seconds: wall time spent on training so far, over all processes.
        best_epoch: epoch of the main stage with the best accuracy so far, on the validation set or,
            if there is none, on the test set; 0 before the first evaluation.
        best_top1: that accuracy in percent; -1 before the first evaluation.
        history: one row of metrics per finished epoch.
    """

    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_top1: float = -1.0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def epochs_of(self, stage: str) -> int:
        """Return the number of finished epochs of the stage with this name."""
        return sum(row["stage"] == stage for row in self.history)


@dataclasses.dataclass
class Snapshot:
    """Everything that a run needs in order to resume, which is what a checkpoint holds.

    Attributes:
        state: the arrays of the run, on all devices.
        best: the variables of the student after its best epoch so far, or its initial variables
            before the main stage is first evaluated.
        position: everything else.
    """

    state: TrainState
    best: PyTree
    position: Position


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints of one work directory, numbered by the steps of all stages together."""

    def __init__(self, workdir: pathlib.Path, keep: int):
        self.folder = workdir.resolve() / _FOLDER
        self.keep = keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policy = ocp.checkpoint_managers.LatestN(self.keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Return the numbers of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, number: int, snapshot: Snapshot) -> None:
        """Start writing a checkpoint; if there is one with this number, it is left unchanged.

        Raises:
            UserError: this or the previous checkpoint could not be written.
        """
        if number in self._manager.all_steps():
            return
        items = {
            "last": snapshot.state.network(),
            "best": snapshot.best,
            "state": _without_network(snapshot.state),
        }
        self._write(number, parallel.shared(items), _meta(snapshot.position, items))

    def _write(self, number: int, items: dict[str, PyTree], meta: dict[str, Any]) -> None:
        saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        args = ocp.args.Composite(**saved, meta=ocp.args.JsonSave(meta))
        with self._writing():
            self._manager.save(number, args=args, force=True)

    def wait(self) -> None:
        """Wait until everything is on disk, and raise `UserError` as `save` does."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            steps = _steps(self.folder)
            kept = f"step {steps[-1]}" if steps else "none"
            free = shutil.disk_usage(self.folder).free / 2**20
            raise UserError(
                f"a checkpoint could not be written to {self.folder} ({free:.0f} MiB free): "
                f"{first_line(error)}. Newest complete checkpoint: {kept}. "
                "Free some space and run the same command again; it resumes from there."
            ) from error

    def restore(self, template: Callable[[Position], TrainState]) -> Snapshot | None:
        """Restore the newest checkpoint that can be read; return None if there are no checkpoints.

        Newer checkpoints that cannot be read are renamed, with a warning.

        Args:
            template: a function that returns, for a position, a state of the stage in which that
                position is. Only the shapes of this state are used.

        Raises:
            UserError: there are checkpoints, but none of them can be read.
        """
        damaged = {}
        for number in reversed(parallel.from_first(self.steps)):
            restored, problem = None, Exception("another process cannot read it")
            try:
                with orbax_reads.quiet():
                    restored = self._restore(number, template)
            except Exception as error:  # Orbax and TensorStore raise many types
                problem = error
            if parallel.largest(restored is None):
                damaged[number] = problem
                continue
            self._set_aside(damaged)
            return restored
        if damaged:
            raise UserError(
                f"no checkpoint in {self.folder} can be read (newest: "
                f"{first_line(damaged[max(damaged)])}). Nothing was changed; choose another "
                "--workdir to start from the beginning."
            )
        return None

    def _restore(self, number: int, template: Callable[[Position], TrainState]) -> Snapshot:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        position, checksums = _read_meta(self._manager.restore(number, args=args).meta)
        state = template(position)
        network = parallel.replicated_shapes(state.network())
        items = self._manager.restore(
            number,
            args=ocp.args.Composite(
                last=ocp.args.StandardRestore(network),
                best=ocp.args.StandardRestore(network),
                state=ocp.args.StandardRestore(parallel.replicated_shapes(_without_network(state))),
            ),
        )
        items = {name: parallel.unshared(items[name]) for name in ("last", "best", "state")}
        for name, item in items.items():
            _verify(name, item, checksums)
        state = items["state"].replace_network(items["last"])
        return Snapshot(state, items["best"], position)

    def _set_aside(self, damaged: dict[int, Exception]) -> None:
        if damaged:
            parallel.from_first(lambda: self._rename(damaged))
            self._manager.close()
            self._manager = self._open()

    def _rename(self, damaged: dict[int, Exception]) -> None:
        for number, error in damaged.items():
            name = f"damaged-{number}"
            while (self.folder / name).exists():
                name += "-again"
            warn(
                f"checkpoint {number} in {self.folder} cannot be read ({first_line(error)}). It "
                f"has been renamed to {name}, and an older one is used."
            )
            (self.folder / str(number)).rename(self.folder / name)

    def __exit__(self, *_: object) -> None:
        self._manager.close()


def _steps(folder: pathlib.Path) -> list[int]:
    """Return the numbers of the complete checkpoints in `folder`, oldest first."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def newest(workdir: pathlib.Path) -> pathlib.Path:
    """Return the folder of a run's newest complete checkpoint.

    Raises:
        UserError: there is no complete checkpoint.
    """
    folder = workdir.resolve() / _FOLDER
    if not (steps := _steps(folder)):
        raise UserError(
            f"there is no checkpoint in {folder}; train first, or choose another --workdir"
        )
    return folder / str(steps[-1])


def saved_arrays(path: pathlib.Path) -> PyTree:
    """Return the shapes and dtypes of one item of a checkpoint, without reading its arrays.

    Raises:
        UserError: the item is missing or damaged.
    """
    try:
        return ocp.StandardCheckpointHandler().metadata(path)
    except Exception as error:  # Orbax raises many types
        raise UserError(f"the checkpoint {path} cannot be read: {first_line(error)}") from error


def check_path(workdir: pathlib.Path) -> None:
    """Raise `UserError` if checkpoints in a directory could be written, but not read again.

    Orbax takes the path for a pattern when it looks for the parts of a checkpoint.
    """
    path = str(workdir.resolve())
    if found := [character for character in "[*?" if character in path]:
        raise UserError(
            f"checkpoints in {path} could not be read again, because this path has the character "
            f"{found[0]!r}; choose another --workdir, or rename the folder"
        )


def load_network(workdir: pathlib.Path, which: str, template: PyTree) -> tuple[PyTree, Position]:
    """Return the variables of the network that a run trained, and the position of the run.

    Args:
        workdir: work directory of the run.
        which: "last" or "best".
        template: shapes of the expected network's variables.

    Returns:
        The variables, on all devices, and the position at which the newest checkpoint was taken. If
        the run is not finished, a warning names the epoch.

    Raises:
        UserError: there is no checkpoint, it cannot be read, it is of another network, there was no
            best epoch yet, or some of the variables are not finite.
    """
    folder = pathlib.Path(parallel.from_first(lambda: str(newest(workdir))))
    path = folder / which
    shapes, wanted = (
        {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (saved_arrays(path), template)
    )
    wrong = [
        f"{name}: found {shapes.get(name, 'none')}, expected {wanted.get(name, 'none')}"
        for name in sorted({*shapes, *wanted})
        if shapes.get(name) != wanted.get(name)
    ]
    if wrong:
        raise UserError(
            f"the checkpoint {path} is of another network or number of classes; "
            f"{len(wrong)} tensors differ, for example {'; '.join(wrong[:3])}. Check which network "
            "and which data it was trained with."
        )
    try:
        shapes_and_devices = parallel.replicated_shapes(template)
        with orbax_reads.quiet():
            variables = ocp.StandardCheckpointer().restore(path, shapes_and_devices)
        variables = parallel.unshared(variables)
        meta_of_run = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "meta")
        position, checksums = _read_meta(meta_of_run)
        _verify(which, variables, checksums)
    except Exception as error:
        raise UserError(f"the checkpoint {path} cannot be read: {first_line(error)}") from error
    if parallel.from_first(lambda: not (workdir / "result.json").exists()):
        if which == "best" and not position.best_epoch:
            raise UserError(
                f"{workdir} is not finished and has no best epoch yet; run its command again, or "
                "take the network of the last epoch"
            )
        epochs = position.epochs_of("main") if which == "last" else position.best_epoch
        warn(f"{workdir} is not finished: its network after {epochs} whole epochs is taken")
    if bad := not_finite(variables):
        raise UserError(
            f"the network in {path} has diverged: {len(bad)} of its arrays are not finite or close "
            f"to overflow, among them {', '.join(bad[:3])}. Train it again with a lower learning "
            "rate."
        )
    return variables, position


def save_network(workdir: pathlib.Path, variables: PyTree) -> None:
    """Write the variables of a network trained elsewhere to where `load_network` finds them.

    Args:
        workdir: a work directory without checkpoints; the network becomes both "last" and "best".
        variables: variables of the network, float32 arrays.

    Raises:
        UserError: the checkpoint could not be written.
    """
    items = {"last": variables, "best": variables}
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints._write(0, items, _meta(Position(), items))
        checkpoints.wait()


def _meta(position: Position, items: dict[str, PyTree]) -> dict[str, Any]:
    """Return the JSON of a checkpoint: the position, and checksums of it and of the items."""
    plain = dataclasses.asdict(position)
    checksums = {name: checksum(item) for name, item in items.items()}
    return {**plain, "checksums": {"position": _checksum_of_json(plain), **checksums}}


def _read_meta(meta: dict[str, Any]) -> tuple[Position, dict[str, str]]:
    """Return the position and the checksums of a checkpoint.

    Raises:
        ValueError: the position has changed since it was saved.
    """
    plain = {key: value for key, value in meta.items() if key != "checksums"}
    if _checksum_of_json(plain) != meta["checksums"]["position"]:
        raise ValueError("the position has changed since it was saved")
    return Position(**plain), meta["checksums"]


def _verify(name: str, item: PyTree, checksums: dict[str, str]) -> None:
    if checksum(item) != checksums[name]:
        raise ValueError(f"the numbers of {name!r} have changed since they were saved")


def checksum(tree: PyTree) -> str:
    """Return the CRC-32 over all leaves of a pytree, in order, as 8 hexadecimal digits."""
    crc = 0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        # An array is a buffer, but its type declares this only from Python 3.12 on.
        crc = zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)), crc)  # type: ignore[arg-type]
    return f"{crc:08x}"


def _checksum_of_json(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def _without_network(state: TrainState) -> TrainState:
    return dataclasses.replace(
        state,
        params={k: v for k, v in state.params.items() if k != "student"},
        batch_stats={k: v for k, v in state.batch_stats.items() if k != "student"},
    )

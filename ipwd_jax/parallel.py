"""Data parallelism over the devices of all processes; no other file uses `pmap`.

A step is written for the rows of one device. The devices communicate through collectives over the
axis `AXIS`. The state has no device axis and is the same on all devices.

There is one process unless `distributed` has connected several. Every process then runs the same
program and feeds its own devices, and its arrays are on these devices alone. What depends on files
or on the time is decided for all processes at once, by `from_first` or `largest`, so that none of
them waits for a step that another one does not take. The first process alone writes.
"""

import collections
import contextlib
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from ipwd_jax import signals
from ipwd_jax.errors import Interrupted, UserError, first_line
from ipwd_jax.typing import PyTree

AXIS = "batch"
_T = TypeVar("_T")

_HEARTBEAT_SECONDS = 60  # after which a process that says nothing counts as dead
_LEAVE_SECONDS = 10  # for which a process that fails waits whether the others fail, too
_WAIT_SECONDS = 7 * 24 * 3600  # for which the others wait for what the first process does
_answers = itertools.count()
_alone = False  # whether the first process does what the others wait for


def process_count() -> int:
    """Return the number of processes that train together."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def devices() -> list[jax.Device]:
    """Return the devices over which a batch is distributed; those of a process are adjacent."""
    if process_count() == 1:
        return jax.local_devices()
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))


def local_devices() -> list[jax.Device]:
    """Return those of these devices that belong to this process."""
    return [device for device in devices() if device.process_index == jax.process_index()]


def device_count() -> int:
    """Return the number of devices over which a batch is distributed."""
    return len(devices())


def own() -> slice:
    """Return which part of an axis of all devices belongs to this process."""
    first = devices().index(local_devices()[0])
    return slice(first, first + len(local_devices()))


def _mesh(devices: list[jax.Device]) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(devices, (AXIS,))


def replicate(tree: PyTree) -> PyTree:
    """Put a copy of every leaf of a pytree on each device of this process."""
    return jax.device_put(tree, jax.NamedSharding(_mesh(local_devices()), jax.P()))


def replicated_shapes(tree: PyTree) -> PyTree:
    """Return the shapes and dtypes of a pytree that is to be restored whole on each device."""
    everywhere = jax.NamedSharding(_mesh(devices()), jax.P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)


def shared(tree: PyTree) -> PyTree:
    """Return a replicated pytree as arrays that belong to all processes, as Orbax saves them."""
    if process_count() == 1:
        return tree
    mesh = _mesh(devices())
    return multihost_utils.host_local_array_to_global_array(tree, mesh, jax.P())


def unshared(tree: PyTree) -> PyTree:
    """Return the arrays of `shared`, or those that Orbax has restored, as `replicate` does."""
    if process_count() == 1:
        return tree
    mesh = _mesh(devices())
    return multihost_utils.global_array_to_host_local_array(tree, mesh, jax.P())


def compile_train_step(step: Callable) -> Callable:
    """Compile `step(state, data, teacher_inputs, index, mask, images) -> state`.

    `index`, `mask` and, if they are streamed, `images` have the shape (steps, devices, rows, ...),
    with an axis of this process's devices. Everything else is replicated, and the state is donated.
    """
    return jax.pmap(
        step,
        AXIS,
        in_axes=(None, None, None, 1, 1, 1),
        out_axes=None,
        donate_argnums=0,
        devices=devices(),
    )


def compile_predict(predict: Callable) -> Callable:
    """Compile `predict(variables, data, index, images)`.

    The last two have an axis of this process's devices; the result has one of all devices.
    """
    axes = (None, None, 0, 0)
    if process_count() == 1:
        return jax.pmap(predict, AXIS, in_axes=axes, devices=devices())

    def of_all(*arguments: PyTree) -> PyTree:
        return lax.all_gather(predict(*arguments), AXIS)

    return jax.pmap(of_all, AXIS, in_axes=axes, out_axes=None, devices=devices())


def compile_views(ask: Callable) -> Callable:
    """Compile `ask(inputs, data, index, view)` for this process alone.

    The last two have an axis of its devices.
    """
    return jax.pmap(ask, AXIS, in_axes=(None, None, 0, 0), devices=local_devices())


def largest(number: int) -> int:
    """Return the largest of the numbers with which the processes call this."""
    if process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def from_first(function: Callable[[], _T]) -> _T:
    """Call a function in the first process alone, and return its result in all processes.

    Args:
        function: its result must be ready for JSON, and can be None.

    Raises:
        UserError: the function raised it in the first process.
    """
    global _alone
    if process_count() == 1 or _alone:
        return function()
    answer: dict = {}
    problem = None
    if is_first():
        _alone = True
        try:
            answer = {"result": function()}
        except UserError as error:
            problem, answer = error, {"problem": str(error)}
        finally:
            _alone = False
    # The first process can take hours, for which not every collective would wait.
    _meet(f"answer {next(_answers)}", _WAIT_SECONDS)
    answer = json.loads(_broadcast(json.dumps(answer).encode()))
    if "problem" in answer:
        raise problem or UserError(answer["problem"])
    return answer["result"]


def _broadcast(data: bytes) -> bytes:
    """Return the `data` of the first process."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(-(-size // 4096) * 4096, np.uint8)  # of few sizes, as each is compiled
    if is_first():
        padded[:size] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes()


def _meet(place: str, seconds: int) -> None:
    """Wait until all processes are at the same place; raise an error after so many seconds."""
    from orbax.checkpoint import multihost  # takes a second

    multihost.get_barrier_sync_fn()(key=f"ipwd_jax {place}", timeout_ms=1000 * seconds)


@contextlib.contextmanager
def distributed(
    coordinator: str = "", processes: int | None = None, process: int | None = None
) -> Iterator[None]:
    """Connect this process with the others of a run, which train together within the context.

    Only the first process prints, apart from errors. If a process ends early, the others end within
    about a minute. An error ends the process, with the statuses of the command line.

    Args:
        coordinator: `HOST:PORT` at which the first process listens; if empty, JAX finds it in the
            environment that SLURM, Open MPI or Kubernetes provides.
        processes: number of processes; None likewise.
        process: number of this process, from 0; None likewise.

    Raises:
        UserError: the processes could not be connected, or have different numbers of devices.
    """
    _connect(coordinator, processes, process)
    try:
        with signals.exit_statuses(), _only_errors():
            _check_devices()
            yield
            _meet("end", _WAIT_SECONDS)  # the first process may still be writing
    except BaseException as error:
        _leave(error)
        raise
    finally:
        jax.distributed.shutdown()


def _connect(coordinator: str, processes: int | None, process: int | None) -> None:
    # JAX would otherwise catch SIGTERM, also while nothing asks it whether the signal has come.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator or None,
            processes,
            process,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except Exception as error:  # JAX raises many types
        raise UserError(
            f"the processes could not be connected: {first_line(error).rstrip('.')}. Use "
            "--distributed under srun, mpirun or in a Job of Kubernetes, or add "
            "--coordinator=HOST:PORT, --num_processes and --process_id"
        ) from error


def _check_devices() -> None:
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise UserError(
            f"the processes have different numbers of devices ({[*counts.values()]}); give all of "
            "them the same number"
        )
    # The first collective must find all processes within 30 seconds, at least on CPUs; later ones
    # can wait longer.
    multihost_utils.sync_global_devices("ipwd_jax")


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Print nothing but errors, unless this is the first process."""
    if is_first():
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            yield
        except (Interrupted, KeyboardInterrupt) as stop:
            sys.exit(128 + (stop.signum if isinstance(stop, Interrupted) else signal.SIGINT))
        except UserError as error:
            raise UserError(f"process {jax.process_index()}: {error}") from error


def _leave(error: BaseException) -> None:
    """End this process at once, unless all others leave, too."""
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        print(
            f"error: process {jax.process_index()} of {process_count()} has failed. If this is "
            "because another one has ended, its output says why. The same command resumes from the "
            "newest checkpoint.",
            file=sys.stderr,
        )
    try:
        _meet("failure", _LEAVE_SECONDS)
    except Exception:  # JAX raises many types
        # To leave in good order would mean to wait for the others, which wait for this process.
        status = error.code if isinstance(error, SystemExit) else 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)

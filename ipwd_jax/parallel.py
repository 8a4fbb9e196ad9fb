"""Data parallelism over the devices of one process; no other file uses `pmap`.

A step is written for the rows of one device. The devices communicate through collectives over the
axis `AXIS`. The state has no device axis and is the same on all devices.
"""

from collections.abc import Callable

import jax

from ipwd_jax.typing import PyTree

AXIS = "batch"


def devices() -> list[jax.Device]:
    """Return the devices over which a batch is distributed."""
    return jax.local_devices()


def device_count() -> int:
    """Return the number of these devices."""
    return len(devices())


def _everywhere() -> jax.NamedSharding:
    mesh = jax.sharding.Mesh(devices(), (AXIS,))
    return jax.NamedSharding(mesh, jax.P())


def replicate(tree: PyTree) -> PyTree:
    """Put a copy of every leaf of a pytree on each device."""
    return jax.device_put(tree, _everywhere())


def replicated_shapes(tree: PyTree) -> PyTree:
    """Return the shapes and dtypes of a pytree that is to be restored whole on each device."""
    everywhere = _everywhere()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)


def compile_train_step(step: Callable) -> Callable:
    """Compile `step(state, data, teacher_inputs, index, mask, images) -> state`.

    `index`, `mask` and, if they are streamed, `images` have the shape (steps, devices, rows, ...),
    with a device axis. Everything else is replicated, and the state is donated.
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
    """Compile `predict(variables, data, index, images)`; the last two have a device axis."""
    return jax.pmap(predict, AXIS, in_axes=(None, None, 0, 0), devices=devices())


def compile_views(ask: Callable) -> Callable:
    """Compile `ask(inputs, data, index, view)`; the last two have a device axis."""
    return jax.pmap(ask, AXIS, in_axes=(None, None, 0, 0), devices=devices())

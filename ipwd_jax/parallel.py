"""Data parallelism over the devices of one process; the only file that names `pmap`.

A step is written for one device's rows. The devices meet in collectives over the axis `AXIS`; the
state has no device axis and is the same on all of them.
"""

from collections.abc import Callable

import jax

from ipwd_jax.typing import PyTree

AXIS = "batch"


def devices() -> list[jax.Device]:
    """The devices over which a batch is spread."""
    return jax.local_devices()


def device_count() -> int:
    """The number of these devices."""
    return len(devices())


def _everywhere() -> jax.NamedSharding:
    mesh = jax.sharding.Mesh(devices(), (AXIS,))
    return jax.NamedSharding(mesh, jax.P())


def replicate(tree: PyTree) -> PyTree:
    """Puts the leaves of a pytree on all devices, whole on each."""
    return jax.device_put(tree, _everywhere())


def replicated_shapes(tree: PyTree) -> PyTree:
    """Shapes and dtypes of a pytree, to be restored whole on each device."""
    everywhere = _everywhere()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)


def compile_train_step(step: Callable) -> Callable:
    """Compiles `step(state, data, teacher_inputs, index, mask, images) -> state`.

    `index`, `mask` and, if they are streamed, `images` (steps, devices, rows, ...) have a device
    axis. Everything else is replicated, and the state is donated.
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
    """Compiles `predict(variables, data, index, images)`; the last two have a device axis."""
    return jax.pmap(predict, AXIS, in_axes=(None, None, 0, 0), devices=devices())


def compile_views(ask: Callable) -> Callable:
    """Compiles `ask(inputs, data, index, view)`; the last two have a device axis."""
    return jax.pmap(ask, AXIS, in_axes=(None, None, 0, 0), devices=devices())

"""The memory of the devices: how much is free, and whether a program fits into it."""

from collections.abc import Callable

import jax

from ipwd_jax import parallel
from ipwd_jax.data import memory
from ipwd_jax.errors import UserError
from ipwd_jax.typing import PyTree


def available() -> int:
    """Return how many bytes new arrays can take on each device of this process.

    Devices that have no memory of their own, such as CPUs, share what the host has available.
    """
    devices = parallel.local_devices()
    statistics = devices[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    return memory.available() // len(devices)


def check(program: Callable, *arguments: PyTree) -> int:
    """Compile a training step, and return the bytes that it takes on each device, with arguments.

    JAX keeps the compiled program for the first call. The arguments must be on the devices.

    Raises:
        UserError: more memory is needed than is available. An operating system would end the
            process without a message if it trained on CPUs.
    """
    compiled = program.lower(*arguments).compile()  # type: ignore[attr-defined]
    sizes, free = compiled.memory_analysis(), available()
    besides = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    if besides > free:
        raise UserError(
            f"a training step needs {besides / 2**30:,.2f} GiB of memory besides the data and the "
            f"parameters, but only {free / 2**30:,.2f} GiB are available on each device "
            f"({jax.devices()[0].device_kind}); choose a smaller --config.batch_size, or fewer of "
            "--config.seeds at a time"
        )
    return sizes.argument_size_in_bytes + besides

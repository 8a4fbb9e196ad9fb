"""Compile the train step for an H100 on a machine without a GPU, and count its kernels.

    pip install -e '.[cuda12]'
    JAX_PLATFORMS=cpu python benchmarks/gpu_program.py [--pairs T,S:T,S] [--cases kd:cached:8,...]

XLA's CUDA compiler needs the description of a device and not the device. What it compiles is the
program that would run, with its fusions, layouts, calls of cuDNN and memory plan, except for what
is chosen by timing kernels on the device. A case is TERM:TEACHER:STEPS, optionally followed by
:SEEDS and :PRECISION; the teachers are those of `our_arm.py`. Prints one JSON line per case:

- `kernels`: kernels per step: those of a whole call, divided by its steps.
- `megabytes` and `gigaflops` per step: what the kernels read and write, and the multiplications and
  additions of their convolutions and matrix products.
- `modelled_ms`: the sum over the kernels of the largest of 2 us, bytes / 3.35 TB/s and operations
  over the peak of their number format. It is a lower bound and not a measurement: no kernel
  reaches these peaks, and the choice of algorithms is unknown.
- `temp_megabytes`: memory for intermediate values.
- `most`: the most frequent kinds of kernel.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it would look for a driver

import jax
from our_arm import OurArm, Problem, make_problem

from ipwd_jax import parallel

# Public figures of the H100 SXM with 80 GB, in the form in which XLA reads them.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
SECONDS_PER_KERNEL, BYTES_PER_SECOND = 2e-6, 3.35e12
FLOPS_PER_SECOND = {"bf16": 989e12, "f16": 989e12, "f32": 67e12}  # dense; f32 without TF32
TF32_FLOPS_PER_SECOND = 494e12
CASES = (
    "kd:cached:1,kd:cached:8,kd:folded:8,kd:ahead:8,kd:network:8,"
    "ipwd:cached:8,crd:network:8,reviewkd:network:8,kd:cached:8:5"
)
# Instructions of an optimised program that are not kernels.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "add-dependency", "partition-id", "replica-id", "opt-barrier", "domain",
}  # fmt: skip
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\s})\]])([a-z][\w\-]*)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch: what it is, the bytes that it reads and writes, its operations and their type."""

    kind: str
    bytes: int
    flops: float
    dtype: str

    def seconds(self, tf32: bool) -> float:
        """Return the modelled time."""
        peak = FLOPS_PER_SECOND.get(self.dtype, FLOPS_PER_SECOND["f32"])
        if tf32 and self.dtype == "f32":
            peak = TF32_FLOPS_PER_SECOND
        return max(SECONDS_PER_KERNEL, self.bytes / BYTES_PER_SECOND, self.flops / peak)


def h100() -> list[Any]:
    """Return a device that programs can be compiled for, but that cannot hold an array."""
    import jax_plugins.xla_cuda12 as plugin
    from jax._src import xla_bridge
    from jax.experimental import topologies

    plugin._load_nvidia_libraries()
    plugin._import_extensions()
    xla_bridge.discover_pjrt_plugins = lambda: None
    library = str(plugin._get_library_path())
    xla_bridge.register_plugin("cuda", library_path=library, options=None, priority=500)
    found = topologies.get_topology_desc(
        topology_name="h100", platform="cuda", target_config=H100, topology="1x1x1"
    )
    return list(found.devices)


def kernels(hlo: str) -> Iterator[tuple[Kernel, int]]:
    """Yield the kernels of a program, each with the number of times that it is launched."""
    launched: dict[str, list[Kernel]] = {}
    times, shapes, name = {"ENTRY": 1}, {}, ""
    loops: dict[str, tuple[str, int]] = {}  # body -> the computation around it, and its iterations
    for line in hlo.splitlines():
        if found := re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name, shapes = "ENTRY" if found[1] else found[2], {}
            launched[name] = []
        elif found := _INSTRUCTION.match(line):
            own, result, operation, rest = found.groups()
            shapes[own] = result
            if operation == "while":
                count = re.search(r"known_trip_count\D+(\d+)", line)
                body = re.search(r"body=%?([\w.\-]+)", line)[1]
                loops[body] = name, int(count[1]) if count else 1
            if operation not in _FREE and not operation.endswith("-done"):
                operands = [shapes.get(x, "") for x in re.findall(r"%([\w.\-]+)", rest)]
                launched[name].append(_kernel(own, result, operands, line))
    for body, (around, count) in reversed(loops.items()):  # a body precedes what is around it
        times[body] = times.get(around, 1) * count
    for body, found in launched.items():
        for kernel in found if body in times else ():
            yield kernel, times[body]


def _kernel(own: str, result: str, operands: list[str], line: str) -> Kernel:
    target = re.search(r'custom_call_target="([^"]+)"', line)
    kind = target[1] if target else re.sub(r"[.\d]+$", "", own)
    read = _SHAPE.findall(" ".join(operands))
    return Kernel(
        kind,
        sum(map(_size, _SHAPE.findall(result))) + sum(map(_size, read)),
        _convolution_flops(result, operands, line) if "dim_labels" in line else 0.0,
        read[0][0] if read else "f32",
    )


def _dims(shape: tuple[str, str]) -> list[int]:
    return [int(n) for n in shape[1].split(",") if n]


def _size(shape: tuple[str, str]) -> int:
    return _BYTES.get(shape[0], 0) * math.prod(_dims(shape))


def _convolution_flops(result: str, operands: list[str], line: str) -> float:
    """Return 2 x (outputs of the forward convolution) x (kernel's side squared x input channels).

    The gradients have as many multiplications as the forward convolution, of which they have the
    labels and, in a different order, the shapes.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    arrays = [_SHAPE.findall(x)[0] for x in (*operands[:2], result) if _SHAPE.findall(x)]
    if labels is None or len(arrays) < 3:
        return 0.0
    left, right, out = map(_dims, arrays)
    if "BackwardFilter" in line:
        left, right, out = left, out, right
    elif "BackwardInput" in line:
        left, right, out = out, right, left
    return 2.0 * math.prod(out) * math.prod(right) / right[labels[2].index("o")]


def compile_case(case: str, problem: Problem, devices: list[Any]) -> tuple[dict[str, Any], str]:
    """Return the line of a case, and its optimised program.

    Args:
        case: TERM:TEACHER:STEPS[:SEEDS[:PRECISION]].
        problem: the networks and images, from `our_arm.make_problem`.
        devices: the result of `h100`.
    """
    term, teacher, *numbers = case.split(":")
    calls, seeds, precision = (*numbers, *("1", "1", "bfloat16")[len(numbers) :])
    steps, count = int(calls), int(seeds)
    real, backend = parallel.devices, jax.default_backend
    try:
        jax.default_backend = lambda: "gpu"  # the teacher's kernels are stored in the GPU's order
        arm = OurArm(problem, precision, teacher, steps, term)
        arguments = (arm.now,) * count, *arm.next_arguments(count)
        parallel.devices = lambda: devices
        step = arm.experiment.train_step(0)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        options = {"xla_gpu_autotune_level": 0}
        program = step.lower(*shapes).compile(compiler_options=options)
    finally:
        parallel.devices, jax.default_backend = real, backend
    text = program.as_text()
    found = [(kernel, times / steps) for kernel, times in kernels(text)]
    kinds: collections.Counter = collections.Counter()
    for kernel, times in found:
        kinds[kernel.kind] += times
    line = {
        "pair": f"{problem.teacher},{problem.student}",
        "case": case,
        "kernels": round(sum(times for _, times in found)),
        "megabytes": round(sum(k.bytes * times for k, times in found) / 1e6),
        "gigaflops": round(sum(k.flops * times for k, times in found) / 1e9, 1),
        "modelled_ms": round(
            1e3 * sum(k.seconds(precision == "tf32") * times for k, times in found), 3
        ),
        "temp_megabytes": round(program.memory_analysis().temp_size_in_bytes / 1e6),
        "most": ", ".join(f"{round(n)} {kind}" for kind, n in kinds.most_common(8)),
    }
    return line, text


def main(options: argparse.Namespace) -> None:
    """Compile every case of every pair and print one line for each."""
    devices = h100()
    for pair in options.pairs.split(":"):
        for case in options.cases.split(","):
            # CRD needs as many images as negatives; otherwise few, because a gather counts as if
            # it read all of them.
            size = 50_000 if case.startswith("crd") else 512
            steps = max(8, int(case.split(":")[2]))
            problem = make_problem(tuple(pair.split(",")), steps, options.batch, size)
            line, text = compile_case(case, problem, devices)
            print(json.dumps(line), flush=True)
            if options.dump:
                options.dump.mkdir(parents=True, exist_ok=True)
                name = f"{pair}_{case}".replace(":", "_").replace(",", "_")
                (options.dump / f"{name}.hlo").write_text(text)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", default="resnet32x4,resnet8x4", help="T,S with colons between")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dump", type=pathlib.Path, help="folder for the optimised programs")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())

"""The step needs few kernels on a GPU, counted in the program that XLA compiles for one."""

import json
import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu_program.py"
HLO = """
%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %m = f32[4]{0} multiply(%p, %p)
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%t), index=1
  %loop_multiply_fusion.3 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %r = (s32[], f32[4]{0}) tuple(%i, %loop_multiply_fusion.3)
}

ENTRY %main (a: bf16[8,6,6,2]) -> f32[4] {
  %a = bf16[8,6,6,2]{3,2,1,0} parameter(0)
  %k = bf16[5,3,3,2]{3,2,1,0} parameter(1)
  %cudnn-conv = (bf16[8,6,6,5]{3,2,1,0}, u8[0]{0}) custom-call(%a, %k), window={size=3x3}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %w = (s32[], f32[4]{0}) while(%init), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %copy.1 = f32[4]{0} copy(%y)
}
"""  # noqa: E501


def test_kernels_are_counted_with_the_trips_of_their_loop(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    spec = util.spec_from_file_location("gpu_program", BENCHMARK)
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_program", module)
    spec.loader.exec_module(module)
    found = {kernel.kind: (kernel, times) for kernel, times in module.kernels(HLO)}
    assert {kind: times for kind, (_, times) in found.items()} == {
        "loop_multiply_fusion": 7, "__cudnn$convForward": 1, "copy": 1,
    }  # fmt: skip
    convolution = found["__cudnn$convForward"][0]
    assert convolution.flops == 2 * 8 * 6 * 6 * 5 * 3 * 3 * 2
    assert convolution.bytes == 2 * (8 * 6 * 6 * 5 + 8 * 6 * 6 * 2 + 5 * 3 * 3 * 2)
    assert found["loop_multiply_fusion"][0].bytes == 2 * 4 * 4


@pytest.mark.slow
def test_budgets():
    if util.find_spec("jax_plugins") is None or util.find_spec("jax_plugins.xla_cuda12") is None:
        pytest.skip("compiling for a GPU needs its plugin: pip install 'ipwd_jax[cuda12]'")
    most = {
        "kd:cached:1": 215,
        "kd:cached:8": 170,
        "kd:folded:8": 206,
        "kd:network:8": 246,
        "kd:ahead:8": 181,
        "ipwd:cached:8": 190,
        "crd:network:8": 301,
    }
    environment = {k: v for k, v in os.environ.items() if not re.match("XLA_FLAGS|JAX_DISABLE", k)}
    done = subprocess.run(
        [sys.executable, BENCHMARK, f"--cases={','.join(most)}"],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    kernels = {line["case"]: line["kernels"] for line in lines}
    assert kernels.keys() == most.keys()
    assert {case: n for case, n in kernels.items() if n > most[case]} == {}

"""The scripts in `benchmarks/` start, and both frameworks take the same steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ipwd_jax import models
from ipwd_jax.state import network_shapes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PAIR = "--pair=resnet8,resnet8"
SMALL = ("--batch=16", "--images=256", "--image-size=16")


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="compares with PyTorch")


def run(script: str, *arguments: str, **environment: str) -> list[dict]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    environment = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_run_all_names_scripts():
    text = (BENCHMARKS / "run_all.sh").read_text()
    (in_turn,) = re.findall(r"for benchmark in (.*); do", text)
    for name in ["step", *in_turn.split()]:
        assert (BENCHMARKS / f"{name}.py").exists()


@pytest.fixture(scope="module")
def our_arm():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import our_arm
    return our_arm


@pytest.fixture(scope="module")
def problem(our_arm):
    """Return a problem of two steps with four black images each and with parameters of 0."""
    shapes = network_shapes(models.create("resnet8", our_arm.CLASSES), (8, 8, 3))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return our_arm.Problem(
        teacher="resnet8",
        student="resnet8",
        variables={"teacher": zeros, "student": zeros},
        images=np.zeros((9, 8, 8, 3), np.uint8),
        labels=np.zeros(9, np.int32),
        mean=np.zeros(3, np.float32),
        std=np.ones(3, np.float32),
        index=np.arange(8, dtype=np.int32).reshape(2, 4),
        view=np.zeros((2, 4), np.int32),
        learning_rate=0.1,
    )


@pytest.mark.parametrize(
    "kind",
    [
        "network",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("folded", "ahead", "cached", "")),
    ],
)
def test_our_arm_takes_its_step(our_arm, problem, kind):
    arm = our_arm.OurArm(problem, teacher=kind, steps_per_call=2)
    assert arm.experiment.steps_per_epoch == 2  # without the ninth image
    (now,) = arm.compiled.lower((arm.now,), *arm.next_arguments()).out_info
    assert jax.tree.structure(now) == jax.tree.structure(arm.now)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["step.py", "compile.py"])
def test_help(script):
    run(script, "--help")


@pytest.mark.slow
@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    "pair", ["resnet8,resnet8", "wrn_16_1,wrn_10_1", "vgg8,MobileNetV2", "vgg8,ShuffleV2"]
)
def test_both_take_the_same_ten_steps(pair):
    # With the optimisations that users have; how a program rounds decides when a ReLU flips.
    optimised = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    (line,) = run("step.py", f"--pairs={pair}", "--gate-only", *SMALL, **optimised)
    assert line["gate"] == "passed"
    # Within these bounds, ten float32 steps of a plain network end in the same place.
    if pair.startswith(("resnet", "wrn")):
        assert max(line["float32"]["loss_errors"]) < 1e-4
        assert line["float32"]["weight_error"] < 0.02 * line["float32"]["weights_moved"]


@pytest.mark.slow
@pytest.mark.usefixtures("torch")
def test_arms_take_turns_and_one_of_them_in_a_child():
    ours = ("", "_eigen", "_folded", "_cached")
    arms = ["torch_channels_last", *(f"ours_float32{name}" for name in ours)]
    options = ("--steps=2", "--repeats=1", "--warm-up=2", *SMALL)
    _, *lines = run("step.py", "--pairs=resnet8,resnet8", f"--arms={','.join(arms)}", *options)
    assert [line["arm"] for line in lines] == arms
    expected = lines[0]["warm_up_loss"]
    for line in lines:
        assert line["images_per_second"] > 0
        assert line["warm_up_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("losses.py", [PAIR, "--batch=8", "--steps=1", "--terms=kd,crd,kd_la,ofd"]),
        ("kernels.py", [PAIR, "--batch=8", "--steps=1", "--images=500"]),
        ("seeds.py", [PAIR, "--batch=8", "--steps=1", "--repeats=1", "--seeds=1,2"]),
        ("streaming.py", [PAIR, "--files=128", "--image-size=32", "--epochs=2"]),
        ("teacher.py", ["--network=resnet8", "--batches=8", "--repeats=1", "--calls=1"]),
        ("dispatch.py", ["2"]),
    ],
)
def test_the_others_run(script, arguments):
    lines = run(script, *arguments)
    assert lines and not [line for line in lines if {"error", "skipped"} & line.keys()]


@pytest.mark.slow
@pytest.mark.usefixtures("torch")
def test_every_convolution_of_both_networks():
    *shapes, ours, theirs = run("convolutions.py", PAIR, "--batch=2", "--repeats=1")
    assert [sum(shape[role] for shape in shapes) for role in ("teacher", "student")] == [9, 9]
    assert min(ours["ms_per_step"], theirs["ms_per_step"]) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("torch")
def test_whole_runs_and_the_eager_loop():
    lines = run("end_to_end.py", PAIR, "--size=1024", "--epochs=2", "--torch_steps=3")
    assert [line for line in lines if "skipped" in line] == []
    assert all(line["images_per_second"] > 0 for line in lines)


@pytest.mark.slow
def test_a_warm_cache_spares_the_compilation():
    cold, warm = run("compile.py", PAIR, "--batch=8")
    assert (cold["case"], warm["case"]) == ("cold", "warm")
    assert warm["compile_seconds"] < cold["compile_seconds"] / 2

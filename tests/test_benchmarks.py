"""The scripts in `benchmarks/`: they start, and both frameworks take the same steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = ("--batch=16", "--images=256", "--image-size=16")


@pytest.fixture(autouse=True)
def torch():
    return pytest.importorskip("torch", reason="compares with PyTorch")


def run(script: str, *arguments: str) -> list[dict]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("script", ["step.py", "compile.py"])
def test_help(script):
    run(script, "--help")


@pytest.mark.parametrize(
    "pair", ["resnet8,resnet8", "wrn_16_1,wrn_10_1", "vgg8,MobileNetV2", "vgg8,ShuffleV2"]
)
def test_both_take_the_same_ten_steps(pair):
    (line,) = run("step.py", f"--pairs={pair}", "--gate-only", *SMALL)
    assert line["gate"] == "passed"
    # The bounds by which ten float32 steps of a plain network end in the same place.
    if pair.startswith(("resnet", "wrn")):
        assert max(line["float32"]["loss_errors"]) < 1e-4
        assert line["float32"]["weight_error"] < 0.02 * line["float32"]["weights_moved"]


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


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("losses.py", ["--batch=8", "--steps=1", "--terms=kd,crd"]),
        ("kernels.py", ["--batch=8", "--steps=1", "--images=500"]),
        ("seeds.py", ["--batch=8", "--steps=1", "--repeats=1", "--seeds=1,2"]),
        ("end_to_end.py", ["--size=1024", "--epochs=2", "--torch_steps=3"]),
        ("streaming.py", ["--files=128", "--image-size=32", "--epochs=2"]),
    ],
)
def test_the_others_run(script, arguments):
    lines = run(script, "--pair=resnet8,resnet8", *arguments)
    assert lines and not [line for line in lines if {"error", "skipped"} & line.keys()]


def test_a_warm_cache_spares_the_compilation():
    cold, warm = run("compile.py", "--pair=resnet8,resnet8", "--batch=8")
    assert (cold["case"], warm["case"]) == ("cold", "warm")
    assert warm["compile_seconds"] < cold["compile_seconds"] / 2

"""`python -m ipwd_jax.models` lists what is published."""

import subprocess
import sys

import pytest

from ipwd_jax.models.__main__ import describe

# Parameters and millions of multiply-adds, counted layer by layer in the reference.
COUNTS = {
    "resnet20": (278_324, 40.82),
    "resnet56": (861_620, 125.75),
    "resnet8x4": (1_233_540, 177.07),
    "resnet32x4": (7_433_860, 1083.04),
    "wrn_16_2": (703_284, 101.12),
    "wrn_40_1": (569_780, 83.29),
    "vgg8": (3_965_028, 96.19),
    "vgg13": (9_462_180, 284.94),
    "ResNet50": (23_705_252, 1298.01),
    "MobileNetV2": (812_836, 6.52),
    "ShuffleV1": (949_258, 38.69),
    "ShuffleV2": (1_355_528, 44.50),
    "ResNet18_imagenet": (11_689_512, 1814.07),
    "ResNet34_imagenet": (21_797_672, 3663.76),
    "ResNet50_imagenet": (25_557_032, 4089.18),
    "MobileNetV1": (4_231_976, 568.74),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_multiply_adds(name):
    parameters, millions = COUNTS[name]
    assert describe(name).split()[:3] == [name, f"{parameters:,}", f"{millions:,.2f}"]


def test_command_line():
    command = [sys.executable, "-m", "ipwd_jax.models"]
    done = subprocess.run([*command, "MobileNetV2"], capture_output=True, text=True, check=True)
    assert "16x16 12x16 16x8 48x4 160x2 | 1280" in done.stdout
    wrong = subprocess.run([*command, "resnet9"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "Did you mean" in wrong.stderr

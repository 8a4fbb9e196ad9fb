"""`python -m ipwd_jax.losses` shows what every term adds to the published pairs of networks."""

import functools
import subprocess
import sys

import pytest

from ipwd_jax import losses
from ipwd_jax.errors import UserError
from ipwd_jax.losses.__main__ import (
    describe,
    extra_parameters,
    main,
    network_outputs,
    variable_shapes,
)

# (teacher, student) -> numbers of parameters on CIFAR-100 in the reference implementations: of
# fitnet, cc, vid and ab; of ft's paraphraser and translator; of crd's two embeddings, the student's
# first; and of reviewkd, if its authors have released the pair.
_RESNET = (1_120, 16_640, 16_240, 0, (129_312, 64_896), (8_320, 8_320))
TABLE = {
    ("wrn_40_2", "wrn_16_2"): (
        4_288, 33_024, 64_736, 0, (516_672, 258_816), (16_512, 16_512), 453_830,
    ),
    ("wrn_40_2", "wrn_40_1"): (
        2_240, 24_832, 53_984, 11_424, (516_672, 111_168), (8_320, 16_512), 216_006,
    ),
    ("resnet56", "resnet20"): (*_RESNET, 114_278),
    ("resnet110", "resnet20"): (*_RESNET, None),
    ("resnet110", "resnet32"): (*_RESNET, 114_278),
    ("resnet32x4", "resnet8x4"): (
        16_768, 65_792, 258_496, 0, (2_065_536, 1_033_728), (32_896, 32_896), 1_808_774,
    ),
    ("vgg13", "vgg8"): (
        66_304, 131_328, 1_820_032, 0, (8_259_840, 4_131_840), (65_664, 65_664), None,
    ),
    ("vgg13", "MobileNetV2"): (
        4_864, 229_632, 1_325_952, 1_345_152, (8_259_840, 1_190_880), (163_968, 65_664), None,
    ),
    ("ResNet50", "MobileNetV2"): (
        132_608, 426_240, 11_533_056, 6_221_056, (132_129_792, 11_148_768), (163_968, 262_272),
        None,
    ),
    ("ResNet50", "vgg8"): (
        2_098_688, 327_936, 12_881_664, 12_070_144, (132_129_792, 16_522_752), (65_664, 262_272),
        None,
    ),
    ("resnet32x4", "ShuffleV1"): (
        983_424, 155_904, 495_040, 5_162_304, (2_065_536, 9_551_424), (123_008, 32_896), 4_607_366,
    ),
    ("resnet32x4", "ShuffleV2"): (
        475_520, 164_096, 328_384, 2_495_808, (2_065_536, 2_621_808), (131_200, 32_896), 4_195_718,
    ),
    ("wrn_40_2", "ShuffleV1"): (
        491_712, 139_520, 204_512, 2_581_152, (516_672, 8_887_488), (123_008, 16_512), 2_984_646,
    ),
}  # fmt: skip
# Network -> the channels of its maps after the stem, and the width of its embedding.
NETWORKS = {
    "wrn_16_2": ((32, 64, 128), 128),
    "wrn_40_1": ((16, 32, 64), 64),
    "wrn_40_2": ((32, 64, 128), 128),
    "resnet20": ((16, 32, 64), 64),
    "resnet32": ((16, 32, 64), 64),
    "resnet56": ((16, 32, 64), 64),
    "resnet110": ((16, 32, 64), 64),
    "resnet8x4": ((64, 128, 256), 256),
    "resnet32x4": ((64, 128, 256), 256),
    "vgg8": ((128, 256, 512, 512), 512),
    "vgg13": ((128, 256, 512, 512), 512),
    "MobileNetV2": ((12, 16, 48, 160), 1280),
    "ResNet50": ((256, 512, 1024, 2048), 2048),
    "ShuffleV1": ((240, 480, 960), 960),
    "ShuffleV2": ((116, 232, 464), 1024),
}
# The pairs of networks with equal channels, including those of the stem.
FSP_PAIRS = {
    ("resnet56", "resnet20"),
    ("resnet110", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
    ("wrn_40_2", "wrn_16_2"),
}

outputs = functools.cache(network_outputs)
of_all_pairs = pytest.mark.parametrize(
    ("teacher", "student"), TABLE, ids=[f"{teacher}-{student}" for teacher, student in TABLE]
)


def parts(name, teacher, student):
    term = losses.TERMS[name]()
    return extra_parameters(term, outputs(student), outputs(teacher), 50_000)


@of_all_pairs
def test_published_numbers(teacher, student):
    names = ("fitnet", "cc", "vid", "ab", "ft", "crd", "reviewkd")
    expected = dict(zip(names, TABLE[teacher, student], strict=True))
    found = {name: parts(name, teacher, student) for name in names}
    assert found["ft"] == dict(zip(("paraphraser", "translator"), expected.pop("ft"), strict=True))
    embeddings = "embed_s.linear", "embed_t.linear"
    assert found["crd"] == dict(zip(embeddings, expected.pop("crd"), strict=True))
    if expected["reviewkd"] is None:
        del expected["reviewkd"]
    assert {name: sum(found[name].values()) for name in expected} == expected


@of_all_pairs
def test_numbers_by_arithmetic(teacher, student):
    (maps_s, width_s), (maps_t, width_t) = NETWORKS[student], NETWORKS[teacher]

    def projection(width):
        return 2 * (width**2 + width)

    assert parts("sskd", teacher, student) == {
        "student_head": projection(width_s),
        "teacher_head": projection(width_t),
    }
    # A connector has a 1 x 1 convolution and the two vectors of BatchNorm.
    connectors = sum(s * t + 2 * t for s, t in zip(maps_s, maps_t, strict=True))
    assert sum(parts("ofd", teacher, student).values()) == connectors
    assert parts("cls", teacher, student) == {"cls": 100 * width_s + 100}
    assert len(parts("reviewkd", teacher, student)) == len(maps_s) + 1


@of_all_pairs
def test_fsp_fits_equal_channels_alone(teacher, student):
    if (teacher, student) in FSP_PAIRS:
        assert parts("fsp", teacher, student) == {}
        return
    channels = [[x.shape[-1] for x in outputs(name).features] for name in (student, teacher)]
    with pytest.raises(ValueError) as raised:
        parts("fsp", teacher, student)
    reason = str(raised.value)
    assert all(str(each) in reason for each in channels)
    line = describe("fsp", outputs(student), outputs(teacher)).splitlines()[-1]
    assert line.strip() == f"does not fit: {reason}"


def test_memories():
    pair = outputs("resnet20"), outputs("resnet56")
    for name in losses.TERMS:
        shapes = variable_shapes(losses.TERMS[name](), *pair, 50_000).get("memory", {})
        floats = {key: x.shape for key, x in shapes.items()}
        expected = {
            "crd": {"memory_v1": (50_000, 128), "memory_v2": (50_000, 128), "Z": (2,)},
            "pskd": {"predictions": (50_000, 100)},
        }
        assert floats == expected.get(name, {}), name


def test_a_head_that_is_a_network_is_left_out():
    term = losses.TERMS["cls"](source="network")
    assert extra_parameters(term, outputs("resnet20"), None, 10) == {}


def test_command_line():
    command = [sys.executable, "-m", "ipwd_jax.losses"]
    done = subprocess.run(
        [*command, "resnet56", "resnet8x4"], capture_output=True, text=True, check=True
    )
    rows = [line.split()[0] for line in done.stdout.splitlines() if line and line[0] != " "]
    assert [name for name in rows if name in losses.TERMS] == list(losses.TERMS)
    assert [name for name in rows if name in losses.WEIGHTINGS] == list(losses.WEIGHTINGS)
    assert "temperature=4.0 cross_entropy=False" in done.stdout
    assert "kd_source='student' ratio='A' standardize=True" in done.stdout
    assert "does not fit: FSP needs" in done.stdout
    wrong = subprocess.run([*command, "resnet9", "resnet8"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: unknown network 'resnet9'")


def test_one_network_is_not_a_pair():
    with pytest.raises(UserError, match="TEACHER and a STUDENT"):
        main(["resnet20"])

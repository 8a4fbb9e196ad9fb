"""The network of a file is inferred from the names and shapes of its tensors."""

import helpers
import numpy as np
import pytest
from models_helpers import GOLDEN_FILES
from pytorch_helpers import template

from ipwd_jax import models
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch import files
from ipwd_jax.pytorch.names import from_torch, to_torch, torch_shapes
from ipwd_jax.pytorch.networks import Fit, _patterned, guess, template_of
from ipwd_jax.pytorch.state_dicts import unwrap


@pytest.mark.parametrize(
    "fit",
    [
        Fit("resnet8x4", 100, 3),
        Fit("resnet20", 10, 1),
        Fit("wrn_16_2", 7, 3),
        Fit("wrn_22_3", 10, 3),
        Fit("MobileNetV2", 100, 3),
        Fit("MobileNetV2_0.75", 100, 3),
        Fit("ResNet18_imagenet", 1000, 3),
        Fit("vgg8", 100, 3),
    ],
)
def test_the_network_is_found(fit):
    assert guess(torch_shapes(template_of(fit))) == fit


def test_another_name_of_the_classifier():
    shapes = torch_shapes(template("MobileNetV2", 100))
    for leaf in ("weight", "bias"):
        shapes[f"classifier.{leaf}"] = shapes.pop(f"classifier.0.{leaf}")
    assert guess(shapes) == Fit("MobileNetV2", 100, 3)


def test_equal_networks_need_a_name(monkeypatch):
    monkeypatch.setitem(models.NETWORKS, "twin", models.NETWORKS["resnet8"])
    shapes = torch_shapes(template())
    with pytest.raises(UserError, match=r"these tensors fit resnet8, twin; .*--network"):
        guess(shapes)
    assert guess(shapes, "twin").name == "twin"


def test_the_guess_takes_no_memory_for_what_shapes_claim():
    shapes = torch_shapes(template()) | {"conv1.weight": (16, 10**9, 3, 3)}
    shapes |= {"fc.weight": (10**9, 64), "fc.bias": (10**9,)}
    assert guess(shapes, "resnet8") == Fit("resnet8", 10**9, 10**9)
    with pytest.raises(UserError, match=r"resnet8, 10 classes: .* 2 of another shape"):
        guess(
            torch_shapes(template()) | {"fc.weight": (2**62, 0), "conv1.weight": (2**62, 0, 3, 3)},
            "resnet8",
        )


def test_a_network_is_not_tried_at_any_depth():
    def names(blocks):
        return {f"block1.layer.{i}.conv1.weight": (16, 16, 3, 3) for i in range(blocks)}

    assert _patterned(names(100)) == ["wrn_604_1"]
    assert _patterned(names(100_000)) == []


def golden_networks():
    quick = {"resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"}
    for file, names in GOLDEN_FILES.items():
        for name, golden in helpers.golden_json(f"{file}.json")["models"].items():
            marks = () if name in quick else pytest.mark.slow
            ours = names.get(name, name)
            yield pytest.param(ours, golden["shapes"], id=ours, marks=marks)


@pytest.mark.parametrize(("name", "shapes"), list(golden_networks()))
def test_every_network_goes_from_torch_to_ours_and_back(name, shapes, torch, tmp_path):
    tensors = helpers.recipe().weights(name, shapes)
    tensors = {k: torch.from_numpy(x.astype(np.float32)) for k, x in tensors.items()}
    torch.save(tensors, tmp_path / "theirs.pth")
    read, _ = unwrap(files.load(tmp_path / "theirs.pth"))
    ours = from_torch(read, template_of(guess({k: x.shape for k, x in read.items()}, name)))
    files.save(tmp_path / "ours.pth", to_torch(ours))
    back = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], x) for k, x in tensors.items())

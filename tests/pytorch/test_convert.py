"""PyTorch's checkpoints become work directories of teachers, and runs are exported."""

import json
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import Tiny, squares
from helpers import settings as tiny_settings
from pytorch_helpers import (
    assert_refused,
    assert_same,
    error_of,
    imported,
    state_dict,
    template,
    tensors_of,
    variables,
    view,
    zip_of,
)

from ipwd_jax import config as config_lib
from ipwd_jax import data, load_student, models, report, train
from ipwd_jax.errors import UserError
from ipwd_jax.models.base import Conv, Linear, pool_and_classify
from ipwd_jax.pytorch import export_file, files, import_file
from ipwd_jax.pytorch.names import to_torch, torch_shapes
from ipwd_jax.pytorch.networks import guess

# Round trips


def test_half_precision_becomes_float32(torch, tmp_path, capsys):
    tensors = {k: x.bfloat16() for k, x in tensors_of(torch).items()}
    torch.save(tensors, tmp_path / "half.pth")
    import_file(tmp_path / "half.pth", tmp_path / "half", "resnet8")
    kernel = imported(tmp_path / "half")["params"]["fc"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["fc.weight"].float().numpy().T)
    assert "converted from bfloat16 to float32" in capsys.readouterr().out


def test_a_work_directory_to_torch_and_back(torch, tmp_path):
    files.save(tmp_path / "first.pth", to_torch(variables("wrn_16_1")))
    import_file(tmp_path / "first.pth", tmp_path / "a", "wrn_16_1")
    assert export_file(tmp_path / "a", tmp_path / "a.pth") == "wrn_16_1"
    tensors = torch.load(tmp_path / "a.pth", weights_only=True)
    assert tensors["bn1.num_batches_tracked"].dtype == torch.int64
    torch.save(tensors, tmp_path / "b.pth")
    import_file(tmp_path / "b.pth", tmp_path / "b", "wrn_16_1")
    for which in ("last", "best"):
        assert_same(imported(tmp_path / "b", "wrn_16_1", which=which), variables("wrn_16_1"))


# Outputs that are those of PyTorch


def resnet8_of(torch, classes):
    """A plain ResNet of depth 8 with the names of the reference."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, width, out, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(out)
            self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(out)
            if stride > 1:
                projection = nn.Conv2d(width, out, 1, stride, bias=False)
                self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out))

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))

    class ResNet8(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            self.layer1 = nn.Sequential(Block(16, 16, 1))
            self.layer2 = nn.Sequential(Block(16, 32, 2))
            self.layer3 = nn.Sequential(Block(32, 64, 2))
            self.fc = nn.Linear(64, classes)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))

    return ResNet8()


@pytest.fixture
def torch_net(torch):
    """One with random weights and statistics, in evaluation mode."""
    torch.manual_seed(0)
    net = resnet8_of(torch, classes=10)
    for name, x in net.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            x.normal_(0, 0.2)
        elif "bn" in name and x.ndim:
            x.uniform_(0.5, 1.5)
    return net.eval()


def test_logits_are_those_of_torch(torch, torch_net, tmp_path):
    torch.save(torch_net.state_dict(), tmp_path / "net.pth")
    import_file(tmp_path / "net.pth", tmp_path / "net", "resnet8")
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = torch_net(x).numpy()
    net = models.create("resnet8", 10)
    outputs = jax.jit(net.apply)(imported(tmp_path / "net"), x.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(outputs.logits, expected, atol=1e-4)


def test_torch_loads_an_export_strictly(torch, torch_net, tmp_path):
    files.save(tmp_path / "first.pt", to_torch(variables()))
    import_file(tmp_path / "first.pt", tmp_path / "a", "resnet8")
    export_file(tmp_path / "a", tmp_path / "out.pth", "best")
    torch_net.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    np.testing.assert_array_equal(
        torch_net.fc.weight.detach().numpy().T, variables()["params"]["fc"]["kernel"]
    )


# Weights that are refused


@pytest.mark.parametrize("network", ["", "resnet8"])
def test_differences_are_listed_and_nothing_is_written(network, tmp_path):
    tensors = to_torch(variables())
    del tensors["layer2.0.bn1.running_mean"]
    tensors["layer1.0.conv1.weight"] = np.zeros((16, 16, 5, 5), np.float32)
    tensors["extra.weight"] = np.zeros((3, 4), np.float32)
    files.save(tmp_path / "a.pth", tensors)
    nearest = "" if network else "no network has these tensors; the closest is "
    assert_refused(
        tmp_path / "a.pth",
        f"{nearest}resnet8, 10 classes: ",
        "1 missing, 1 not in the network, 1 of another shape\n",
        "  tensor                     in the file     in the network\n",
        "  layer1.0.conv1.weight      (16, 16, 5, 5)  (16, 16, 3, 3)\n",
        "  layer2.0.bn1.running_mean  -               (32,)\n",
        "  extra.weight               (3, 4)          -",
        network=network,
    )


def test_a_network_of_another_depth_gives_a_short_table(tmp_path):
    files.save(tmp_path / "a.pth", to_torch(variables("resnet14")))
    with pytest.raises(UserError, match=r"and \d+ more$") as error:
        import_file(tmp_path / "a.pth", tmp_path / "a", "resnet8")
    assert len(str(error.value).splitlines()) == 23


def test_integers_are_no_weights(tmp_path):
    tensors = {k: x.astype(np.int32) for k, x in to_torch(variables()).items()}
    files.save(tmp_path / "a.pth", tensors)
    assert_refused(tmp_path / "a.pth", "weights of type int32", network="resnet8")


def test_tensors_that_share_their_numbers(tmp_path, capsys):
    shapes = torch_shapes(template())
    most = max(map(math.prod, shapes.values()))
    strides = {k: [math.prod(x[axis + 1 :]) for axis in range(len(x))] for k, x in shapes.items()}
    views = {name: view(most, shape, tuple(strides[name])) for name, shape in shapes.items()}
    path = zip_of(state_dict(views), tmp_path / "a.pth", [bytes(4 * most)])
    message = error_of(path, capsys, "--network=resnet8")
    taken = 4 * sum(map(math.prod, shapes.values()))
    assert f"share memory: they would take {taken:,} bytes" in message
    assert "save a tensor.clone() of each" in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("value", "dtype"), [("nan", "float32"), ("-inf", "float16"), (1e300, "float64")]
)
def test_weights_that_are_not_finite(value, dtype, suffix, tmp_path, capsys):
    tensors = {k: x.astype(dtype) for k, x in to_torch(variables()).items()}
    tensors["fc.weight"][3, 5] = tensors["layer2.0.bn1.running_var"][0] = float(value)
    files.save(tmp_path / f"a{suffix}", tensors)
    message = error_of(tmp_path / f"a{suffix}", capsys, "--network=resnet8")
    assert "in fc.weight, layer2.0.bn1.running_var. Use a checkpoint from before" in message


# The work directory


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The work directory of an imported resnet8 for two classes of grey images."""
    folder = tmp_path_factory.mktemp("import")
    files.save(folder / "net.pth", to_torch(variables("resnet8", 2, 1)))
    import_file(folder / "net.pth", folder / "net", "resnet8")
    return folder / "net"


@pytest.fixture(scope="module")
def dataset():
    labels = np.arange(40) % 2
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1), np.uint8)
    return data.from_arrays(images, labels, name="noise")


def settings(teacher):
    config = config_lib.default()
    config.name = "student"
    config.data.update({"name": "noise", "crop_padding": 0, "flip": False})
    config.model.name = config.teacher.name = "resnet8"
    config.teacher.workdir = str(teacher)
    config.epochs, config.batch_size, config.teacher.batch_size = 1, 16, 16
    config.loss.kd = 0.9
    return config


def test_what_a_work_directory_says(teacher):
    result = json.loads((teacher / "result.json").read_text())
    assert (result["network"], result["classes"]) == ("resnet8", 2)
    assert result["parameters"] == sum(
        x.size for x in jax.tree.leaves(variables("resnet8", 2, 1)["params"])
    )
    assert result["imported"]["file"] == "net.pth" and len(result["imported"]["sha256"]) == 64
    config = json.loads((teacher / "config.json").read_text())
    assert config["checksums"] == {} and config["config"]["model"]["name"] == "resnet8"
    assert sorted(x.name for x in teacher.iterdir()) == [
        "checkpoints",
        "config.json",
        "result.json",
    ]


def test_an_existing_work_directory_is_left_alone(teacher):
    before = {x: x.read_bytes() for x in teacher.rglob("*") if x.is_file()}
    with pytest.raises(UserError, match="exists already; choose another --workdir"):
        import_file(teacher.with_suffix(".pth"), teacher)
    assert {x: x.read_bytes() for x in teacher.rglob("*") if x.is_file()} == before


def test_it_teaches(teacher, dataset, tmp_path):
    config = settings(teacher)
    result = train.run(config, tmp_path / "student", dataset, teacher_only=True)
    assert report.summary(result).endswith("parameters, imported from net.pth")
    result = train.run(config, tmp_path / "student", dataset)
    assert result["teacher"]["network"] == "resnet8"
    assert "teacher resnet8" in report.summary(result)
    assert export_file(tmp_path / "student", tmp_path / "student.pth") == "resnet8"


def test_it_is_evaluated(teacher, dataset):
    result = train.evaluate_run(settings(teacher), teacher, dataset)
    assert result["last"] == result["best"] and 0 <= result["last"]["top1"] <= 100


class Odd(Tiny):
    """It has parameters of rank 0 and 3, and one whose shape depends on the size of the images."""

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        scale = self.param("slope", nn.initializers.ones, ())
        place = self.param("place", nn.initializers.normal(), (1, 2, 3))
        x = Linear(6, name="flat")(x.reshape(len(x), -1)) * scale + place.sum()
        return pool_and_classify(x[:, None, None], Linear(self.classes, name="fc"), (), ())


def test_any_network_is_exported_and_reused(tmp_path, monkeypatch):
    monkeypatch.setitem(models.NETWORKS, "odd", Odd)
    alone = {"teacher__name": "", "loss__kd": 0.0, "loss__cls": 0.0, "weighting__name": "uniform"}
    config = tiny_settings(model__name="odd", epochs=1, **alone)
    train.run(config, tmp_path / "run", squares())
    assert export_file(tmp_path / "run", tmp_path / "odd.safetensors") == "odd"
    tensors = files.load(tmp_path / "odd.safetensors")
    params = load_student(tmp_path / "run").variables["params"]
    assert tensors["flat.weight"].shape == (6, 8 * 8)
    np.testing.assert_array_equal(tensors["place"], params["place"])
    assert tensors["slope"] == params["slope"]
    config.model.pretrained = str(tmp_path / "run")
    train.run(config, tmp_path / "again", squares())


def test_a_network_that_is_registered_again_is_another_one(monkeypatch):
    for width in (3, 4):

        class Mine(Tiny):
            @nn.compact
            def __call__(self, x, width=width):
                x = Conv(width, 1, name="first")(x)
                return pool_and_classify(x, Linear(self.classes, name="fc"), (), ())

        monkeypatch.setitem(models.NETWORKS, "mine", Mine)
        assert guess(torch_shapes(template("mine")), "mine").name == "mine"


def test_names_of_both_are_shown_if_none_agree(tmp_path):
    tensors = {f"model.{name}": x for name, x in to_torch(variables("resnet14")).items()}
    files.save(tmp_path / "a.pth", tensors)
    words = "model.bn1.running_mean ", "\n  bn1.bias "
    assert_refused(tmp_path / "a.pth", *words, network="resnet14")

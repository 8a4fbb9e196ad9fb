"""PyTorch checkpoints to work directories and back."""

import argparse
import collections
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest
from test_golden_models import FILES

from ipwd_jax import config as config_lib
from ipwd_jax import convert, data, models, report, torch_files, train
from ipwd_jax.checkpoint import load_network
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch.names import from_torch, to_torch, torch_shapes
from ipwd_jax.pytorch.networks import Fit, guess, template_of

ROOT = Path(__file__).parents[1]
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"]
DTYPES += ["uint8", "bool"]


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="compares with files that PyTorch itself writes")


def template(name="resnet8", classes=10, channels=3):
    return template_of(Fit(name, classes, channels))


def variables(name="resnet8", classes=10, channels=3):
    """Random variables of a network; variances are positive."""
    rng = np.random.default_rng(0)
    shapes = template(name, classes, channels)
    return jax.tree.map(lambda x: rng.uniform(0.1, 0.5, x.shape).astype(np.float32), shapes)


def tensors_of(torch, *arguments):
    return {k: torch.from_numpy(x) for k, x in to_torch(variables(*arguments)).items()}


def imported(workdir, *arguments, which="last"):
    return jax.device_get(load_network(workdir, which, template(*arguments))[0])


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_refused(path, *words, **arguments):
    """Importing `path` fails with these words and leaves nothing behind."""
    workdir = path.parent / "refused"
    before = sorted(path.parent.iterdir())
    with pytest.raises(UserError) as error:
        convert.import_file(path, workdir, **arguments)
    for word in words:
        assert word in str(error.value)
    assert sorted(path.parent.iterdir()) == before


def zip_of(data_pkl, path, storages=(), byteorder=b"little"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/byteorder", byteorder)
        for i, storage in enumerate(storages):
            archive.writestr(f"archive/data/{i}", storage)
    return path


# What PyTorch writes


def with_counters(tensors, torch):
    counter = torch.tensor(7)
    return tensors | {"bn1.num_batches_tracked": counter}


def parameters(tensors, torch):
    return {k: torch.nn.Parameter(x, requires_grad=x.ndim > 1) for k, x in tensors.items()}


def wrapped(tensors, torch):
    return {
        "epoch": 240,
        "model": {f"module.{k}": x for k, x in tensors.items()},
        "accuracy": torch.tensor([73.5]),
        "best_acc": np.float64(74.25),
        "opt": argparse.Namespace(trial="1", lr=0.05, milestones=[150, 180], sizes={1, 2}),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
        "scheduler": {"milestones": collections.Counter([150, 180])},
        "more": [torch.float16, torch.device("cuda", 0), torch.Size([1]), np.arange(3.0)],
    }


def self_supervised(tensors, torch):
    tensors = {f"backbone.{k}": x for k, x in tensors.items()}
    return {"state_dict": tensors | {"proj_head.0.weight": torch.ones(2, 2)}}


def shared(tensors, torch):
    """All of one storage, behind offsets, and transposed."""
    storage = torch.cat([torch.zeros(5), *(x.T.reshape(-1) for x in tensors.values())])
    tensors, offset = dict(tensors), 5
    for name, x in tensors.items():
        view = storage[offset : offset + x.numel()].view(x.T.shape).T
        tensors[name], offset = view, offset + x.numel()
    return tensors


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("content", [with_counters, parameters, wrapped, self_supervised, shared])
def test_files_of_torch_give_the_same_arrays(content, legacy, torch, tmp_path):
    path = tmp_path / "net.pth"
    expected = to_torch(variables())
    torch.save(content(tensors_of(torch), torch), path, _use_new_zipfile_serialization=not legacy)
    tensors, metadata = convert.unwrap(torch_files.load(path))
    assert_same(tensors, expected)
    if content is wrapped:
        assert metadata == {"epoch": 240, "accuracy": 73.5, "best_acc": 74.25}


def test_other_objects_are_read_as_plain_data(torch, tmp_path):
    torch.save(wrapped({}, torch), tmp_path / "a.pth")
    tree = torch_files.load(tmp_path / "a.pth")
    assert tree["opt"] == {"trial": "1", "lr": 0.05, "milestones": [150, 180], "sizes": {1, 2}}
    assert tree["scheduler"]["milestones"] == {150: 1, 180: 1}
    assert tree["more"][:3] == ["torch.float16", "cuda:0", (1,)]
    np.testing.assert_array_equal(tree["more"][3], [0, 1, 2])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ],
)
def test_types_of_tensors(dtype, legacy, torch, tmp_path):
    x = torch.arange(-3, 9).reshape(3, 4).to(getattr(torch, dtype))
    tensors = {"x": x, "column": x[:, 1], "scalar": x[0, 0], "empty": x[:0], "T": x.T}
    torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    for name, actual in torch_files.load(tmp_path / "a.pth").items():
        assert str(actual.dtype) == dtype and actual.shape == tensors[name].shape
        np.testing.assert_array_equal(actual.astype(float), tensors[name].double().numpy())


def test_half_precision_becomes_float32(torch, tmp_path, capsys):
    tensors = {k: x.bfloat16() for k, x in tensors_of(torch).items()}
    torch.save(tensors, tmp_path / "half.pth")
    convert.import_file(tmp_path / "half.pth", tmp_path / "half", "resnet8")
    kernel = imported(tmp_path / "half")["params"]["fc"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["fc.weight"].float().numpy().T)
    assert "converted from bfloat16 to float32" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_safetensors(dtype, torch, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="writes a file of safetensors")
    tensors = {k: x.to(getattr(torch, dtype)) for k, x in tensors_of(torch).items()}
    safetensors.save_file(tensors, tmp_path / "net.safetensors")
    read = torch_files.load(tmp_path / "net.safetensors")
    assert {str(x.dtype) for x in read.values()} == {dtype}
    assert_same(
        {k: x.astype(np.float32) for k, x in read.items()},
        {k: x.float().numpy() for k, x in tensors.items()},
    )


def test_without_the_package_of_safetensors(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    (tmp_path / "a.safetensors").write_bytes(b"12345678")
    assert_refused(tmp_path / "a.safetensors", "pip install safetensors")


# Round trips


def test_a_work_directory_to_torch_and_back(torch, tmp_path):
    torch_files.save(tmp_path / "first.pth", to_torch(variables("wrn_16_1")))
    convert.import_file(tmp_path / "first.pth", tmp_path / "a", "wrn_16_1")
    fit = convert.export_file(tmp_path / "a", tmp_path / "a.pth")
    assert fit == Fit("wrn_16_1", 10, 3)
    tensors = torch.load(tmp_path / "a.pth", weights_only=True)
    assert tensors["bn1.num_batches_tracked"].dtype == torch.int64
    torch.save(tensors, tmp_path / "b.pth")
    convert.import_file(tmp_path / "b.pth", tmp_path / "b", "wrn_16_1")
    for which in ("last", "best"):
        assert_same(imported(tmp_path / "b", "wrn_16_1", which=which), variables("wrn_16_1"))


def golden_networks():
    quick = {"resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"}
    for file, names in FILES.items():
        for name, golden in helpers.golden_json(f"{file}.json")["models"].items():
            marks = () if name in quick else pytest.mark.slow
            ours = names.get(name, name)
            yield pytest.param(ours, golden["shapes"], id=ours, marks=marks)


@pytest.mark.parametrize(("name", "shapes"), list(golden_networks()))
def test_every_network_goes_from_torch_to_ours_and_back(name, shapes, torch, tmp_path):
    tensors = helpers.recipe().weights(name, shapes)
    tensors = {k: torch.from_numpy(x.astype(np.float32)) for k, x in tensors.items()}
    torch.save(tensors, tmp_path / "theirs.pth")
    read, _ = convert.unwrap(torch_files.load(tmp_path / "theirs.pth"))
    ours = from_torch(read, template_of(guess({k: x.shape for k, x in read.items()}, name)))
    torch_files.save(tmp_path / "ours.pth", to_torch(ours))
    back = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], x) for k, x in tensors.items())


def test_safetensors_round_trip(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="reads a file of safetensors")
    tensors = to_torch(variables()) | {"bn1.num_batches_tracked": np.zeros((), np.int64)}
    torch_files.save(tmp_path / "a.safetensors", tensors)
    assert_same(safetensors.load_file(tmp_path / "a.safetensors"), tensors)
    assert_same(torch_files.load(tmp_path / "a.safetensors"), tensors)


def test_exports_refuse_to_overwrite(tmp_path):
    (tmp_path / "a.pth").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        torch_files.save(tmp_path / "a.pth", {})
    assert (tmp_path / "a.pth").read_text() == "mine"
    with pytest.raises(UserError, match=r"must end in \.pth, \.pt or \.safetensors"):
        torch_files.save(tmp_path / "a.onnx", {})


# The same function


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
    convert.import_file(tmp_path / "net.pth", tmp_path / "net", "resnet8")
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = torch_net(x).numpy()
    net = models.create("resnet8", 10)
    outputs = jax.jit(net.apply)(imported(tmp_path / "net"), x.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(outputs.logits, expected, atol=1e-4)


def test_torch_loads_an_export_strictly(torch, torch_net, tmp_path):
    torch_files.save(tmp_path / "first.pt", to_torch(variables()))
    convert.import_file(tmp_path / "first.pt", tmp_path / "a", "resnet8")
    convert.export_file(tmp_path / "a", tmp_path / "out.pth", "best")
    torch_net.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    np.testing.assert_array_equal(
        torch_net.fc.weight.detach().numpy().T, variables()["params"]["fc"]["kernel"]
    )


# Files that are refused


class Command:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_runs_a_command_is_refused(legacy, torch, tmp_path):
    marker = tmp_path / "marker"
    harm = Command(os.system, f"touch {marker}")
    path = tmp_path / "evil.pth"
    torch.save({"model": harm}, path, _use_new_zipfile_serialization=not legacy)
    assert_refused(path, f"{os.system.__module__}.system", "not executed", "state_dict()")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("call", [(eval, "1/0"), (getattr, "a", "b"), (__import__, "os")])
def test_functions_that_are_not_listed(call, protocol, tmp_path):
    path = zip_of(pickle.dumps(Command(*call), protocol), tmp_path / "evil.pth")
    assert_refused(path, f".{call[0].__name__}, which", "not executed")


def test_a_pickled_module_is_refused_by_its_name(torch, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert_refused(tmp_path / "module.pth", "torch.nn.modules.linear.Linear", "state_dict()")


@pytest.mark.parametrize("state", [b"}", b"(}}X\x0b\x00\x00\x00__setstate__K\x01st"])
@pytest.mark.parametrize(
    "name",
    [
        "torch.Size",
        "torch._utils._rebuild_tensor_v2",
        "torch.FloatStorage",
        "torch.float32",
        "collections.OrderedDict",
        "argparse.Namespace",
        "numpy.dtype",
    ],
)
def test_no_pickle_changes_how_the_next_is_read(name, state, tmp_path):
    module, _, function = name.rpartition(".")
    code = b"\x80\x02" + f"c{module}\n{function}\n".encode() + state + b"b."
    assert_refused(zip_of(code, tmp_path / "evil.pth"), "cannot be read")


def test_tensors_stay_in_their_storage(tmp_path):
    good = torch_files._pickle({"x": np.zeros((2, 3), np.float32)})
    view = b"K\x00K\x02K\x03\x86"  # offset 0, shape (2, 3)
    assert view in good
    storage = np.arange(6, dtype=np.float32).tobytes()
    path = zip_of(good, tmp_path / "good.pth", [storage])
    assert torch_files.load(path)["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for bad in (b"K\x01K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x02K\x03\x86", b"K\x00K\x02K\x09\x86"):
        zip_of(good.replace(view, bad), tmp_path / "bad.pth", [storage])
        assert_refused(tmp_path / "bad.pth", "leaves its storage")
    zip_of(good, tmp_path / "bad.pth", [storage[:-4]])
    assert_refused(tmp_path / "bad.pth", "20 bytes instead of 24")


def test_big_endian_files(tmp_path):
    assert_refused(zip_of(b"\x80\x02}.", tmp_path / "a.pth", byteorder=b"big"), "big-endian")
    header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}]
    (tmp_path / "b.pth").write_bytes(b"".join(pickle.dumps(x, 2) for x in header))
    assert_refused(tmp_path / "b.pth", "big-endian")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_files_cut_short(legacy, torch, tmp_path):
    torch.save(tensors_of(torch), tmp_path / "a", _use_new_zipfile_serialization=not legacy)
    whole = (tmp_path / "a").read_bytes()
    path = tmp_path / "a.pth"
    for size in (1, 10, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert_refused(path, str(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<html>404</html>", "is no file of torch.save: it starts with b'<html>40'"),
        (pickle.dumps({"a": 1}), "a pickle, but not one of torch.save"),
        (b"\x80\x02" + struct.pack("<q", 0), "cannot be read"),
        (b"PK\x03\x04", "cannot be read"),
    ],
)
def test_other_files(content, words, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    assert_refused(tmp_path / "a.pth", words, str(tmp_path / "a.pth"))


def test_files_that_are_not_there(tmp_path):
    assert_refused(tmp_path / "none.pth", "No such file")
    assert_refused(zip_of(b"\x80\x02}.", tmp_path / "empty.pth"), "no state dict")


# Places in a file


@pytest.mark.parametrize("key", ["model", "state_dict", "net", "student", "teacher"])
def test_usual_wrappers(key):
    tensors = {"a.weight": np.zeros((2, 2))}
    assert convert.unwrap({key: tensors, "epoch": 3}) == (tensors, {"epoch": 3})


def test_several_state_dicts():
    one, two = {"a.weight": np.zeros((2, 2))}, {"a.weight": np.ones((2, 2))}
    tree = {"student": one, "teacher": two, "ema": two}
    with pytest.raises(UserError, match=r"several state dicts.*--key=NAME: student, teacher, ema"):
        convert.unwrap(tree)
    assert convert.unwrap(tree, "ema")[0]["a.weight"].all()
    with pytest.raises(UserError, match="no state dict under 'nope'"):
        convert.unwrap(tree, "nope")
    with pytest.raises(UserError, match=r"other names than usual; .*: ema"):
        convert.unwrap({"ema": two})


def test_heads_of_self_supervision_are_left_out(capsys):
    x = np.zeros((2, 2))
    tensors, _ = convert.unwrap({"module.backbone.fc.weight": x, "module.proj_head.0.weight": x})
    assert list(tensors) == ["fc.weight"]
    assert "left out, not of the classifier: proj_head.0.weight" in capsys.readouterr().out


# Which network it is


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
    with pytest.raises(UserError, match=r"resnet8, twin have these tensors; .*--network"):
        guess(shapes)
    assert guess(shapes, "twin").name == "twin"


@pytest.mark.parametrize("network", ["", "resnet8"])
def test_differences_are_listed_and_nothing_is_written(network, tmp_path):
    tensors = to_torch(variables())
    del tensors["layer2.0.bn1.running_mean"]
    tensors["layer1.0.conv1.weight"] = np.zeros((16, 16, 5, 5), np.float32)
    tensors["extra.weight"] = np.zeros((3, 4), np.float32)
    torch_files.save(tmp_path / "a.pth", tensors)
    nearest = "" if network else "no network has these tensors; the nearest is "
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
    torch_files.save(tmp_path / "a.pth", to_torch(variables("resnet14")))
    with pytest.raises(UserError, match=r"and \d+ more$") as error:
        convert.import_file(tmp_path / "a.pth", tmp_path / "a", "resnet8")
    assert len(str(error.value).splitlines()) == 23


def test_integers_are_no_weights(tmp_path):
    tensors = {k: x.astype(np.int32) for k, x in to_torch(variables()).items()}
    torch_files.save(tmp_path / "a.pth", tensors)
    assert_refused(tmp_path / "a.pth", "weights of type int32", network="resnet8")


# The work directory


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The work directory of an imported resnet8 for two classes of grey images."""
    folder = tmp_path_factory.mktemp("import")
    torch_files.save(folder / "net.pth", to_torch(variables("resnet8", 2, 1)))
    convert.import_file(folder / "net.pth", folder / "net", "resnet8")
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
        convert.import_file(teacher.with_suffix(".pth"), teacher)
    assert {x: x.read_bytes() for x in teacher.rglob("*") if x.is_file()} == before


def test_it_teaches(teacher, dataset, tmp_path):
    config = settings(teacher)
    result = train.run(config, tmp_path / "student", dataset, teacher_only=True)
    assert report.summary(result).endswith("parameters, imported from net.pth")
    result = train.run(config, tmp_path / "student", dataset)
    assert result["teacher"]["network"] == "resnet8"
    assert "teacher resnet8" in report.summary(result)
    fit = convert.export_file(tmp_path / "student", tmp_path / "student.pth")
    assert fit == Fit("resnet8", 2, 1)


def test_it_is_evaluated(teacher, dataset):
    result = train.evaluate_run(settings(teacher), teacher, dataset)
    assert result["last"] == result["best"] and 0 <= result["last"]["top1"] <= 100


# The command line


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "ipwd_jax.convert", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_command_line(tmp_path):
    path = tmp_path / "net.pth"
    torch_files.save(path, to_torch(variables()))
    done = command("import", path, f"--workdir={tmp_path / 'net'}", "--network=resnet8")
    assert done.stdout.splitlines() == [
        "resnet8, 10 classes, 78,042 parameters",
        f"Written to {tmp_path / 'net'}",
    ]
    assert done.returncode == 0 and not done.stderr
    done = command("export", tmp_path / "net", path)
    assert done.returncode == 2
    assert done.stderr == f"error: {path} exists already; delete it or choose another name\n"

"""Trained classifiers become files that run without the package."""

import dataclasses
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from flax import linen as nn
from helpers import settings, teacher_folder
from pytorch_helpers import variables

import ipwd_jax
from ipwd_jax import convert, export, train
from ipwd_jax.errors import UserError
from ipwd_jax.models.base import Outputs, avg_pool, max_pool
from ipwd_jax.pytorch import files, import_file
from ipwd_jax.pytorch.names import to_torch

needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("jax2onnx") is None, reason="jax2onnx is not installed"
)

# What a program does that has JAX, but not this package.
DEPLOYED = """
import sys

sys.modules["ipwd_jax"] = None  # an import of it fails
import numpy as np
from jax import export

file, images, out = sys.argv[1:]
images = np.load(images)
with open(file, "rb") as opened:
    student = export.deserialize(bytearray(opened.read()))
np.savez(out, **{str(n): student.call(images[:n]) for n in (1, 5)})
assert not {"flax", "optax", "orbax"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def student(squares, tmp_path_factory):
    """The work directory of a run, beside that of its teacher."""
    workdir = tmp_path_factory.mktemp("runs") / "student"
    train.run(settings(), workdir, squares)
    return workdir


@pytest.fixture
def classifier(student):
    return ipwd_jax.load_student(student)


class OneLogit(nn.Module):
    """A network with a function of the pixels of all images as its only logit."""

    function: object

    @nn.compact
    def __call__(self, x):
        return Outputs(self.function(x).reshape(-1, 1), x, (), ())


def one_logit(classifier, function):
    """A classifier with the data of another and one class."""
    return dataclasses.replace(
        classifier, network=OneLogit(function), variables={}, class_names=("all",)
    )


def called_back(x):
    """The mean of each image, which Python computes."""
    shape = jax.ShapeDtypeStruct(x.shape[:1], x.dtype)
    return jax.pure_callback(lambda images: images.mean((1, 2, 3)), shape, x)


def doubled_in_large_batches(x):
    """The mean of each image, which depends on how many there are."""
    return x.mean((1, 2, 3)) * (2 if x.shape[0] > 8 else 1)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# StableHLO


@pytest.mark.parametrize(("who", "which"), [("student", "best"), ("teacher", "last")])
def test_stablehlo_runs_without_the_package(who, which, student, squares, tmp_path, capsys):
    workdir = student if who == "student" else teacher_folder(student.parent, "tiny_net")
    file, images, out = (tmp_path / name for name in ("a.stablehlo", "images.npy", "out.npz"))
    convert.main(["export", str(workdir), str(file), f"--which={which}"])
    assert capsys.readouterr().out == f"tiny_net written to {file}\n"
    np.save(images, squares.test.images)
    command = [sys.executable, "-W", "error", "-c", DEPLOYED, file, images, out]
    subprocess.run(command, cwd=tmp_path, timeout=120, check=True)
    expected = ipwd_jax.load_run(workdir).predictions()[f"{which}_logits"]
    with np.load(out) as found:
        for n in (1, 5):
            assert found[str(n)].dtype == np.float32
            np.testing.assert_allclose(found[str(n)], expected[:n], atol=1e-5)


def test_stablehlo_does_not_depend_on_where_it_is_made(classifier, tmp_path):
    def elsewhere(path):
        export.export_classifier(classifier, path)

    first, second = tmp_path / "first.stablehlo", tmp_path / "second.stablehlo"
    export.export_classifier(classifier, first)
    elsewhere(second)
    assert first.read_bytes() == second.read_bytes()
    assert b".py" not in first.read_bytes()


def test_what_the_json_file_says(student, tmp_path):
    about = export.export_run(student, tmp_path / "a.stablehlo", "best")
    assert files_in(tmp_path) == ["a.stablehlo", "a.stablehlo.json"]
    found = json.loads((tmp_path / "a.stablehlo.json").read_text())
    versions = found.pop("versions")
    assert versions == about["versions"]
    assert versions["ipwd_jax"] == ipwd_jax.__version__ and versions["jax"] == jax.__version__
    assert found == {
        "network": "tiny_net",
        "epoch": "best",
        "class_names": ["0", "1"],
        "image_shape": [8, 8, 1],
        "input": "images (N, 8, 8, 1) uint8, pixels from 0 to 255; they are normalised inside",
        "output": "logits (N, 2) float32, before the softmax",
        "centre_crop": False,
        "platforms": ["cpu", "cuda", "tpu"],
    }


# ONNX


@needs_onnx
@pytest.mark.slow
def test_onnx_runs_in_onnxruntime(student, squares, tmp_path, capfd):
    import onnxruntime

    file = tmp_path / "a.onnx"
    convert.main(["export", str(student), str(file), "--which=best"])
    assert capfd.readouterr() == (f"tiny_net written to {file}\n", "")
    assert files_in(tmp_path) == ["a.onnx"]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    expected = ipwd_jax.load_run(student).predictions()["best_logits"]
    for n in (1, 5):
        (logits,) = session.run(None, {"images": squares.test.images[:n]})
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected[:n], atol=1e-4)
    about = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    assert about["class_names"] == ["0", "1"] and about["image_shape"] == [8, 8, 1]
    assert {"jax", "jax2onnx", "ipwd_jax"} <= set(about["versions"])


@needs_onnx
@pytest.mark.slow
def test_onnx_that_computes_something_else_is_not_written(classifier, tmp_path, monkeypatch):
    with warnings.catch_warnings(action="ignore"):
        import jax2onnx

    to_onnx = jax2onnx.to_onnx
    monkeypatch.setattr(
        jax2onnx, "to_onnx", lambda f, *args, **kw: to_onnx(lambda x: f(x) + 1, *args, **kw)
    )
    with pytest.raises(UserError, match="differ by up to 1 from JAX's"):
        export.export_classifier(classifier, tmp_path / "a.onnx")
    assert not files_in(tmp_path)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("kernel, stride, padding", [(2, 2, 0), (3, 2, 1)])
def test_pooling_in_onnx(kernel, stride, padding, classifier, tmp_path):
    """The maps are negative, so that padding with zeros would be noticed."""

    def pool(x):
        return (max_pool(x - 9, kernel, stride, padding) + avg_pool(x, 2)).sum((1, 2, 3))

    export.export_classifier(one_logit(classifier, pool), tmp_path / "a.onnx")
    assert files_in(tmp_path) == ["a.onnx"]  # it is written only if onnxruntime agrees with JAX


@needs_onnx
@pytest.mark.slow
def test_a_network_that_jax2onnx_cannot_convert(classifier, tmp_path):
    with pytest.raises(UserError, match=r"jax2onnx cannot convert .* Export it to \.stablehlo"):
        export.export_classifier(one_logit(classifier, called_back), tmp_path / "a.onnx")
    assert not files_in(tmp_path)


# What is refused


@pytest.mark.parametrize("there", ["a.stablehlo", "a.stablehlo.json", "a.onnx"])
def test_existing_files_are_kept(there, student, tmp_path):
    (tmp_path / there).write_text("mine")
    path = tmp_path / there.removesuffix(".json")
    with pytest.raises(UserError, match=f"{there} exists already"):
        export.export_run(str(student), str(path))
    assert files_in(tmp_path) == [there] and (tmp_path / there).read_text() == "mine"


@pytest.mark.parametrize(
    ("module", "suffix", "words"),
    [
        ("flatbuffers", "stablehlo", r"pip install 'ipwd_jax\[export\]'"),
        ("jax2onnx", "onnx", r"pip install 'ipwd_jax\[onnx\]'"),
    ],
)
def test_packages_that_are_missing(module, suffix, words, student, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=words):
        export.export_run(student, tmp_path / f"a.{suffix}")


def test_other_suffixes(student, tmp_path):
    with pytest.raises(UserError, match=r"must end in \.stablehlo or \.onnx, found .*a\.tflite"):
        export.export_run(student, tmp_path / "a.tflite")


def test_imported_networks_have_no_normalisation(tmp_path, capsys):
    files.save(tmp_path / "net.pth", to_torch(variables()))
    import_file(tmp_path / "net.pth", tmp_path / "net", "resnet8")
    with pytest.raises(UserError, match=r"imported network.*export\.export_classifier"):
        export.export_run(tmp_path / "net", tmp_path / "a.stablehlo")
    assert files_in(tmp_path) == ["net", "net.pth"]


def test_networks_that_are_not_known(student, tmp_path):
    shutil.copytree(student, tmp_path / "own")
    path = tmp_path / "own/config.json"
    path.write_text(path.read_text().replace('"tiny_net"', '"my_own"'))
    with pytest.raises(UserError, match=r"'my_own', which is not a network .*--config=FILE"):
        export.export_run(tmp_path / "own", tmp_path / "a.stablehlo")


def test_folders_that_hold_no_run(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        export.export_run(tmp_path, tmp_path / "a.stablehlo")


def test_files_that_cannot_be_written(classifier, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export.export_classifier(classifier, tmp_path / "file/a.stablehlo")
    assert files_in(tmp_path) == ["file"]

    def replace(source, target, of_os=os.replace):
        if target.suffix == ".stablehlo":  # the JSON file can be written, this one cannot
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        of_os(source, target)

    refused = pytest.raises(UserError, match=r"a\.stablehlo cannot be written")
    with mock.patch.object(os, "replace", replace), refused:
        export.export_classifier(classifier, tmp_path / "a.stablehlo")
    assert files_in(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_names": ("0", "1", "2")}, "2 logits, but the classifier has 3 class names"),
        ({"image_shape": (8, 8, 3)}, r"does not accept images of shape \(8, 8, 3\)"),
    ],
)
def test_classifiers_that_contradict_themselves(changes, words, classifier, tmp_path):
    with pytest.raises(UserError, match=words):
        export.export_classifier(
            dataclasses.replace(classifier, **changes), tmp_path / "a.stablehlo"
        )
    assert not files_in(tmp_path)


@pytest.mark.parametrize(
    "function",
    [called_back, doubled_in_large_batches],
    ids=["python", "size"],
)
def test_networks_that_stablehlo_cannot_hold(function, classifier, tmp_path):
    with pytest.raises(UserError, match="cannot be exported for any number of images"):
        export.export_classifier(one_logit(classifier, function), tmp_path / "a.stablehlo")
    assert not files_in(tmp_path)

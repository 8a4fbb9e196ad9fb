"""Runs of SimKD: projector and teacher's classifier make the predictions wherever there are any."""

import jax
import numpy as np
import pytest
from helpers import rows, settings, teacher_folder
from jax import export as jax_export

import ipwd_jax
from ipwd_jax import convert, models, train
from ipwd_jax.assemble import assemble
from ipwd_jax.checkpoint import load_network
from ipwd_jax.errors import UserError
from ipwd_jax.evaluate import score
from ipwd_jax.pytorch import files
from ipwd_jax.pytorch.names import to_torch
from ipwd_jax.state import network_shapes

SIMKD = {"loss__ce": 0.0, "loss__kd": 0.0, "loss__simkd": 1.0}
PLAIN = {"loss__cls": 0.0, "weighting__name": "uniform"}


@pytest.fixture(scope="module")
def workdir(squares, tmp_path_factory):
    """The work directory of a run that knows no label, beside that of its teacher."""
    folder = tmp_path_factory.mktemp("runs") / "simkd"
    train.run(settings(**SIMKD, **PLAIN), folder, squares)
    return folder


def logits_by_hand(student, images):
    """Return the logits of tiny_net's map, projected in NumPy, by the classifier at the end."""
    variables = student.variables
    inside = {
        collection: variables[collection]["backbone"] for collection in ("params", "batch_stats")
    }
    x = (images / np.float32(255) - student.mean) / student.std
    x = np.asarray(models.create("tiny_net", 2).apply(inside, x).pre_pool)
    params, stats = (variables[c]["head"]["projector"] for c in ("params", "batch_stats"))
    for i in ("0", "3", "6"):
        kernel, norm = params[i]["kernel"], str(int(i) + 1)
        border = len(kernel) // 2
        padded = np.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))
        side = x.shape[1]
        x = sum(
            padded[:, a : a + side, b : b + side] @ kernel[a, b]
            for a in range(len(kernel))
            for b in range(len(kernel))
        )
        x = (x - stats[norm]["mean"]) / np.sqrt(stats[norm]["var"] + 1e-5)
        x = np.maximum(x * params[norm]["scale"] + params[norm]["bias"], 0)
    classifier = variables["params"]["head"]["classifier"]
    return x.mean((1, 2)) @ classifier["kernel"] + classifier["bias"]


@pytest.mark.parametrize("which", ["last", "best"])
def test_predictions_are_those_of_the_projected_map(which, workdir, squares):
    student = ipwd_jax.load_student(workdir, which)
    expected = logits_by_hand(student, squares.test.images)
    run = ipwd_jax.load_run(workdir)
    found = run.predictions()[f"{which}_logits"]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert run.result[which]["top1"] == score(found, squares.test.labels)["top1"]
    labels = student.predict(squares.test.images).labels
    np.testing.assert_array_equal(labels, expected.argmax(axis=1))


def test_the_eval_command_measures_them(workdir, squares):
    found = train.evaluate_run(settings(**SIMKD, **PLAIN), workdir, squares)
    result = ipwd_jax.load_run(workdir).result
    for which in ("last", "best"):
        for metric in ("epoch", "top1", "nll"):
            assert found[which][metric] == pytest.approx(result[which][metric]), (which, metric)
    assert found["parameters"] == result["parameters"]


def test_what_is_trained(workdir, squares):
    """The classifier is the teacher's; the student's own one only shrinks by weight decay."""
    template = network_shapes(models.create("tiny_net", 2), (8, 8, 1))
    teacher, _ = load_network(teacher_folder(workdir.parent, "tiny_net"), "last", template)
    params = ipwd_jax.load_student(workdir).variables["params"]
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(
            params["head"]["classifier"][name], teacher["params"]["fc"][name]
        )
    own = params["backbone"]["fc"]["kernel"]
    experiment = assemble(settings(**SIMKD, **PLAIN), squares, None)
    initial = experiment.initial_state(0).params["student"]["backbone"]["fc"]["kernel"]
    shrunk = own / initial
    assert shrunk.max() < 1 and np.ptp(shrunk) < 1e-6
    losses = [float(row["train_simkd"]) for row in rows(workdir)]
    assert losses[1] < losses[0]
    assert [float(row["train_loss"]) for row in rows(workdir)] == losses


def test_stablehlo_holds_the_whole(workdir, squares, tmp_path):
    file = tmp_path / "a.stablehlo"
    convert.main(["export", str(workdir), str(file)])
    found = jax_export.deserialize(bytearray(file.read_bytes())).call(squares.test.images)
    expected = ipwd_jax.load_run(workdir).predictions()["last_logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_onnx_holds_the_whole(workdir, tmp_path):
    pytest.importorskip("jax2onnx")
    # The file is written only if onnxruntime computes the logits that JAX does.
    convert.main(["export", str(workdir), str(tmp_path / "a.onnx")])
    assert (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_pytorch_gets_the_whole(workdir, suffix, squares, tmp_path):
    """The tensors are those of the network and the head, and a PyTorch head computes our logits."""
    file = tmp_path / f"a.{suffix}"
    assert convert.export_file(workdir, file, "best") == "tiny_net"
    tensors, student = files.load(file), ipwd_jax.load_student(workdir, "best")
    expected = to_torch(jax.device_get(student.variables))
    counters = {name for name in tensors if name.endswith("num_batches_tracked")}
    assert tensors.keys() - counters == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor)
    torch = pytest.importorskip("torch", reason="computes the logits with PyTorch")
    nn = torch.nn
    whole = nn.Module()
    whole.head = nn.ModuleDict()
    width, middle = (len(tensors[f"head.projector.{i}.weight"]) for i in (6, 0))
    seen = tensors["head.projector.0.weight"].shape[1]
    layers = []
    for before, after, kernel in ((seen, middle, 1), (middle, middle, 3), (middle, width, 1)):
        convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    whole.head["projector"], whole.head["classifier"] = nn.Sequential(*layers), nn.Linear(width, 2)
    of_head = {k: torch.tensor(x) for k, x in tensors.items() if k.startswith("head.")}
    whole.load_state_dict(of_head)
    inside = {c: student.variables[c]["backbone"] for c in ("params", "batch_stats")}
    x = (squares.test.images / np.float32(255) - student.mean) / student.std
    x = np.asarray(models.create("tiny_net", 2).apply(inside, x).pre_pool).transpose(0, 3, 1, 2)
    maps = whole.eval().head["projector"](torch.tensor(x))
    found = whole.head["classifier"](maps.mean((2, 3))).detach().numpy()
    logits = ipwd_jax.load_run(workdir).predictions()["best_logits"]
    np.testing.assert_allclose(found, logits, atol=1e-4)


def test_it_is_no_start_of_another_student(workdir, squares, tmp_path):
    config = settings(model__pretrained=str(workdir))
    with pytest.raises(UserError, match="trained with the loss term simkd"):
        train.run(config, tmp_path / "run", squares)


@pytest.mark.slow
def test_it_starts_from_another_student(workdir, squares, tmp_path):
    teacher = teacher_folder(workdir.parent, "tiny_net")
    config = settings(**SIMKD, **PLAIN, model__pretrained=str(teacher), epochs=1)
    config.teacher.workdir, config.optimizer.learning_rate = str(teacher), 1e-9
    train.run(config, tmp_path / "run", squares)
    params = ipwd_jax.load_student(tmp_path / "run").variables["params"]
    expected = ipwd_jax.load_student(teacher).variables["params"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params["backbone"], expected
    )


def test_a_projector_without_channels_is_refused(squares, tmp_path):
    config = settings(**SIMKD, **PLAIN, terms__simkd__factor=7)
    with pytest.raises(UserError, match=r"6 / 7 channels wide; set config.terms.simkd.factor to 1"):
        train.run(config, tmp_path / "run", squares)
    assert not (tmp_path / "run").exists()

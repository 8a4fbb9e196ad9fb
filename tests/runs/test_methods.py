"""Every method of the tables trains with its config, first stage included, and resumes bitwise."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import Tiny, config_file, rows, settings, stopped_after

from ipwd_jax import checkpoint, data, models, train, validate
from ipwd_jax import config as config_lib
from ipwd_jax.errors import UserError
from ipwd_jax.loop import Loop

BASELINES, SELF = config_file("cifar_baselines"), config_file("cifar_self")


@pytest.fixture(scope="module")
def digits():
    """Return 120 training and 40 test digits."""
    config = config_lib.default()
    config.data.name = "digits"
    whole = data.load(config.data)
    images, labels = whole.train.images, whole.train.labels
    return data.from_arrays(images[:120], labels[:120], images[120:160], labels[120:160])


def shortened(config):
    """Return the config with two epochs of three steps on digits, and one of the first stage."""
    config.data.crop_padding, config.data.flip = 1, False
    config.epochs, config.batch_size = 2, 48
    config.first_stage.epochs = min(config.first_stage.epochs, 1)
    config.teacher.epochs, config.teacher.batch_size = 1, 48
    config.terms.crd.negatives = 16
    config.weighting.start_epoch = min(config.weighting.start_epoch, 1)
    config.checkpoint.every_seconds = 0.0
    return config


def method_config(method, teacher="resnet14", student="resnet8"):
    if method in BASELINES.METHODS:
        return shortened(BASELINES.get_config(f"{method},{teacher},{student}"))
    return shortened(SELF.get_config(f"{method.removeprefix('self_')},resnet8"))


@pytest.fixture(autouse=True)
def forget_programs_of_each_test(forget_programs):
    yield
    jax.clear_caches()


METHODS = [*BASELINES.METHODS, *(f"self_{name}" for name in SELF.METHODS)]


@pytest.mark.parametrize(
    "config",
    [
        *(
            pytest.param(
                method_config(m, "tiny_net", "tiny_net"),
                id=f"{m}-tiny_net",
                marks=[pytest.mark.slow] * (m not in ("crd", "simkd")),
            )
            for m in ("crd", "dist", "ctkd_dkd", "wkd", "simkd")
        ),
        *(pytest.param(method_config(m), id=m, marks=pytest.mark.slow) for m in METHODS),
    ],
)
def test_trains_and_resumes_bitwise(config, digits, tmp_path, tmp_path_factory):
    if config.teacher.name:
        teacher = tmp_path_factory.getbasetemp() / f"teacher_{config.teacher.name}"
        config.teacher.workdir = str(teacher)
        train.run(config, tmp_path / "unused", digits, teacher_only=True)
    result = train.run(config, tmp_path / "whole", digits)
    assert np.isfinite(result["last"]["nll"])

    # The run is stopped twice, each time after two saves, before it is finished.
    for _ in range(2):
        with stopped_after(2):
            train.run(config, tmp_path / "pieces", digits)
    assert train.run(config, tmp_path / "pieces", digits)["last"] == result["last"]
    for name in ("last_logits", "best_logits"):
        whole, pieces = (
            np.load(tmp_path / folder / "predictions.npz")[name] for folder in ("whole", "pieces")
        )
        np.testing.assert_array_equal(whole, pieces)


def test_a_learned_temperature_is_a_metric_of_every_epoch(squares, tmp_path):
    changes = {"loss__kd": 0.0, "loss__ctkd": 0.9, "loss__cls": 0.0, "weighting__name": "uniform"}
    train.run(settings(epochs=3, **changes), tmp_path / "run", squares)
    found = [float(row["ctkd_temperature"]) for row in rows(tmp_path / "run")]
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert events.read_bytes().count(b"ctkd_temperature") == 3
    # It starts at 15.6, and every epoch changes it.
    assert len(set(found)) == 3 and all(1 < temperature < 21 for temperature in found)
    np.testing.assert_allclose(found, 15.6, atol=0.5)


# Full size


@pytest.fixture(scope="module")
def small_images():
    """Return 48 training images of 32x32 pixels, which make three steps."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (56, 32, 32, 3), np.uint8)
    labels = np.arange(56) % 8
    return data.from_arrays(images[:48], labels[:48], images[48:], labels[48:])


def untrained(name, folder):
    """Return the work directory of an untrained teacher with the running statistics of its maps.

    With the statistics of initialisation, the maps of a deep network would grow from block to
    block, and its answers could have any size.
    """
    if not folder.exists():
        network = models.create(name, 8)
        images = np.random.default_rng(1).normal(size=(16, 32, 32, 3)).astype(np.float32)
        variables = jax.jit(network.init)(jax.random.key(0), images)
        step = jax.jit(lambda v: network.apply(v, images, train=True, mutable=["batch_stats"])[1])
        for _ in range(40):
            variables = {**variables, **step(variables)}
        folder.mkdir(parents=True)
        checkpoint.save_network(folder, variables)
        (folder / "config.json").write_text(json.dumps({"config": {}, "checksums": {}}))
        (folder / "result.json").write_text("{}")
    return folder


def dry_run(config, dataset, tmp_path, teachers):
    config.data.crop_padding, config.data.flip = 4, True
    config.epochs, config.batch_size, config.teacher.batch_size = 1, 16, 16
    config.first_stage.epochs = min(config.first_stage.epochs, 1)
    config.terms.crd.negatives = 16
    config.weighting.start_epoch = 0
    if config.teacher.name:
        name = config.teacher.name
        config.teacher.workdir = str(untrained(name, teachers / name))
    result = train.run(config, tmp_path / "run", dataset)
    assert np.isfinite(result["last"]["nll"])


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return tmp_path_factory.mktemp("teachers")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_dry_run_of_each_method(method, small_images, tmp_path, teachers):
    if method in BASELINES.METHODS:
        config = BASELINES.get_config(f"{method},wrn_40_2,wrn_16_2")
    else:
        config = SELF.get_config(f"{method.removeprefix('self_')},PreActResNet18")
    dry_run(config, small_images, tmp_path, teachers)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ipwd", "reviewkd_ipwd"])
@pytest.mark.parametrize("pair", BASELINES.PAIRS, ids="-".join)
def test_dry_run_of_each_pair(pair, method, small_images, tmp_path, teachers):
    config = BASELINES.get_config(f"{method},{','.join(pair)}")
    dry_run(config, small_images, tmp_path, teachers)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in BASELINES.MODERN_METHODS if m in BASELINES.LOSSES])
def test_dry_run_on_networks_of_different_families(method, small_images, tmp_path, teachers):
    config = BASELINES.get_config(f"{method},resnet32x4,ShuffleV2")
    dry_run(config, small_images, tmp_path, teachers)


# What is refused


@pytest.mark.parametrize("term", ["sp", "cc", "rkd", "pkt", "crd", "sskd", "dist", "uskd", "mlkd"])
def test_a_weighting_of_a_relational_term_is_refused(term):
    config = method_config("ipwd")
    config.loss[term] = 1.0
    config.weighting.terms = ("kd", term)
    with pytest.raises(UserError, match=f"names {term}, which compares samples with each other"):
        validate.validate(config)


def black(height, width):
    """Return black images of five classes."""
    images, labels = np.zeros((65, height, width, 3), np.uint8), np.arange(65) % 5
    return data.from_arrays(images[:60], labels[:60], images[60:], labels[60:])


def test_terms_that_do_not_fit_are_refused_before_the_teacher_is_trained(digits, tmp_path):
    config = shortened(BASELINES.get_config("fsp,wrn_16_2,resnet8"))
    with pytest.raises(UserError, match=r"channels|FSP"):
        train.run(config, tmp_path / "fsp", digits)
    config = shortened(BASELINES.get_config("crd,resnet14,resnet8"))
    config.terms.crd.negatives = 16384
    with pytest.raises(UserError, match=r"crd.negatives is 16384, but .* only \d+ training"):
        train.run(config, tmp_path / "crd", digits)
    config = shortened(BASELINES.get_config("sskd,resnet14,resnet8"))
    with pytest.raises(UserError, match="needs square ones, found 8x12"):
        train.run(config, tmp_path / "sskd", black(8, 12))
    config = shortened(BASELINES.get_config("ofd,tiny_net,resnet8"))
    with pytest.raises(UserError, match="Tiny does not declare it"):
        train.run(config, tmp_path / "ofd", digits)
    config = shortened(BASELINES.get_config("kd,resnet14,resnet8"))
    config.loss.ft = 1.0
    with pytest.raises(UserError, match=r"ft needs terms/ft/paraphraser.*first_stage\.loss\.ft"):
        train.run(config, tmp_path / "ft", digits)
    config = shortened(BASELINES.get_config("fitnet,resnet14,resnet8"))
    config.trainable = ("student",)
    with pytest.raises(UserError, match=r"terms/fitnet/regressor.*'terms/fitnet' to config"):
        train.run(config, tmp_path / "trainable", digits)
    config = shortened(BASELINES.get_config("fitnet,ResNet50,resnet8"))
    config.terms.fitnet.layer = -1
    with pytest.raises(UserError, match=r"4 x 2 pixels .* 4 x 3; .*config\.terms\.fitnet\.layer"):
        train.run(config, tmp_path / "high", black(28, 20))
    config = shortened(BASELINES.get_config("ab,wrn_16_2,resnet8"))
    config.first_stage.trainable = ("student/features",)
    words = r"first_stage\.loss\.ab needs terms/ab/.*'terms/ab' to config\.first_stage\.trainable"
    with pytest.raises(UserError, match=words):
        train.run(config, tmp_path / "ab", digits)
    config = shortened(BASELINES.get_config("ft,vgg8,resnet8"))
    with pytest.raises(UserError, match="the last map of one of the networks has a single pixel"):
        train.run(config, tmp_path / "pixel", digits)
    config = shortened(BASELINES.get_config("kd,vgg8,resnet8"))
    config.loss.wkd_f = 1.0
    with pytest.raises(UserError, match="map has a single pixel, so wkd_f cannot"):
        train.run(config, tmp_path / "cell", digits)
    assert not list(tmp_path.rglob("checkpoints"))


def test_wkd_needs_distances_that_it_can_compute(squares, tmp_path, monkeypatch):
    class WithoutClassifier(Tiny):
        @nn.compact
        def __call__(self, x, train=False, mask=None):
            outputs = Tiny.__call__.__wrapped__(self, x, train, mask)
            return dataclasses.replace(outputs, classifier=None)

    monkeypatch.setitem(models.NETWORKS, "own", WithoutClassifier)
    config = settings(loss__wkd_l=1.0, terms__wkd_l__distances="classifier", teacher__name="own")
    with pytest.raises(UserError, match="the teacher's Outputs have no `classifier`"):
        train.run(config, tmp_path / "run", squares)
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.parametrize(
    ("file", "argument", "hint"),
    [
        (BASELINES, "crdd,vgg13,vgg8", "Did you mean 'crd'"),
        (BASELINES, "crd,vgg13", "takes METHOD,TEACHER,STUDENT"),
        (SELF, "psk,DenseNet121", "unknown method 'psk'. Did you mean 'pskd'"),
        (SELF, "pskd", "takes METHOD,NETWORK"),
    ],
)
def test_wrong_arguments_of_configs(file, argument, hint):
    with pytest.raises(UserError, match=hint):
        file.get_config(argument)


# Stages


def test_a_first_stage_trains_what_it_names_and_no_other_norm(digits, tmp_path):
    config = shortened(BASELINES.get_config("ab,wrn_16_2,wrn_10_1"))
    config.teacher.name = "wrn_10_1"
    config.epochs = 1
    stopped = []

    def stop_at_main(self):
        now = self.runs[0].now
        if now.position.stage == 0 and now.position.step == 3:
            stopped.append(jax.device_get(now.state.replace(key=0)))
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_must_save", stop_at_main)
        train.run(config, tmp_path / "ab", digits)
    after = stopped[-1]  # an earlier one is the teacher's
    stats, params = after.batch_stats["student"], after.params["student"]
    np.testing.assert_array_equal(stats["bn1"]["mean"], 0)  # after the last map
    np.testing.assert_array_equal(params["bn1"]["scale"], 1)
    assert np.abs(stats["block1.layer.0"]["bn1"]["mean"]).max() > 0
    assert np.abs(params["block1.layer.0"]["bn1"]["scale"] - 1).max() > 0

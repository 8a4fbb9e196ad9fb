"""The recipes in `configs/`: each method has the settings that the docstrings describe."""

import numpy as np
import pytest
from helpers import config_file
from PIL import Image

from ipwd_jax import config as config_lib
from ipwd_jax import data, optim, train, validate
from ipwd_jax.errors import UserError

BASELINES, IMAGENET = config_file("cifar_baselines"), config_file("imagenet_ipwd")


@pytest.mark.parametrize(
    ("network", "rate"),
    [
        ("MobileNetV2", 0.01),
        ("MobileNetV2_0.75", 0.01),
        ("ShuffleV1", 0.01),
        ("ShuffleV2", 0.01),
        ("ShuffleV2_0.5", 0.01),
        ("MobileNetV1", 0.05),
        ("resnet8x4", 0.05),
        ("wrn_40_2", 0.05),
    ],
)
def test_first_learning_rate(network, rate):
    assert config_lib.cifar_learning_rate(network) == rate
    config = BASELINES.get_config(f"kd,resnet32x4,{network}")
    assert config.optimizer.learning_rate == rate


@pytest.mark.parametrize("method", ["reviewkd", "reviewkd_ipwd", "reviewkd_constant"])
@pytest.mark.parametrize(("student", "rate"), [("resnet8x4", 0.1), ("ShuffleV2_0.5", 0.02)])
def test_reviewkd_has_its_authors_recipe(method, student, rate):
    config = BASELINES.get_config(f"{method},resnet32x4,{student}")
    validate.validate(config)
    np.testing.assert_allclose(config.data.mean, np.array([125.3, 123.0, 113.9]) / 255)
    np.testing.assert_allclose(config.data.std, np.array([63.0, 62.1, 66.7]) / 255)
    assert config.teacher.train_mode and config.teacher.which == "best"
    assert config.terms.reviewkd.first_epoch == 0 and config.terms.reviewkd.warmup == 20
    for side, first in ((config, rate), (config.teacher, 0.1)):
        assert (side.epochs, side.batch_size) == (240, 128)
        optimizer = side.optimizer
        assert (optimizer.nesterov, optimizer.weight_decay, optimizer.momentum) == (True, 5e-4, 0.9)
        rates = optim.schedule(optimizer, 1, 240)
        # Their script lowers the rate after epochs 150, 180 and 210, counting from 0.
        for epoch, falls in ((150, 0), (151, 1), (180, 1), (181, 2), (210, 2), (211, 3)):
            assert rates(epoch) == pytest.approx(first * 0.1**falls), epoch


def test_every_setting_of_a_method_has_an_effect(capsys):
    for method in BASELINES.METHODS:
        validate.validate(BASELINES.get_config(f"{method},resnet32x4,resnet8x4"))
    for method in IMAGENET.LOSSES:
        pair = "ResNet34_imagenet,ResNet18_imagenet"
        validate.validate(IMAGENET.get_config(f"{method},{pair}"))
    assert not capsys.readouterr().err


def test_other_methods_have_the_recipe_of_their_table():
    config = BASELINES.get_config("dkd,resnet32x4,resnet8x4")
    assert not config.teacher.train_mode and config.teacher.which == "last"
    assert config.data.mean == () and tuple(config.optimizer.milestones) == (150, 180, 210)


@pytest.mark.parametrize(
    ("method", "pair", "weights", "settings"),
    [
        ("srrl", "resnet56,resnet20", {"kd": 1, "srrl": 1}, {"kd.temperature": 4}),
        ("cat_kd", "vgg13,vgg8", {"cat_kd": 4.5}, {"cat_kd.resolution": 2}),
        (
            "cat_kd",
            "resnet32x4,ShuffleV2",
            {"cat_kd": 600},
            {"cat_kd.resolution": 4, "cat_kd.normalize": True},
        ),
        (
            "sdd_kd",
            "resnet32x4,resnet8x4",
            {"ce": 0.1, "sdd": 0.9},
            {"sdd.base": "kd", "sdd.scales": (1, 2), "sdd.warmup": 0},
        ),
        (
            "sdd",
            "vgg13,MobileNetV2",
            {"sdd": 1},
            {"sdd.base": "dkd", "sdd.beta": 6, "sdd.scales": (1, 2, 4), "sdd.warmup": 20},
        ),
        ("sdd_nkd", "ResNet50,vgg8", {"sdd": 1}, {"sdd.base": "nkd", "sdd.scales": (1, 2)}),
        (
            "wkd",
            "wrn_40_2,ShuffleV1",
            {"wkd_l": 1, "wkd_f": 0.5},
            {"wkd_l.temperature": 4, "wkd_l.gamma": 60, "wkd_f.mean_ratio": 3, "wkd_f.grid": 4},
        ),
        ("wkd_l", "vgg13,vgg8", {"wkd_l": 1}, {"wkd_l.temperature": 8, "wkd_l.gamma": 600}),
        ("wkd_f", "wrn_40_2,ShuffleV1", {"wkd_f": 0.3}, {"wkd_f.grid": 4}),
        ("wkd_f_ipwd", "wrn_40_2,ShuffleV1", {"wkd_f": 0.3, "cls": 1}, {"wkd_f.mean_ratio": 3}),
    ],
)
def test_methods_of_maps_have_the_settings_of_their_authors(method, pair, weights, settings):
    config = BASELINES.get_config(f"{method},{pair}")
    validate.validate(config)
    found = {name: weight for name, weight in config.loss.items() if weight}
    assert found == {"ce": 1, **weights}
    flat = config_lib.flat(config)
    assert {name: flat[f"terms.{name}"] for name in settings} == settings


@pytest.mark.slow
def test_a_run_with_the_recipe_of_reviewkd_is_trained(tmp_path):
    """ReviewKD's loss is 0 in the first epoch; the run trains a teacher with ReviewKD's recipe."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (48, 8, 8, 3), np.uint8), np.arange(48) % 4
    dataset = data.from_arrays(images[:40], labels[:40], images[40:], labels[40:])
    config = BASELINES.get_config("reviewkd,resnet8,resnet8")
    config.epochs, config.teacher.epochs = 2, 1
    config.batch_size = config.teacher.batch_size = 16
    config.data.crop_padding = 1
    train.run(config, tmp_path / "student", dataset)
    lines = (tmp_path / "student" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train_reviewkd")
    history = [float(line.split(",")[column]) for line in lines[1:]]
    assert history[0] == 0 and history[1] > 0


@pytest.mark.parametrize(
    ("method", "pair", "weight", "fields"),
    [
        ("kd_ls", "resnet32x4,resnet8x4", 9.0, {"temperature": 2.0}),
        ("kd_ls", "vgg13,MobileNetV2", 9.0, {"temperature": 3.0}),
        ("kd_ls", "resnet110,resnet20", 12.0, {"temperature": 4.0}),
        ("kd_ls", "ResNet50,MobileNetV2", 1.0, {"temperature": 3.0}),
        ("dkd_ls", "resnet32x4,ShuffleV2", 9.0, {"temperature": 2.0, "alpha": 1.0, "beta": 8.0}),
        ("dkd_ls", "wrn_40_2,wrn_40_1", 12.0, {"temperature": 2.0, "alpha": 1.0, "beta": 2.0}),
        ("dkd_ls", "resnet56,resnet20", 18.0, {"temperature": 3.0, "alpha": 1.0, "beta": 2.0}),
        ("dkd_ls", "resnet110,resnet32", 15.0, {"temperature": 2.0, "alpha": 1.0, "beta": 2.0}),
        ("ctkd_ls", "vgg13,vgg8", 9.0, {"form": "kd", "temperature_range": 20.0}),
    ],
)
def test_standardised_logits_have_the_settings_of_the_logs(method, pair, weight, fields):
    config = BASELINES.get_config(f"{method},{pair}")
    validate.validate(config)
    term = method.removesuffix("_ls")
    active = {name: weight for name, weight in config.loss.items() if weight}
    assert active == {"ce": 1.0 if term == "dkd" else 0.1, term: weight}
    found = config.terms[term].to_dict()
    assert found["standardize"] and fields.items() <= found.items()


@pytest.mark.parametrize("method", BASELINES.MODERN_METHODS)
@pytest.mark.parametrize("student", ["resnet8x4", "ShuffleV2"])
def test_methods_after_2022_keep_the_recipe_of_the_tables(method, student):
    config, plain = (BASELINES.get_config(f"{m},resnet32x4,{student}") for m in (method, "kd"))
    validate.validate(config)
    if method.startswith("mlkd"):  # these are compared below
        config.epochs = plain.epochs
        config.optimizer.learning_rate = plain.optimizer.learning_rate
    assert config.model.classifier_bias == (not method.startswith("cat_kd"))
    config.model.classifier_bias = True
    for setting in ("epochs", "batch_size", "optimizer", "teacher", "data", "model"):
        assert config[setting] == plain[setting], setting


@pytest.mark.parametrize(
    ("method", "pair", "weight", "rate", "epochs"),
    [
        ("mlkd", "resnet32x4,resnet8x4", 0.9, 0.025, 240),
        ("mlkd", "vgg13,MobileNetV2", 0.9, 0.01, 480),
        ("mlkd", "resnet32x4,ShuffleV2", 0.9, 0.01, 960),
        ("mlkd_ls", "wrn_40_2,wrn_16_2", 9, 0.025, 480),
        ("mlkd_ls", "vgg13,vgg8", 6, 0.01, 480),
        ("mlkd_ls", "resnet32x4,ShuffleV2", 6, 0.01, 960),
    ],
)
def test_mlkd_has_the_weights_rates_and_epochs_of_its_authors(method, pair, weight, rate, epochs):
    config = BASELINES.get_config(f"{method},{pair}")
    validate.validate(config)
    active = {name: weight for name, weight in config.loss.items() if weight}
    assert active == {"ce": 0.1, "mlkd": weight}
    assert (config.optimizer.learning_rate, config.epochs) == (rate, epochs)
    assert config.terms.mlkd.standardize == (method == "mlkd_ls")
    assert config.terms.mlkd.temperature == (2 if method == "mlkd_ls" else 4)


@pytest.mark.parametrize(
    ("method", "batch_size", "rate", "nesterov"),
    [
        ("at", 512, 0.2, False),
        ("dkd", 512, 0.2, False),
        ("crd", 256, 0.1, False),
        ("reviewkd", 256, 0.1, False),
        ("ce", 256, 0.1, True),
        ("kd", 256, 0.1, True),
        ("wsld", 256, 0.1, True),
        ("ipwd", 256, 0.1, True),
    ],
)
@pytest.mark.parametrize("student", ["ResNet18_imagenet", "MobileNetV1"])
def test_optimisers_on_imagenet(method, batch_size, rate, nesterov, student):
    config = IMAGENET.get_config(f"{method},ResNet50_imagenet,{student}")
    validate.validate(config)
    optimizer = config.optimizer
    assert (config.batch_size, optimizer.learning_rate) == (batch_size, rate)
    assert optimizer.nesterov == nesterov and optimizer.weight_decay == 1e-4
    assert tuple(optimizer.milestones) == (30, 60, 90) and config.epochs == 100


def test_own_data(tmp_path):
    """The command in the docstring of `configs/own_data.py` works on a folder and on arrays."""
    own = config_file("own_data")
    rng = np.random.default_rng(0)
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for j in range(5):
            pixels = rng.integers(0, 200, (20, 30, 3)) + 50 * i
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pets" / name / f"{j}.png")
    config = own.get_config(str(tmp_path / "pets"))
    config.batch_size = config.teacher.batch_size = 4
    shown = next(train.planned(config, tmp_path / "run"))
    assert "8 training and 2 test images of 64x64x3, 2 classes" in shown
    assert "teacher  resnet32x4 (" in shown and "student  resnet8x4 (" in shown
    np.savez(
        tmp_path / "arrays.npz",
        train_images=rng.integers(0, 255, (10, 32, 32, 3), np.uint8),
        train_labels=np.arange(10) % 2,
    )
    config = own.get_config(f"{tmp_path / 'arrays.npz'},resnet20,MobileNetV2")
    config.batch_size = config.teacher.batch_size = 4
    assert config.name == "arrays_ipwd_resnet20_MobileNetV2"
    assert config.optimizer.learning_rate == 0.01
    assert "images of 32x32x3" in next(train.planned(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    for wrong in ("", "a,b"):
        with pytest.raises(UserError, match="needs the path of the data"):
            own.get_config(wrong)

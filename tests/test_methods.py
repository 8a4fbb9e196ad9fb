"""Every method of the tables trains from its config, first stages included, and resumes bitwise."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from ipwd_jax import config as config_lib
from ipwd_jax import data, train
from ipwd_jax.errors import Interrupted
from ipwd_jax.loop import Loop

ROOT = pathlib.Path(__file__).parents[1]


def config_file(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BASELINES, SELF = config_file("cifar_baselines"), config_file("cifar_self")


@pytest.fixture(scope="module")
def digits():
    """120 training and 40 test digits."""
    config = config_lib.default()
    config.data.name = "digits"
    whole = data.load(config.data)
    images, labels = whole.train.images, whole.train.labels
    return data.from_arrays(images[:120], labels[:120], images[120:160], labels[120:160])


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """A resumed run compiles the same programs again."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def shortened(config):
    """Two epochs of three steps on digits, one of a first stage."""
    config.data.crop_padding, config.data.flip = 1, False
    config.epochs, config.batch_size = 2, 48
    config.first_stage.epochs = min(config.first_stage.epochs, 1)
    config.teacher.epochs, config.teacher.batch_size = 1, 48
    config.terms.crd.negatives = 16
    config.weighting.start_epoch = min(config.weighting.start_epoch, 1)
    config.checkpoint.every_seconds = 0.0
    return config


def method_config(method):
    if method in BASELINES.METHODS:
        return shortened(BASELINES.get_config(f"{method},resnet14,resnet8"))
    return shortened(SELF.get_config(f"{method.removeprefix('self_')},resnet8"))


METHODS = [*BASELINES.METHODS, *(f"self_{name}" for name in SELF.METHODS)]
QUICK = {"ipwd", "crd", "sskd", "ft", "self_pskd_ipwd"}


@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_trains_and_resumes_bitwise(method, digits, tmp_path, tmp_path_factory, monkeypatch):
    config = method_config(method)
    config.teacher.workdir = str(tmp_path_factory.getbasetemp() / "teacher")
    result = train.run(config, tmp_path / "whole", digits)
    assert np.isfinite(result["last"]["nll"])

    # Stopped inside the first epoch, after two calls of the next process, and so on.
    def save_and_stop(self):
        save(self)
        calls.append(1)
        if len(calls) % 2 == 0:
            raise Interrupted(15)

    save, calls = Loop._save, []
    monkeypatch.setattr(Loop, "_save", save_and_stop)
    for _ in range(2):
        with pytest.raises(Interrupted):
            train.run(config, tmp_path / "pieces", digits)
    monkeypatch.setattr(Loop, "_save", save)
    assert train.run(config, tmp_path / "pieces", digits)["last"] == result["last"]
    for name in ("last_logits", "best_logits"):
        whole, pieces = (
            np.load(tmp_path / folder / "predictions.npz")[name] for folder in ("whole", "pieces")
        )
        np.testing.assert_array_equal(whole, pieces)

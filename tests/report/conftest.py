"""The runs that are reported."""

import shutil

import numpy as np
import pytest
from helpers import settings
from report_helpers import changed

from ipwd_jax import train

_NAMES = ("<b>light</b> & $\\frac", "dark|_*")  # a page must show them as they are


@pytest.fixture(scope="session")
def trained(squares, tmp_path_factory):
    """A folder with an IPWD run, a run of plain distillation, and their teacher."""
    folder = tmp_path_factory.mktemp("report")
    np.savez(
        folder / "squares.npz",
        train_images=squares.train.images,
        train_labels=squares.train.labels,
        test_images=squares.test.images,
        test_labels=squares.test.labels,
        class_names=np.array(_NAMES),
    )
    config = settings(data__name=f"numpy:{folder / 'squares.npz'}", optimizer__milestones=(1,))
    config.teacher.view_cache = "off"  # has nothing to do with a report
    pair = f"{config.teacher.name}_{config.model.name}"
    config.name = f"squares_ipwd_{pair}"
    train.run(config, folder / "ipwd_seed0")
    # What a run of plain distillation leaves, without the time to train it.
    kd = shutil.copytree(folder / "ipwd_seed0", folder / "kd_seed0")
    (kd / "samples.npz").unlink()
    changed(kd, "config.json", config__name=f"squares_kd_{pair}", config__loss__cls=0.0)
    changed(kd, "config.json", config__weighting__name="uniform")
    changed(kd, "result.json", weights=None, last__top1=65.0)
    arrays = dict(np.load(kd / "predictions.npz"))
    noise = np.random.default_rng(0).normal(size=arrays["last_logits"].shape)
    arrays["last_logits"] = arrays["last_logits"] + noise.astype(np.float32)
    np.savez(kd / "predictions.npz", **arrays)
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of the folder that a test can change."""
    return shutil.copytree(trained, tmp_path / "runs")

"""The examples in the docstrings of what `import ipwd_jax` exports."""

import doctest

import jax
import numpy as np
import pytest
from helpers import ROOT, settings

import ipwd_jax
from ipwd_jax import train


@pytest.fixture(scope="module")
def folder(squares, tmp_path_factory):
    """Return a folder with the configs and a finished run, `runs/mine`, of labels alone."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "configs").symlink_to(ROOT / "configs")
    config = settings(teacher__name="", weighting__name="uniform", loss__kd=0.0, loss__cls=0.0)
    train.run(config, folder / "runs" / "mine", squares)
    return folder


@pytest.mark.parametrize("name", ipwd_jax._EXPORTED)
def test_examples(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    seen = {"ipwd_jax": ipwd_jax, "jax": jax, "np": np}
    finder = doctest.DocTestFinder(recurse=False)
    (found,) = finder.find(getattr(ipwd_jax, name), name, module=False, globs=seen)
    assert found.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(found).failed == 0

"""The golden values: numbers of the public PyTorch implementations, and the recipe behind them.

They lie in `tests/golden`, or in the folder that the environment variable IPWD_GOLDEN names.
"""

import functools
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_OWN = Path(__file__).parent / "golden"


def golden_dir() -> Path:
    """The folder that the golden values are read from."""
    return Path(os.environ.get("IPWD_GOLDEN", _OWN))


@functools.cache
def golden_json(name: str) -> dict[str, Any]:
    """The contents of `name`, a JSON file of that folder."""
    return json.loads((golden_dir() / name).read_text())


@functools.cache
def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of `name`, an npz file of that folder."""
    with np.load(golden_dir() / name) as file:
        return dict(file)


@functools.cache
def recipe() -> ModuleType:
    """`recipe.py` of that folder (ours where it has none): regenerates the inputs from names."""
    path = golden_dir() / "recipe.py"
    spec = importlib.util.spec_from_file_location(
        "golden_recipe", path if path.exists() else _OWN / path.name
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def teacher_folder(runs: Path, network: str, data: str = "*") -> Path:
    """The one folder beside the students in `runs` in which their teacher was trained."""
    (found,) = runs.glob(f"{data}_{network}_*_seed0")
    return found

"""Only `losses/` names terms and weightings, and only `models/` names networks.

So a new one needs a class and a line in a registry, but no change to a list elsewhere. The tests
look at strings, attributes and imports; docstrings and comments can use any name.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipwd_jax import losses, models

PACKAGE = Path(losses.__file__).parents[1]
TERMS, WEIGHTINGS, NETWORKS = (set(x) for x in (losses.TERMS, losses.WEIGHTINGS, models.NETWORKS))

# File -> name -> why the file is allowed to use it.
ALLOWED = {
    "config.py": {
        "ce": "the default loss, also of a teacher",
        "kd": "the default of weighting.terms",
        "uniform": "the default of weighting.name",
        "resnet8x4": "the default of model.name",
        "MobileNetV2": "a family with a learning rate of its own in the recipe",
        "ShuffleV1": "another such family",
        "ShuffleV2": "another such family",
    },
    "validate.py": {
        "ce": "an example in a message",
        "uniform": "the default, which a message advises",
    },
    "losses/__main__.py": {
        "resnet32x4": "the teacher that the table describes by default",
        "resnet8x4": "the student that the table describes by default",
    },
    "report/methods.py": {
        "ce": "with kd alone: plain knowledge distillation, the baseline of every comparison",
        "kd": "likewise",
        "uniform": "likewise",
    },
    "models/base.py": {"uniform": "a distribution of JAX's initialisers"},
    "data/operations.py": {"uniform": "a distribution of jax.random"},
    "data/mixing.py": {"uniform": "a distribution of jax.random"},
}
# Paths of settings within strings: `loss.NAME`, `weighting.name=NAME`, `--{where}.NAME=1`.
IN_STRINGS = [
    re.compile(pattern) for pattern in (r"(?:loss|terms)\.(\w+)", r"name=(\w+)", r"\.(\w+)=")
]


def strings(tree: ast.Module) -> Iterator[str]:
    """Yield the string literals of a module that are not docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_string and id(node) not in docstrings:
            yield node.value


def names_of(tree: ast.Module, names: set[str]) -> set[str]:
    """Return the `names` that a module has as a string, in the path of a setting, or in code."""
    found = set()
    for text in strings(tree):
        found |= {text, *(x for pattern in IN_STRINGS for x in pattern.findall(text))} & names
    # `array.at[index]` is JAX's own.
    subscripted = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_jax = node.attr == "at" and id(node) in subscripted
            found |= set() if is_jax else {node.attr} & names
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ipwd_jax.losses"):
            found |= {*node.module.split("."), *(alias.name for alias in node.names)} & names
    return found


def parsed(*without: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield the path and the tree of every module of the package outside the given folders."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(tuple(f"{folder}/" for folder in without)):
            yield name, ast.parse(path.read_text())


@pytest.mark.parametrize(
    ("names", "home"),
    [(TERMS | WEIGHTINGS, "losses"), (NETWORKS, "models")],
    ids=["losses", "networks"],
)
def test_names_stand_where_they_are_registered(names, home):
    found = {
        path: sorted(here)
        for path, tree in parsed(home)
        if (here := names_of(tree, names) - set(ALLOWED.get(path, {})))
    }
    assert not found


def test_what_is_allowed_is_there():
    for path, names in ALLOWED.items():
        assert names_of(ast.parse((PACKAGE / path).read_text()), set(names)) == set(names), path


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("'''crd'''", set()),
        ("# crd\nx = 'crd of Tian'", set()),
        ("x = 'crd'", {"crd"}),
        ("x = config.terms.crd", {"crd"}),
        ("x = 'terms.crd.momentum'", {"crd"}),
        ("print(f'--config.{where}.crd=1')", {"crd"}),
        ("x = 'config.weighting.name=ipwd needs'", {"ipwd"}),
        ("from ipwd_jax.losses.crd import CRD", {"crd"}),
        ("from ipwd_jax.losses import crd", {"crd"}),
        ("x = memory.at[index].set(1)", set()),
        ("if name == 'resnet20': pass", {"resnet20"}),
    ],
)
def test_what_counts(source, found):
    assert names_of(ast.parse(source), TERMS | WEIGHTINGS | NETWORKS) == found

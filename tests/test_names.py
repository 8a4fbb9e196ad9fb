"""Names of terms and weightings stand in `losses/` alone, those of networks in `models/` alone.

So that a new one is a class and a line of a registry, and no list elsewhere has to be kept. What
counts are strings, attributes and imports; docstrings and comments may name what they like.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipwd_jax import losses, models

PACKAGE = Path(losses.__file__).parents[1]
TERMS, WEIGHTINGS, NETWORKS = (set(x) for x in (losses.TERMS, losses.WEIGHTINGS, models.NETWORKS))

# File -> name -> why it stands there.
ALLOWED = {
    "config.py": {
        "ce": "the default loss, and a teacher's",
        "kd": "the default of weighting.terms",
        "uniform": "the default of weighting.name",
        "resnet8x4": "the default of model.name",
        "MobileNetV2": "a family with a learning rate of its own in the recipe",
        "ShuffleV1": "likewise",
        "ShuffleV2": "likewise",
    },
    "validate.py": {
        "ce": "an example in a message",
        "uniform": "the advice of a message: the default",
    },
    "losses/__main__.py": {
        "resnet32x4": "the pair that the table describes by default",
        "resnet8x4": "likewise",
    },
    "models/base.py": {"uniform": "a distribution of JAX, of initialisers"},
}
# Paths of settings in strings: `loss.NAME`, `weighting.name=NAME`, `--{where}.NAME=1`.
IN_STRINGS = [
    re.compile(pattern) for pattern in (r"(?:loss|terms)\.(\w+)", r"name=(\w+)", r"\.(\w+)=")
]


def strings(tree: ast.Module) -> Iterator[str]:
    """The string literals of a module that are no docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_string and id(node) not in docstrings:
            yield node.value


def names_of(tree: ast.Module, names: set[str]) -> set[str]:
    """Which of `names` a module has as a string, within a path of a setting, or as an attribute."""
    found = set()
    for text in strings(tree):
        found |= {text, *(x for pattern in IN_STRINGS for x in pattern.findall(text))} & names
    # JAX's own `array.at[index]`.
    subscripted = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_jax = node.attr == "at" and id(node) in subscripted
            found |= set() if is_jax else {node.attr} & names
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ipwd_jax.losses"):
            found |= {*node.module.split("."), *(alias.name for alias in node.names)} & names
    return found


def parsed(*without: str) -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package, by path, but for those in some folders."""
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

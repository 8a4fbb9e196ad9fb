"""The notebooks in `colabs/`: what they store, what they name, and that they run."""

import ast
import functools
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import ROOT

COLABS = ROOT / "colabs"
NAMES = ("quickstart", "transfer_gap", "your_own")


def notebook(name: str) -> dict[str, Any]:
    """Return the content of a notebook."""
    return json.loads((COLABS / f"{name}.ipynb").read_text())


def sources(name: str, kind: str) -> list[str]:
    """Return the text of each cell of one kind, "code" or "markdown"."""
    cells = notebook(name)["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def python(name: str) -> str:
    """Return the code of a notebook, with `pass` in place of IPython's magic commands."""
    return re.sub(r"^( *)%.*$", r"\1pass", "\n".join(sources(name, "code")), flags=re.MULTILINE)


def attribute(of: Any, name: str) -> Any:
    """Return an attribute, or a module that is imported first; AttributeError if there is none."""
    if isinstance(of, ModuleType) and not hasattr(of, name):
        try:
            return importlib.import_module(f"{of.__name__}.{name}")
        except ModuleNotFoundError:
            raise AttributeError(f"{of.__name__} has no {name}") from None
    return getattr(of, name)


def imported(tree: ast.AST) -> dict[str, Any]:
    """Return what a program imports from `ipwd_jax`, by the names that it gives them."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ipwd_jax"):
            module = importlib.import_module(node.module)
            found |= {n.asname or n.name: attribute(module, n.name) for n in node.names}
        elif isinstance(node, ast.Import):
            ours = (n for n in node.names if n.name.startswith("ipwd_jax"))
            found |= {n.asname or n.name: importlib.import_module(n.name) for n in ours}
    return found


def chains(tree: ast.AST) -> Iterator[list[str]]:
    """Yield the parts of each dotted name, as ["ipwd_jax", "losses", "TERMS"]."""
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            yield [node.id, *parts]


def test_every_notebook_is_tested():
    assert sorted(path.stem for path in COLABS.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_stores_no_outputs(name):
    content = notebook(name)
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in content["cells"]:
        assert "".join(cell["source"]).strip()
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("name", NAMES)
def test_conforms_to_the_format(name):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(nbformat.read(COLABS / f"{name}.ipynb", as_version=4))


@pytest.mark.parametrize("name", NAMES)
def test_names_only_what_the_package_has(name):
    tree = ast.parse(python(name))
    found = imported(tree)
    assert "ipwd_jax" in found
    for first, *rest in chains(tree):
        if isinstance(found.get(first), ModuleType):
            functools.reduce(attribute, rest, found[first])  # raises AttributeError


def test_a_name_that_the_package_lacks_is_noticed():
    with pytest.raises(AttributeError, match="no_such"):
        imported(ast.parse("from ipwd_jax import no_such"))
    found = imported(ast.parse("from ipwd_jax import losses"))
    with pytest.raises(AttributeError, match="NO_SUCH"):
        functools.reduce(attribute, ["NO_SUCH"], found["losses"])


@pytest.mark.parametrize("name", NAMES)
def test_names_only_files_that_exist(name):
    text = "\n".join([*sources(name, "code"), *sources(name, "markdown")])
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    quoted = re.findall(r"\"(\.\./[\w/.]+\.py)", text)
    code = re.findall(r"`((?:configs|examples|ipwd_jax)/[\w/.]*)`", text)
    beside = re.findall(r"`(\w+\.ipynb)`", text)
    assert links or quoted or code
    missing = [path for path in (*links, *quoted, *beside) if not (COLABS / path).exists()]
    assert missing + [path for path in code if not (ROOT / path).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_from_top_to_bottom(name, monkeypatch):
    for needed in ("nbclient", "ipykernel", "matplotlib"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    import nbformat
    from nbclient import NotebookClient

    # Unlike other tests, these train long enough for XLA's optimisations to pay.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    before = files_below(COLABS)
    run = nbformat.read(COLABS / f"{name}.ipynb", as_version=4)
    NotebookClient(
        run, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(COLABS)}}
    ).execute()
    outputs = [output for cell in run.cells for output in cell.get("outputs", [])]
    shown = "".join(str(output.get("text", "")) + str(output.get("data", "")) for output in outputs)
    assert "WARNING:absl" not in shown and "np.float" not in shown
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert files_below(COLABS) == before


def files_below(folder: Path) -> set[Path]:
    """Return all files and folders below a folder."""
    return set(folder.rglob("*"))

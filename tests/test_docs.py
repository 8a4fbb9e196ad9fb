"""The documentation is true where a program can tell: options, recipes, commands, tables, links."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import config_file

from ipwd_jax import data, load_config, losses, models, sweep
from ipwd_jax.config import default, flat
from ipwd_jax.models.__main__ import describe
from ipwd_jax.report import published

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {page.stem: page.read_text() for page in sorted((DOCS / "methods").glob("*.md"))}
SECTIONS = ["Formula", "Source", "Options", "Run", "Verified", "Published numbers", "IPWD"]
DEFAULTS = flat(default())
OF_TESTS = {"tiny_net", "squares"}  # what other test files add to the registries
# Config file -> its methods.
METHODS = {}
for path in sorted((ROOT / "configs").glob("*.py")):
    of_file = vars(config_file(path.stem))
    METHODS[path.stem] = of_file.get("METHODS") or of_file.get("LOSSES", ())

# Heads of columns of published numbers -> method; of all others, the page has the method's name.
_METHODS = {"teacher": "teacher", "student alone": "ce", "KD": "kd", "IPWD*": "ipwd_star"}
_METHODS |= {"IPWD-dagger": "ipwd_dagger", "ReviewKD + IPWD": "reviewkd_ipwd", "WTTM": "wttm"}
_METHODS |= {"KD + LS": "kd_ls", "DKD + LS": "dkd_ls", "CTKD + LS": "ctkd_ls"}
_METHODS |= {"MLKD + LS": "mlkd_ls"}
_METHODS |= {"SD-KD": "sdd_kd", "SD-NKD": "sdd_nkd", "WKD-L": "wkd_l", "WKD-F": "wkd_f"}

of_all_pages = pytest.mark.parametrize("page", PAGES)


def rows(text, first):
    """Return the cells of the table rows whose first cell is code that starts with `first`."""
    lines = (line for line in text.splitlines() if line.startswith(f"| `{first}"))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def code(cell):
    return re.fullmatch("`([^`]+)`", cell)[1]


def value(text):
    """Return a Python literal, or the text itself if it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def settings(page):
    """Return setting -> default from the page's table of options."""
    table = rows(PAGES[page], "config.")
    return {code(row[0]).removeprefix("config."): value(code(row[1])) for row in table}


def options(page):
    """Return term -> option -> default, of all terms that the page describes."""
    found = {name: {} for name in re.findall(r"The term `(\w+)` has no options", PAGES[page])}
    for path, stated in settings(page).items():
        if path.startswith("terms."):
            _, term, option = path.split(".")
            found.setdefault(term, {})[option] = stated
    return found


def recipes(page):
    """Return (config with its argument, loss weights, further settings) of each recipe."""
    found = []
    for recipe, weights, further in rows(PAGES[page], "configs/"):
        path, _, method = code(recipe).partition(":")
        _, *networks = argument(path).split(",")
        name = f"{path}:{','.join([method, *networks])}" if method else path
        stated = {term: float(weight) for term, weight in re.findall(r"`(\w+)` ([^,]+)", weights)}
        found.append((name, stated, dict(re.findall(r"`([\w.]+)` = `([^`]+)`", further))))
    return found


def argument(path):
    """Return the default argument of a config file, `METHOD,TEACHER,STUDENT` or the like."""
    return inspect.signature(config_file(Path(path).stem).get_config).parameters["arg"].default


@of_all_pages
def test_sections(page):
    assert re.findall("^## (.*)$", PAGES[page], re.MULTILINE) == SECTIONS


@of_all_pages
def test_options_are_those_of_the_terms(page):
    for term, stated in options(page).items():
        assert stated == losses.hyper_parameters(term)
    for path, stated in settings(page).items():
        assert stated == DEFAULTS[path]


def test_the_table_of_modules_is_complete():
    table = re.findall(r"^\| (`.*?) \|", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    named = [name for row in table for name in re.findall(r"`(\w+)`", row)]
    modules = {path.stem for path in (ROOT / "ipwd_jax").iterdir() if path.suffix in ("", ".py")}
    assert sorted(named) == sorted(modules - {"__init__", "__main__", "__pycache__", "py"})


def test_every_term_and_every_setting_of_the_weightings_has_a_page():
    assert {term for page in PAGES for term in options(page)} == set(losses.TERMS)
    weighting = {path for path in DEFAULTS if path.startswith("weighting.")}
    assert weighting <= set(settings("ipwd"))


@of_all_pages
def test_recipes_are_those_of_the_configs(page):
    assert recipes(page)
    for name, weights, further in recipes(page):
        config = load_config(ROOT / name)
        assert weights == {term: weight for term, weight in config.loss.items() if weight}, name
        for path, stated in further.items():
            assert flat(config)[path] == value(stated), f"{name}: {path}"


@pytest.mark.parametrize("config", [name for name in METHODS if METHODS[name]])
def test_every_method_has_a_page(config):
    stated = {name.split(",")[0] for page in PAGES for name, *_ in recipes(page)}
    methods = {f"configs/{config}.py:{method}" for method in METHODS[config]}
    assert methods <= stated


@of_all_pages
def test_commands_have_a_config(page):
    commands = re.findall(r"--config=(\S+)", PAGES[page])
    assert commands
    for config in commands:
        load_config(ROOT / config)


def test_every_page_is_in_the_navigation_and_every_method_in_the_index():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    navigation = re.findall(r"[\w/]+\.md", str(site["nav"]))
    assert sorted(navigation) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))
    linked = re.findall(r"\]\(methods/(\w+)\.md\)", (DOCS / "methods.md").read_text())
    assert set(linked) == set(PAGES)


def networks():
    """Return network -> its row in the tables of networks."""
    text = (DOCS / "networks.md").read_text()
    return {code(row[0]): row for name in models.NETWORKS for row in rows(text, f"{name}`")}


QUICK = {"resnet8", "wrn_16_1", "vgg8"}


def test_every_network_has_its_size():
    assert set(networks()) == set(models.NETWORKS) - OF_TESTS


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in networks()]
)
def test_sizes_of_networks(name):
    left, width = describe(name).split(" | ")
    _, parameters, millions, _, *taps = left.split()
    shown = "\N{NO-BREAK SPACE}".join(taps).replace("x", "\N{MULTIPLICATION SIGN}")
    assert networks()[name][1:] == [parameters, millions, shown, width]


def test_every_data_source_and_its_settings_are_described():
    text = (DOCS / "data.md").read_text()
    assert all(f"`{name}`" in text for name in set(data.SOURCES) - OF_TESTS)
    for setting, stated, read_by in rows(text, "config.data."):
        path = code(setting).removeprefix("config.")
        assert value(code(stated)) == DEFAULTS[path]
        used_by = data.USED_BY.get(path.removeprefix("data."), ("all",))
        assert all((name if name != "streaming" else "streamed") in read_by for name in used_by)
    described = {code(row[0]).rpartition(".")[2] for row in rows(text, "config.data.")}
    assert set(data.USED_BY) <= described


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))],
    ids=lambda page: page.name,
)
def test_commands_settings_and_links_of_a_page(page):
    text = page.read_text()
    for file in re.findall(r"--config=((?:configs|examples)/[^\s`'\")]+)", text):
        if "/sweeps/" in file:
            assert sweep.load_runs(str(ROOT / file)), file
        elif not re.search(r":.*(PATH|METHOD|photos)", file):  # what is to be replaced
            assert load_config(ROOT / file), file
    for setting in re.findall(r"--config\.([a-z_]\w*(?:\.\w+)*)", text):
        # CONTRIBUTING adds the term `distance`.
        added = setting.startswith(("loss.distance", "terms.distance"))
        assert setting in DEFAULTS or added, setting
    for link in re.findall(r"\]\(([^)#]+)|src=\"([^\"]+)", text):
        if "://" not in "".join(link):
            assert (page.parent / "".join(link)).exists(), link


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    if not all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings"))):
        pytest.skip("needs the documentation tools: pip install 'ipwd_jax[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {str(p.relative_to(tmp_path).with_suffix(".md")) for p in tmp_path.rglob("*.html")}
    assert {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} <= pages
    for page in tmp_path.rglob("*.html"):
        assert not re.search(r'<(?:script|img|link)[^>]*(?:src|href)="https?:', page.read_text())


def test_published_numbers_are_those_of_the_report():
    """Each number of the tables of CIFAR-100's pairs is the same in both places."""
    known = {(m, pair): x for m, e in published.of_data("cifar100").items()
             for pair, x in e["top1"].items()}  # fmt: skip
    seen = set()
    for page, text in PAGES.items():
        head = re.search(r"^\| teacher → student \|(.+)\|$", text, re.M)
        methods = [_METHODS.get(c.strip(), page) for c in head[1].split("|")] if head else []
        for pair, cells in re.findall(r"^\| (\w+ → \w+) \|(.+)\|$", text, re.M):
            for method, cell in zip(methods, cells.split("|"), strict=True):
                if re.fullmatch(r"\d+\.\d\d", cell.strip()):
                    assert known[method, pair] == float(cell), (page, method, pair)
                    seen.add((method, pair))
    assert seen == set(known)

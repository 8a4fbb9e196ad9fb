"""Changes to the folders of runs that are reported, for the tests of several modules."""

import csv
import json
import shutil


def changed(folder, name, **changes):
    """Changes values of a JSON file of a run, with `__` for the dots in their paths."""
    content = json.loads((folder / name).read_text())
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = content
        for parent in parents:
            section = section[parent]
        section[key] = value
    (folder / name).write_text(json.dumps(content))


def another_seed(runs, method, seed, top1):
    """A run of the method that differs from its first in seed and accuracy alone."""
    folder = shutil.copytree(runs / f"{method}_seed0", runs / f"{method}_seed{seed}")
    changed(folder, "config.json", config__seed=seed)
    changed(folder, "result.json", seed=seed, last__top1=top1, best__top1=top1 + 1)
    return folder


def results(path):
    with path.open() as file:
        return {(row["method"], row["epoch"]): row for row in csv.DictReader(file)}

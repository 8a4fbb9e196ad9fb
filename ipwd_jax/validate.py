"""Check a config before anything else happens.

The tables list the values that each setting can have, and the functions below them check what
several settings must agree on. A pattern in a table matches the whole path of a setting, and its
`*` matches any part of a path.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import limits, losses, models, no_effect, optim
from ipwd_jax.data.base import Dataset
from ipwd_jax.errors import UserError, unknown_name, warn
from ipwd_jax.models.heads import SOURCES as HEAD_SOURCES
from ipwd_jax.precision import PRECISIONS


class _Range(NamedTuple):
    """The words that follow "must" in a message, and the condition that they express."""

    words: str
    holds: Callable[[float], bool]


_AT_LEAST_1 = _Range("be at least 1", lambda x: x >= 1)
_POSITIVE = _Range("be positive", lambda x: x > 0)
_NOT_NEGATIVE = _Range("not be negative", lambda x: x >= 0)
_SHARE = _Range("be in [0, 1]", lambda x: 0 <= x <= 1)
_SHARE_BELOW_1 = _Range("be in [0, 1)", lambda x: 0 <= x < 1)
_SHARE_ABOVE_0 = _Range("be in (0, 1]", lambda x: 0 < x <= 1)
# `jax.random.key` uses 32 bits of a seed, so larger seeds would repeat the runs of smaller ones.
_SEED = _Range(f"be in 0 to {2**32 - 1}", lambda x: 0 <= x < 2**32)

# Ranges of numbers, and of each number in a tuple. Hyper-parameters of terms are matched by the
# names of their fields.
_RANGES = {
    "*seed": _SEED,
    "seeds": _SEED,
    "data.threads": _NOT_NEGATIVE,
    "data.image_size": _NOT_NEGATIVE,
    "data.long_tail": _NOT_NEGATIVE,
    "data.validation_fraction": _Range("be in 0 to 0.5", lambda x: 0 <= x <= 0.5),
    "data.crop_padding": _NOT_NEGATIVE,
    "data.mean": _Range("be in [0, 1], like the pixels", lambda x: 0 <= x <= 1),
    "data.std": _Range("be in (0, 1], like the pixels", lambda x: 0 < x <= 1),
    "data.rand_augment": _NOT_NEGATIVE,
    "data.rand_magnitude": _Range("be in 0 to 30", lambda x: 0 <= x <= 30),
    "data.mixup": _NOT_NEGATIVE,
    "data.cutmix": _NOT_NEGATIVE,
    "epochs": _AT_LEAST_1,
    "patience": _NOT_NEGATIVE,
    "teacher.epochs": _AT_LEAST_1,
    "first_stage.epochs": _NOT_NEGATIVE,
    "*batch_size": _AT_LEAST_1,
    "teacher.look_ahead": _NOT_NEGATIVE,
    "steps_per_call": _NOT_NEGATIVE,
    "eval_every_epochs": _AT_LEAST_1,
    "log_every_steps": _AT_LEAST_1,
    "checkpoint.keep": _AT_LEAST_1,
    "checkpoint.every_seconds": _NOT_NEGATIVE,
    "*optimizer.learning_rate": _POSITIVE,
    "*optimizer.momentum": _SHARE_BELOW_1,
    "*optimizer.b1": _SHARE_BELOW_1,
    "*optimizer.b2": _SHARE_BELOW_1,
    "*optimizer.eps": _POSITIVE,
    "*optimizer.weight_decay": _NOT_NEGATIVE,
    "*optimizer.milestones": _NOT_NEGATIVE,
    "*optimizer.decay": _SHARE_ABOVE_0,
    "loss.*": _NOT_NEGATIVE,
    "first_stage.loss.*": _NOT_NEGATIVE,
    "weighting.start_epoch": _NOT_NEGATIVE,
    "weighting.constant": _NOT_NEGATIVE,
    "weighting.clip": _NOT_NEGATIVE,
    "weighting.average": _SHARE_BELOW_1,
    "*.label_smoothing": _SHARE,
    "terms.*.temperature": _POSITIVE,
    "terms.*_temperature": _POSITIVE,
    "terms.*.momentum": _SHARE,
    "terms.*_share": _SHARE,
    "terms.*_threshold": _SHARE,
    "terms.*_weight": _NOT_NEGATIVE,
    "terms.*_dim": _AT_LEAST_1,
    "terms.*_channels": _AT_LEAST_1,
    "terms.*.negatives": _AT_LEAST_1,
    "terms.*.warmup": _NOT_NEGATIVE,
    "terms.*.gamma": _NOT_NEGATIVE,
    "terms.*.mu": _NOT_NEGATIVE,
    "terms.*.temperature_range": _POSITIVE,
    "terms.*.margin": _POSITIVE,
    "terms.*.variance": _POSITIVE,
    "terms.*.rate": _POSITIVE,
    "terms.*.resolution": _AT_LEAST_1,
    "terms.*.scales": _AT_LEAST_1,
    "terms.*.grid": _AT_LEAST_1,
    "terms.*.factor": _AT_LEAST_1,
    "terms.*.iterations": _AT_LEAST_1,
    "terms.*.regularization": _POSITIVE,
    "terms.*.decay_from": _NOT_NEGATIVE,
    "terms.*.first_epoch": _Range("be 0 or 1", lambda x: x in (0, 1)),
}
_CHOICES = {
    "precision": PRECISIONS,
    "*optimizer.name": optim.OPTIMIZERS,
    "*optimizer.schedule": config_lib.SCHEDULES,
    "teacher.which": ("last", "best"),
    "teacher.view_cache": config_lib.VIEW_CACHES,
}
# Types of the elements of tuples.
_ELEMENTS = {
    "seeds": int,
    "data.mean": float,
    "data.std": float,
    "*trainable": str,
    "*optimizer.milestones": int,
    "weighting.terms": str,
}
# Types of settings: the class that a value must belong to, and its names in messages, for a single
# value and for the elements of a tuple.
_KINDS = {
    bool: (bool, "True or False", ""),
    int: (Integral, "a whole number", "whole numbers"),
    float: (Real, "a number", "numbers"),
    str: (str, "a string", "strings"),
}


def validate(config: ConfigDict) -> None:
    """Refuse a config that is wrong regardless of the data.

    Settings that are allowed but have no effect are named in warnings on standard error.

    Raises:
        UserError: a name, a type or a value is wrong, or settings contradict each other.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(f"the config must be one that load_config returns; found {config!r}")
    reference, given = config_lib.default(), config_lib.flat(config)
    defaults = config_lib.flat(reference)
    for path, value in given.items():
        if path not in defaults:
            raise _unknown(path, reference)
        _check_type(path, value, defaults[path])
        _check_value(path, value)
    optional = _younger(config)
    for path in defaults:
        of_term = path.startswith(("loss.", "first_stage.loss.", "terms."))
        if path not in given and not of_term and path not in optional:
            raise _missing(path)
    models.create(config.model.name, classes=1)
    if config.teacher.name:
        models.create(config.teacher.name, classes=1)
    _check_seeds(config)
    for section in ("optimizer", "first_stage.optimizer", "teacher.optimizer"):
        _check_optimizer(section, given, defaults)
    if config.teacher.train_mode and (config.teacher.fold or config.teacher.look_ahead):
        raise UserError(
            "config.teacher.train_mode excludes fold and look_ahead, which need answers that do "
            "not depend on the batch; leave out either train_mode or these two"
        )
    for stage in config_lib.stages(config):
        _check_loss(config, stage)
    _check_heads(config)
    _check_weighting(config)
    for line in no_effect.warnings(config):
        warn(line)


def _of_pattern(table: Mapping[str, Any], path: str) -> Any:
    pattern = _pattern(tuple(table), path)
    return None if pattern is None else table[pattern]


@functools.cache  # a sweep validates hundreds of configs, which have the same paths
def _pattern(patterns: tuple[str, ...], path: str) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(path, pattern)), None)


def _younger(config: ConfigDict) -> set[str]:
    """Return the settings of other weightings, which a config that predates them may lack."""
    kind = losses.WEIGHTINGS.get(config.get("weighting", {}).get("name", ""))
    own = {field.name for field in dataclasses.fields(kind)} if kind else set()
    return {f"weighting.{name}" for name in losses.weighting.settings().keys() - own}


def _choices(path: str) -> Collection[str]:
    """Return the values that a setting can have if they can be listed; otherwise return none."""
    section, _, name = path.rpartition(".")
    if path == "weighting.name":
        return losses.WEIGHTINGS
    if section == "weighting":
        of_all = [kind.choices for kind in losses.WEIGHTINGS.values()]
        return next((choices[name] for choices in of_all if name in choices), ())
    if section.startswith("terms."):
        return losses.TERMS[section.removeprefix("terms.")].choices.get(name, ())
    return _of_pattern(_CHOICES, path) or ()


def _of_term(path: str) -> _Range | None:
    """Return the range that a loss term declares for one of its hyper-parameters."""
    section, _, name = path.rpartition(".")
    if not section.startswith("terms."):
        return None
    return _NOT_NEGATIVE if name in losses.TERMS[section[6:]].not_negative else None


def _unknown(path: str, reference: ConfigDict) -> UserError:
    parent, _, name = path.rpartition(".")
    if parent in ("loss", "first_stage.loss", "terms"):
        return unknown_name("loss term", name, losses.TERMS)
    return config_lib.unknown_key(path, reference)


def _missing(path: str) -> UserError:
    return UserError(
        f"config.{path} is missing; start from ipwd_jax.config.default(), and set single values as "
        "in --config.optimizer.learning_rate=0.1, because a dictionary replaces a whole section"
    )


def _check_type(path: str, value: Any, default: Any) -> None:
    """Raise `UserError` if a value does not have the type of the default."""
    if default is None:  # a number whose default is that of a library
        wanted, fits = "a number or None", value is None or _is_a(float, value)
    elif isinstance(default, ConfigDict):
        wanted, fits = "a section of settings", isinstance(value, ConfigDict)
    elif isinstance(default, tuple):
        element = _of_pattern(_ELEMENTS, path) or type(default[0])
        wanted = f"a tuple of {_KINDS[element][2]}"
        fits = isinstance(value, tuple | list) and all(_is_a(element, x) for x in value)
    else:
        wanted, fits = _KINDS[type(default)][1], _is_a(type(default), value)
    if not fits:
        raise UserError(f"config.{path} must be {wanted}, found {value!r}")


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, _KINDS[kind][0]) and (kind is bool or not isinstance(value, bool))


def _check_value(path: str, value: Any) -> None:
    """Raise `UserError` if a value is not finite, not in its range or not among its choices."""
    if (choices := _choices(path)) and value not in choices:
        raise unknown_name(f"config.{path}", value, choices)
    several = isinstance(value, tuple | list)
    for text in (x for x in (value if several else [value]) if isinstance(x, str)):
        limits.check_text(path, text)
    allowed = _of_pattern(_RANGES, path) or _of_term(path)
    for number in (x for x in (value if several else [value]) if _is_a(float, x)):
        found = f"found {number}{f' in {tuple(value)}' if several else ''}"
        if not limits.is_finite(number):
            raise UserError(f"config.{path} must be finite, {found}")
        if allowed and not allowed.holds(number):
            raise UserError(f"config.{path} must {allowed.words}, {found}")
        if allowed is not _SEED:
            limits.check_number(path, number, found)
    if path.endswith("milestones") and list(value) != sorted(set(value)):
        raise UserError(f"config.{path} must increase strictly, found {tuple(value)}")


def _check_optimizer(section: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise `UserError` if a setting was changed that the chosen optimiser does not have."""
    name = given[f"{section}.name"]
    for setting in optim.ARGUMENTS:
        path = f"{section}.{setting}"
        if setting not in optim.arguments(name) and given[path] != defaults[path]:
            raise UserError(
                f"config.{path} is {given[path]}, but {name} has no such setting; omit it, or "
                f"choose another config.{section}.name"
            )


def _check_seeds(config: ConfigDict) -> None:
    if len(set(config.seeds)) != len(config.seeds):
        raise UserError(f"config.seeds must not name a seed twice, found {tuple(config.seeds)}")
    if config.patience and len(config.seeds) > 1:
        raise UserError(
            "config.patience would stop each of config.seeds at another epoch, but they train in "
            "one program; train them one after the other, with config.seed"
        )
    if config.share_order and len(config.seeds) < 2:
        raise UserError("config.share_order needs several config.seeds")


def _heads(config: ConfigDict, loss: Mapping[str, float]) -> dict[str, str]:
    """Return the extra heads that the terms with a weight in `loss` train, and their sources."""
    terms = losses.create(loss, {name: config.terms.get(name, {}) for name in loss}, {})
    return {head: source for term in terms.values() for head, source in term.heads.items()}


def _check_heads(config: ConfigDict) -> None:
    """Raise `UserError` if the source of a head is unknown or differs between terms."""
    found: dict[str, tuple[str, str]] = {}
    for stage in config_lib.stages(config):
        for term in (name for name, weight in stage.loss.items() if weight):
            for head, source in _heads(config, {term: 1.0}).items():
                if source not in HEAD_SOURCES:
                    kind = f"source of the head {head!r} of {term}"
                    raise unknown_name(kind, source, HEAD_SOURCES)
                other, its = found.setdefault(head, (term, source))
                if its != source:
                    raise UserError(
                        f"the head {head!r} has the source {its!r} in the term {other} and "
                        f"{source!r} in {term}; choose one of them"
                    )


def _check_loss(config: ConfigDict, stage: ConfigDict) -> None:
    where = "config.loss" if stage.name == "main" else "config.first_stage.loss"
    active = [name for name, weight in stage.loss.items() if weight]
    if not active:
        raise UserError(f"{where} has no term with a weight; set, for example, --{where}.ce=1")
    for name in active:
        if name not in config.terms:
            raise _missing(f"terms.{name}")
        if losses.TERMS[name].teacher_taps and not config.teacher.name:
            raise UserError(
                f"{where}.{name} needs a teacher; set --config.teacher.name to a network"
            )


def _check_weighting(config: ConfigDict) -> None:
    weighting, kind = config.weighting, losses.weighting.create(config.weighting)
    for name in weighting.terms:
        if "," in name:
            raise UserError(
                f"config.weighting.terms must be a tuple of names, found {weighting.terms}; write "
                "\"--config.weighting.terms=('kd','at')\""
            )
        if name not in losses.TERMS:
            raise unknown_name("loss term in config.weighting.terms", name, losses.TERMS)
        if not losses.TERMS[name].per_sample and kind.weighs:
            raise UserError(
                f"config.weighting.terms names {name}, which compares samples with each other, so "
                "it has no per-sample loss to multiply; name other terms, or set "
                "--config.weighting.name=uniform"
            )
    if not kind.weighs:
        return
    if not any(config.loss.get(name, 0) for name in weighting.terms):
        raise UserError(
            f"config.weighting.name={weighting.name} multiplies the terms "
            f"{tuple(weighting.terms)}, none of which has a weight in config.loss; name others "
            "with --config.weighting.terms"
        )
    named = f"config.weighting.name={weighting.name}"
    if kind.teacher_taps and not config.teacher.name:
        raise UserError(f"{named} needs a teacher; set --config.teacher.name")
    for head, purpose in kind.heads().items():
        _check_compared(config, head, f"{named} {purpose}")


def _check_compared(config: ConfigDict, head: str, words: str) -> None:
    """Raise `UserError` if nothing trains a head whose losses determine the weights."""
    stages = config_lib.stages(config)
    if head not in _heads(config, stages[-1].loss):
        of_all = (name for name in losses.TERMS if head in _heads(config, {name: 1.0}))
        term = next(of_all, "NAME")
        raise UserError(f"{words}, which nothing trains; set, for example, --config.loss.{term}=1")
    if not any(_trains(config, stage, head) for stage in stages):
        raise UserError(
            f"{words}, which config.trainable={tuple(config.trainable)} leaves at its random "
            "initial values, so the weights would be noise; add 'heads' to config.trainable"
        )


def _trains(config: ConfigDict, stage: ConfigDict, head: str) -> bool:
    source = _heads(config, stage.loss).get(head)
    path = f"heads/{'network' if source == 'network' else head}/"
    prefixes = [f"{prefix.rstrip('/')}/" for prefix in stage.trainable]
    # A prefix inside the head trains a part of it, which is taken to be intended.
    fits = any(path.startswith(p) or p.startswith(path) for p in prefixes)
    return source is not None and (not prefixes or fits)


def check_fit(config: ConfigDict, dataset: Dataset) -> None:
    """Raise `UserError` if the images are too small for the networks or too few for a batch."""
    size, height, width, _ = dataset.train.images.shape
    for name in filter(None, (config.model.name, config.teacher.name)):
        models.check_input(name, height, width)
    batches = {"batch_size": config.batch_size}
    workdir = config.teacher.workdir
    there = (Path(workdir).expanduser() / "result.json").exists()
    finished = config.teacher.pretrained or (workdir and there)
    if config.teacher.name and not finished:
        batches["teacher.batch_size"] = config.teacher.batch_size
    for key, batch_size in batches.items():
        if batch_size > size:
            raise UserError(
                f"config.{key} is {batch_size}, but {dataset.name} has only {size} training "
                f"images; set it to {size} or less"
            )

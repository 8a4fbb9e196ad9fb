"""A wrong config is refused before anything else happens, with a message that says why."""

import itertools
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import validate
from ipwd_jax.errors import UserError

KD = {"loss.kd": 0.9, "teacher.name": "resnet20"}
IPWD = {**KD, "loss.cls": 1.0, "weighting.name": "ipwd"}
DAGGER = {**IPWD, "loss.kd_head": 0.9, "weighting.kd_source": "head"}
FIRST = {"first_stage.epochs": 5, "first_stage.optimizer.milestones": ()}


def changed(**changes) -> ConfigDict:
    """Return the default config with some values changed, without a check of their types."""
    config = config_lib.default()
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


def refusal(changes) -> str:
    with pytest.raises(UserError) as error:
        validate.validate(changed(**changes))
    return str(error.value)


def test_defaults_are_valid_and_say_nothing(capsys):
    for changes in ({}, KD, IPWD, DAGGER):
        validate.validate(changed(**changes))
    assert capsys.readouterr().err == ""


NAMES = [
    ({"model.name": "resnet33"}, ["network", "resnet33", "Did you mean 'resnet3"]),
    ({"model.name": "Resnet20"}, ["Did you mean 'resnet20'"]),
    ({"teacher.name": "wrn_17_2"}, ["wrn_17_2", "wrn_16_2"]),
    ({"weighting.name": "ipdw"}, ["weighting", "Did you mean 'ipwd'"]),
    ({"weighting.ratio": "C"}, ["weighting.ratio", "A, B"]),
    ({"weighting.kd_source": "heads"}, ["weighting.kd_source", "Did you mean 'head'"]),
    ({"weighting.terms": ("kdd",)}, ["kdd", "Did you mean 'kd'"]),
    ({"weighting.terms": ("kd,at",)}, ["must be a tuple of names", "=('kd','at')"]),
    ({"optimizer.schedule": "cosin"}, ["optimizer.schedule", "Did you mean 'cosine'"]),
    ({"first_stage.optimizer.schedule": "x"}, ["first_stage.optimizer.schedule"]),
    ({"teacher.which": "first"}, ["teacher.which", "best, last"]),
    ({"teacher.view_cache": "on"}, ["teacher.view_cache", "all, auto, drawn, off"]),
    ({"precision": "float16"}, ["config.precision", "bfloat16"]),
    ({"terms.cls.source": "backbones"}, ["terms.cls.source", "Did you mean 'backbone'"]),
    ({"terms.kd_head.source": "network"}, ["terms.kd_head.source", "Valid: backbone, detached."]),
]
RANGES = [
    ({"epochs": 0}, ["config.epochs", "at least 1", "0"]),
    ({"teacher.batch_size": 0}, ["config.teacher.batch_size"]),
    ({"checkpoint.keep": 0}, ["config.checkpoint.keep", "at least 1"]),
    ({"checkpoint.every_seconds": -1.0}, ["config.checkpoint.every_seconds", "negative"]),
    ({"data.crop_padding": -1}, ["data.crop_padding", "negative"]),
    ({"data.image_size": -1}, ["data.image_size", "negative"]),
    ({"data.std": (0.2, 0.0, 0.2)}, ["config.data.std", "(0, 1]", "0.0 in (0.2, 0.0, 0.2)"]),
    ({"data.mean": (127.5,)}, ["config.data.mean", "[0, 1]", "127.5"]),
    ({"optimizer.learning_rate": 0.0}, ["config.optimizer.learning_rate", "positive"]),
    ({"optimizer.weight_decay": -1e-4}, ["config.optimizer.weight_decay", "negative", "-0.0001"]),
    ({"optimizer.momentum": 1.0}, ["config.optimizer.momentum", "[0, 1)"]),
    ({"optimizer.name": "adamv"}, ["config.optimizer.name", "Did you mean 'adam"]),
    ({"optimizer.b1": 0.8}, ["config.optimizer.b1 is 0.8", "sgd has no such setting"]),
    ({"teacher.optimizer.name": "lion", "teacher.optimizer.momentum": 0.8}, ["lion has no such"]),
    ({"optimizer.name": "adamw", "optimizer.b2": 1.0}, ["config.optimizer.b2", "[0, 1)"]),
    ({"optimizer.name": "adamw", "optimizer.eps": 0.0}, ["config.optimizer.eps", "positive"]),
    ({"optimizer.decay": 0.0}, ["config.optimizer.decay", "(0, 1]", "0.0"]),
    ({"teacher.optimizer.decay": 1.5}, ["config.teacher.optimizer.decay", "1.5"]),
    ({"optimizer.milestones": (180, 150)}, ["milestones", "increase strictly", "(180, 150)"]),
    ({"optimizer.milestones": (150, 150)}, ["milestones", "increase strictly"]),
    ({"optimizer.milestones": (-1, 150)}, ["config.optimizer.milestones", "negative"]),
    ({"first_stage.optimizer.milestones": (-1,)}, ["config.first_stage.optimizer.milestones"]),
    ({"teacher.label_smoothing": 1.1}, ["config.teacher.label_smoothing", "[0, 1]", "1.1"]),
    ({"terms.ce.label_smoothing": -0.1}, ["config.terms.ce.label_smoothing", "[0, 1]"]),
    ({"loss.ce": -1.0}, ["config.loss.ce", "negative", "-1.0"]),
    ({"first_stage.loss.kd": -1.0}, ["config.first_stage.loss.kd", "negative"]),
    ({"weighting.average": 1.0}, ["weighting.average", "1.0"]),
    ({"weighting.start_epoch": -1}, ["config.weighting.start_epoch", "negative"]),
    ({"weighting.constant": -1.0}, ["config.weighting.constant", "negative"]),
    ({"seed": -1}, ["config.seed ", "-1"]),
    ({"seed": 2**32}, ["config.seed ", "4294967296", "0 to 4294967295"]),
    ({"teacher.seed": 2**32}, ["config.teacher.seed", "4294967296"]),
    ({"seeds": (0, -1)}, ["config.seeds", "-1 in (0, -1)"]),
    ({"seeds": (0, 2**32)}, ["config.seeds", "4294967296"]),
    ({"seeds": (1, 1)}, ["config.seeds", "twice", "(1, 1)"]),
]
RANGES += [
    ({f"terms.{path}": value}, [f"config.terms.{path} must be positive", str(value)])
    for path in (
        "kd.temperature",
        "kd_head.temperature",
        "crd.temperature",
        "kd_la.prior_temperature",
        "sskd.transform_temperature",
        "sskd.similarity_temperature",
    )
    for value in (0.0, -4.0)
]
RANGES += [
    ({f"terms.{path}": value}, [f"config.terms.{path} must", str(value)])
    for path, value in (
        ("crd.feat_dim", 0),
        ("crd.negatives", 0),
        ("crd.momentum", 1.5),
        ("reviewkd.mid_channels", 0),
        ("reviewkd.warmup", -1),
        ("reviewkd.first_epoch", -30),
        ("dkd.alpha", -8.0),
        ("sdd.beta", -8.0),
        ("wkd_f.mean_ratio", -1.0),
        ("wkd_l.sharpen", -1.0),
        ("rkd.angle_weight", -1.0),
        ("sskd.similarity_share", 1.5),
        ("pskd.last_share", -0.5),
        ("vid.variance", 0.0),
        ("ft.rate", 0.0),
        ("ab.margin", 0.0),
    )
]
TYPES = [
    ({"epochs": 2.5}, ["config.epochs must be a whole number, found 2.5"]),
    ({"epochs": "3"}, ["config.epochs must be a whole number, found '3'"]),
    ({"epochs": True}, ["config.epochs", "True"]),
    ({"batch_size": None}, ["config.batch_size", "None"]),
    ({"seed": 0.5}, ["config.seed ", "0.5"]),
    ({"share_order": 1}, ["config.share_order must be True or False, found 1"]),
    ({"optimizer.learning_rate": "0.1"}, ["config.optimizer.learning_rate", "a number", "'0.1'"]),
    ({"optimizer.nesterov": "no"}, ["config.optimizer.nesterov", "True or False"]),
    ({"name": 3}, ["config.name must be a string, found 3"]),
    ({"weighting.name": None}, ["config.weighting.name", "None"]),
    ({"optimizer": 0.1}, ["config.optimizer must be a section"]),
    ({"seeds": 3}, ["config.seeds must be a tuple of whole numbers, found 3"]),
    ({"seeds": (0.5, 1)}, ["config.seeds must be a tuple of whole numbers, found (0.5, 1)"]),
    ({"seeds": "01"}, ["config.seeds", "'01'"]),
    ({"optimizer.milestones": ("abc",)}, ["config.optimizer.milestones", "('abc',)"]),
    ({"optimizer.milestones": (1.5,)}, ["config.optimizer.milestones", "(1.5,)"]),
    ({"teacher.optimizer.milestones": (1.5,)}, ["config.teacher.optimizer.milestones"]),
    ({"first_stage.optimizer.milestones": "abc"}, ["config.first_stage.optimizer.milestones"]),
    ({"weighting.terms": "kd"}, ["config.weighting.terms must be a tuple of strings, found 'kd'"]),
    ({"weighting.terms": (1,)}, ["config.weighting.terms", "(1,)"]),
    ({"trainable": "heads"}, ["config.trainable must be a tuple of strings, found 'heads'"]),
    ({"first_stage.trainable": "heads"}, ["config.first_stage.trainable"]),
    ({"data.mean": "0.5"}, ["config.data.mean must be a tuple of numbers, found '0.5'"]),
    ({"data.std": ("0.5",)}, ["config.data.std must be a tuple of numbers, found ('0.5',)"]),
]
TOGETHER = [
    ({"loss.kd": 1.0}, ["config.loss.kd needs a teacher", "--config.teacher.name"]),
    ({"loss.ce": 0.0}, ["no term"]),
    ({**IPWD, "loss.cls": 0.0}, ["--config.loss.cls=1"]),
    ({**DAGGER, "loss.kd_head": 0.0}, ["weighting.kd_source=head", "--config.loss.kd_head"]),
    ({**IPWD, "loss.kd": 0.0}, ["weighting.terms"]),
    ({"weighting.name": "wsld", "weighting.terms": ("ce",)}, ["wsld needs a teacher"]),
    ({**KD, "teacher.train_mode": True, "teacher.fold": True}, ["excludes fold"]),
    ({"share_order": True}, ["config.share_order needs several config.seeds"]),
]
UNTRAINED = [
    ({**IPWD, "trainable": ("student",)}, "config.trainable"),
    ({**IPWD, "trainable": ("student/fc", "heads/clss", "head")}, "config.trainable"),
    ({**IPWD, "trainable": ("student", "heads/kd")}, "config.trainable"),
    ({**DAGGER, "trainable": ("student", "heads/cls")}, "kd_source=head"),
    ({**IPWD, "terms.cls.source": "network", "trainable": ("heads/cls",)}, "config.trainable"),
    ({**IPWD, **FIRST, "first_stage.loss.ce": 1.0, "trainable": ("student",)}, "config.trainable"),
]


@pytest.mark.parametrize(("changes", "words"), [*NAMES, *RANGES, *TYPES, *TOGETHER])
def test_wrong_values(changes, words):
    message = refusal(changes)
    for word in words:
        assert word in message


def test_every_float_must_be_finite():
    defaults = config_lib.flat(config_lib.default())
    paths = [path for path, value in defaults.items() if isinstance(value, float)]
    assert {"optimizer.learning_rate", "checkpoint.every_seconds", "loss.at"} < set(paths)
    values = itertools.cycle([math.nan, math.inf, -math.inf])
    for path, value in zip([*paths, "data.mean", "data.std"], values, strict=False):
        message = refusal({path: (0.5, value) if defaults[path] == () else value})
        assert f"config.{path} must be finite, found {value}" in message


@pytest.mark.parametrize(("changes", "words"), UNTRAINED)
def test_heads_that_are_compared_must_be_trained(changes, words):
    message = refusal(changes)
    assert words in message and "'heads'" in message and str(changes["trainable"]) in message


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable": ("student/fc", "heads")},
        {"trainable": ("student", "heads/cls/")},
        {"terms.cls.source": "network", "trainable": ("student", "heads/network")},
        {"trainable": ("student",), "weighting.name": "constant"},
        {**FIRST, "first_stage.loss.cls": 1.0, "trainable": ("student",)},
        {"optimizer.milestones": [150, 180], "seeds": [0, 2**32 - 1]},
        {"optimizer.milestones": (), "optimizer.decay": 1.0, "optimizer.learning_rate": 1},
        {"seed": np.int64(3), "optimizer.weight_decay": np.float64(0)},
        {"data.mean": (0.5,), "data.std": (1,)},
        {"terms.ce.label_smoothing": 1.0},
    ],
)
def test_values_at_the_edge_are_taken(changes):
    validate.validate(changed(**{**IPWD, **changes}))


def test_names_added_by_a_config_file():
    config = config_lib.default()
    config.loss.kdd = 1.0
    with pytest.raises(UserError, match=r"loss term 'kdd'.*Did you mean 'kd'"):
        validate.validate(config)
    config = config_lib.default()
    config.optimizer.lr = 0.1
    with pytest.raises(UserError, match=r"unknown setting config\.optimizer\.lr"):
        validate.validate(config)


@pytest.mark.parametrize("path", ["optimizer", "seeds", "first_stage", "loss", "terms.ce"])
def test_what_is_missing_is_named(path):
    config = config_lib.default()
    parent, _, name = path.rpartition(".")
    del (config[parent] if parent else config)[name]
    with pytest.raises(UserError, match=rf"config\.{path}\S* is missing"):
        validate.validate(config)


def test_a_term_that_is_off_may_be_missing():
    config = config_lib.default()
    del config.loss.at, config.terms.at, config.first_stage.loss.at
    validate.validate(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 180}, ["config.optimizer.milestones", "180, 210", "config.epochs is 180"]),
        ({"epochs": 3, "optimizer.schedule": "cosine"}, []),
        ({"optimizer.schedule": "cosine", "optimizer.milestones": (9,), "optimizer.decay": 0.2},
         ["config.optimizer.decay, config.optimizer.milestones have", "schedule is cosine"]),
        ({"teacher.optimizer.schedule": "cosine", "teacher.optimizer.milestones": (9,)}, []),
        ({"teacher.epochs": 210}, []),
        ({**KD, "teacher.epochs": 210}, ["config.teacher.optimizer.milestones", "210"]),
        ({**FIRST, "first_stage.loss.ce": 1.0, "first_stage.optimizer.milestones": (4, 5)},
         ["config.first_stage.optimizer.milestones", "config.first_stage.epochs is 5"]),
        ({**IPWD, "weighting.start_epoch": 240}, ["config.weighting.start_epoch is 240"]),
        ({**IPWD, "weighting.start_epoch": 239}, []),
        ({**KD, "weighting.ratio": "B", "weighting.clip": 3.0},
         ["config.weighting.clip, config.weighting.ratio have", "weighting.name is uniform"]),
        ({**IPWD, "weighting.constant": 2.0}, ["weighting.constant has", "weighting.name is ipwd"]),
        ({**KD, "terms.crd.negatives": 8}, ["config.terms.crd.negatives", "config.loss.crd is 0"]),
        ({**KD, "terms.kd.temperature": 8.0}, []),
        ({**KD, "loss.ctkd": 1.0, "terms.ctkd.beta": 9.0, "terms.ctkd.warmup": 5},
         ["config.terms.ctkd.beta has", "config.terms.ctkd.form is kd"]),
        ({**KD, "loss.ctkd": 1.0, "terms.ctkd.beta": 9.0, "terms.ctkd.form": "dkd"}, []),
        ({**KD, "loss.sdd": 1.0, "terms.sdd.base": "nkd", "terms.sdd.beta": 2.0,
          "terms.sdd.alpha": 2.0}, ["config.terms.sdd.alpha has", "config.terms.sdd.base is nkd"]),
        ({**KD, "loss.kd_la": 1.0, "terms.kd_la.tau": 0.0, "terms.kd_la.prior_temperature": 4.0},
         ["config.terms.kd_la.prior_temperature has", "config.terms.kd_la.tau is 0"]),
        ({**KD, "weighting.name": "constant", "weighting.constant": 2.0,
          "weighting.batch_normalize": True},
         ["config.weighting.constant has", "weighting.batch_normalize is True"]),
        ({**KD, "weighting.name": "constant", "weighting.average": 0.5},
         ["config.weighting.average has", "weighting.name is constant"]),
        ({**FIRST, "first_stage.loss.ce": 1.0, "terms.ce.label_smoothing": 0.1}, []),
        ({"first_stage.loss.ce": 1.0}, ["config.first_stage.loss.ce", "first_stage.epochs is 0"]),
        ({"teacher.fold": True}, ["config.teacher.fold", "config.teacher.name is empty"]),
        ({**KD, "steps_per_call": 4, "teacher.look_ahead": 2}, ["teacher.look_ahead is 2"]),
        ({"steps_per_call": 4, "teacher.look_ahead": 2}, ["look_ahead has", "name is empty"]),
        ({"seed": 5, "seeds": (0, 1)}, ["config.seed has", "config.seeds is (0, 1)"]),
        ({"data.rand_magnitude": 5}, ["config.data.rand_magnitude", "rand_augment is 0"]),
    ],
)  # fmt: skip
def test_settings_without_effect_are_one_warning_each(changes, words, capsys):
    validate.validate(changed(**changes))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(words)
    for word in [*words, "warning: ", "no effect"] if words else []:
        assert word in lines[0]

"""What is wrong with a config is said before anything else happens."""

import json

import pytest
from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax.errors import UserError

IPWD = {"loss.kd": 0.9, "loss.cls": 1.0, "teacher.name": "resnet20", "weighting.name": "ipwd"}


def changed(**changes) -> ConfigDict:
    config = config_lib.default()
    for path, value in changes.items():
        config.update_from_flattened_dict({path: value})
    return config


def test_defaults_are_valid():
    config_lib.validate(config_lib.default())
    config_lib.validate(changed(**IPWD))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.name": "resnet33"}, ["network", "resnet33", "Did you mean 'resnet3"]),
        ({"model.name": "Resnet20"}, ["Did you mean 'resnet20'"]),
        ({"teacher.name": "wrn_17_2"}, ["wrn_17_2", "wrn_16_2"]),
        ({"weighting.name": "ipdw"}, ["weighting", "Did you mean 'ipwd'"]),
        ({"weighting.ratio": "C"}, ["weighting.ratio", "A, B"]),
        ({"weighting.terms": ("kdd",)}, ["kdd", "Did you mean 'kd'"]),
        ({"weighting.average": 1.0}, ["weighting.average", "1.0"]),
        ({"loss.kd": 1.0}, ["config.loss.kd needs a teacher", "--config.teacher.name"]),
        ({"loss.ce": 0.0}, ["no term"]),
        ({**IPWD, "loss.cls": 0.0}, ["--config.loss.cls=1"]),
        ({**IPWD, "loss.kd": 0.0}, ["weighting.terms"]),
        ({"weighting.name": "wsld", "weighting.terms": ("ce",)}, ["wsld needs a teacher"]),
        ({"optimizer.schedule": "cosin"}, ["schedule", "Did you mean 'cosine'"]),
        ({"optimizer.learning_rate": 0.0}, ["config.optimizer.learning_rate", "positive"]),
        ({"optimizer.milestones": (180, 150)}, ["milestones", "(180, 150)"]),
        ({"teacher.optimizer.momentum": 1.0}, ["teacher.optimizer.momentum"]),
        ({"teacher.which": "first"}, ["teacher.which", "best, last"]),
        ({"epochs": 0}, ["config.epochs", "at least 1", "0"]),
        ({"teacher.batch_size": 0}, ["config.teacher.batch_size"]),
        ({"data.crop_padding": -1}, ["data.crop_padding", "negative"]),
    ],
)
def test_wrong_values(changes, words):
    with pytest.raises(UserError) as error:
        config_lib.validate(changed(**changes))
    for word in words:
        assert word in str(error.value)


def test_wrong_type_is_refused_by_the_config():
    with pytest.raises(TypeError):
        config_lib.default().epochs = "many"


def test_names_added_by_a_config_file():
    config = config_lib.default()
    config.loss.kdd = 1.0
    with pytest.raises(UserError, match=r"loss term 'kdd'.*Did you mean 'kd'"):
        config_lib.validate(config)
    config = config_lib.default()
    config.optimizer.lr = 0.1
    with pytest.raises(UserError, match=r"unknown setting config\.optimizer\.lr"):
        config_lib.validate(config)
    config = config_lib.default()
    del config.optimizer
    with pytest.raises(UserError, match=r"config\.optimizer"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("optimizer.learningrate", "config.optimizer.learning_rate"),
        ("learning_rate", "learning_rate"),
        ("losss", "config.loss"),
        ("weighting.cilp", "config.weighting.clip"),
        ("optimizer.lr", "config.optimizer has: decay, learning_rate, milestones"),
    ],
)
def test_unknown_key_names_the_nearest(path, meant):
    message = str(config_lib.unknown_key(path, config_lib.default()))
    assert f"config.{path}" in message and meant in message


def test_teacher_config_depends_on_data_and_teacher_alone():
    student = changed(**IPWD, **{"seed": 3, "epochs": 5, "teacher.epochs": 7, "name": "x"})
    other = changed(**IPWD, **{"teacher.epochs": 7, "model.name": "resnet14"})
    teacher = config_lib.teacher_config(student)
    assert teacher.to_dict() == config_lib.teacher_config(other).to_dict()
    assert teacher.model.name == "resnet20" and teacher.epochs == 7 and teacher.seed == 0
    assert not teacher.teacher.name and teacher.weighting.name == "uniform"
    assert {k: v for k, v in teacher.loss.items() if v} == {"ce": 1.0}
    config_lib.validate(teacher)


def test_stages():
    config = changed(**{"first_stage.epochs": 3, "first_stage.loss.ce": 1.0})
    first, main = config_lib.stages(config)
    assert (first.name, first.epochs, main.name, main.epochs) == ("first", 3, "main", 240)
    assert len(config_lib.stages(config_lib.default())) == 1


def test_differences_name_every_value_that_differs():
    old, new = (json.loads(changed(epochs=n).to_json()) for n in (3, 4))
    new["loss"]["ce"], new["extra"] = 0.5, 1
    assert config_lib.differences(old, new) == [
        "epochs: 3 there, 4 here",
        "extra: 'nothing' there, 1 here",
        "loss.ce: 1.0 there, 0.5 here",
    ]

"""The settings: their defaults and names, the stages, and the teacher's config."""

import json

import pytest
from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import validate

IPWD = {"loss.kd": 0.9, "loss.cls": 1.0, "teacher.name": "resnet20", "weighting.name": "ipwd"}


def changed(**changes) -> ConfigDict:
    config = config_lib.default()
    for path, value in changes.items():
        config.update_from_flattened_dict({path: value})
    return config


def test_flat_has_the_path_of_every_setting_and_section():
    paths = config_lib.flat(config_lib.default())
    assert paths["seed"] == 0 and paths["optimizer.decay"] == 0.1
    assert paths["terms.kd.temperature"] == 4 and paths["terms.kd"] == paths["terms"].kd
    assert "teacher.optimizer.momentum" in config_lib.flat(config_lib.default())
    assert "momentum" not in config_lib.flat(config_lib.default())


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("optimizer.learningrate", "config.optimizer.learning_rate"),
        ("learning_rate", "learning_rate"),
        ("losss", "config.loss"),
        ("weighting.cilp", "config.weighting.clip"),
        ("optimizer.lr", "config.optimizer has: b1, b2, decay, eps, learning_rate"),
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
    validate.validate(teacher)


def test_labels_are_smoothed_for_a_teacher_that_asks_for_it():
    teacher = config_lib.teacher_config(changed(**IPWD, **{"teacher.label_smoothing": 0.1}))
    assert teacher.terms.ce.label_smoothing == 0.1


def test_a_first_stage_has_its_own_optimizer():
    changes = {"first_stage.epochs": 1, "first_stage.optimizer.learning_rate": 0.3}
    first, main = config_lib.stages(changed(**changes))
    assert first.optimizer.learning_rate == 0.3
    assert main.optimizer.learning_rate == config_lib.default().optimizer.learning_rate != 0.3


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

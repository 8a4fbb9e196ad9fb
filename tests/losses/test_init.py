"""The registry of all terms: what each asks for, and which settings are accepted or refused."""

import dataclasses

import numpy as np
import pytest

from ipwd_jax import assemble, data, losses, models
from ipwd_jax import config as config_lib
from ipwd_jax.errors import UserError
from ipwd_jax.models.base import Outputs


def test_create_takes_active_terms_with_their_hyper_parameters():
    config = config_lib.default()
    config.loss.kd = 0.9
    config.terms.kd.temperature = 2.0
    terms = losses.create(config.loss, config.terms, {})
    assert terms.keys() == {"ce", "kd"}
    assert terms["kd"].temperature == 2.0


def test_each_term_names_what_it_asks_for():
    for name, term in losses.TERMS.items():
        instance = term(**losses.hyper_parameters(name))
        fields = {field.name for field in dataclasses.fields(Outputs)}
        assert set(instance.teacher_taps) <= fields, name
        assert set(instance.heads.values()) <= set(models.heads.SOURCES), name
        assert hasattr(instance, "pretrain") == bool(instance.first_stage_params), name
    assert losses.TERMS["cls"](source="detached").heads == {"cls": "detached"}


def test_every_term_says_where_it_is_from():
    for name, term in losses.TERMS.items():
        assert ", 20" in term.paper and ": " in term.paper, name


def of_term(path, value):
    """Assemble a run with the term and with one setting changed."""
    config = config_lib.default()
    config.model.name = config.teacher.name = "wrn_10_1"
    config.loss[path.partition(".")[0]] = 1.0
    config.terms.update_from_flattened_dict({path: value})
    images, labels = np.zeros((8, 8, 8, 1), np.uint8), np.arange(8) % 2
    return assemble.assemble(config, data.from_arrays(images, labels, images, labels), None)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("fitnet.layer", 9, "config.terms.fitnet.layer is 9, but .* the maps 0 to 3 in common"),
        ("fitnet.layer", -5, "config.terms.fitnet.layer is -5"),
        ("ft.rate", 0.001, "config.terms.ft.rate is 0.001, .* 64 .* at least 0.015625"),
        ("vid.variance", 1e-6, "config.terms.vid.variance must be above 1e-05, .* found 1e-06"),
        ("vid.variance", 1e-5, "config.terms.vid.variance must be above 1e-05"),
    ],
)
def test_settings_that_leave_nothing_to_compare_are_refused(path, value, words):
    with pytest.raises(UserError, match=words):
        of_term(path, value)


@pytest.mark.parametrize(("path", "value"), [("fitnet.layer", -1), ("ft.rate", 1 / 64)])
def test_settings_at_the_edge_are_taken(path, value):
    of_term(path, value)

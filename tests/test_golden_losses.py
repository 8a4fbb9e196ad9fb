"""Losses, weights and metrics against the public PyTorch implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_json, recipe

from ipwd_jax import metrics
from ipwd_jax.losses.base import cross_entropy
from ipwd_jax.losses.kd import kd_loss
from ipwd_jax.losses.weighting import wsld_weights

FILE = golden_json("losses.json")
TAG, CASES = FILE["tag"], FILE["cases"]


def labels():
    return jnp.asarray(recipe().labels(f"{TAG}/y", FILE["batch"], FILE["classes"]))


def wsld(student_logits, teacher_logits, temperature):
    weights = wsld_weights(student_logits, teacher_logits, labels())
    return weights * kd_loss(student_logits, teacher_logits, temperature, cross_entropy=True)


LOSSES = {
    "ce": lambda student_logits: cross_entropy(student_logits, labels()),
    "kd": lambda student_logits, teacher_logits: kd_loss(
        student_logits, teacher_logits, CASES["kd"]["hyper"]["T"]
    ),
    "wsld": lambda student_logits, teacher_logits: wsld(
        student_logits, teacher_logits, CASES["wsld"]["hyper"]["T"]
    ),
}


def inputs(name, dtype):
    return {
        key: recipe().draw(f"{TAG}/{name}/{key}", x["shape"], x["low"], x["high"]).astype(dtype)
        for key, x in CASES[name]["inputs"].items()
    }


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(name, dtype, rtol):
    case = CASES[name]
    with jax.enable_x64(dtype == "float64"):
        value, grads = jax.value_and_grad(lambda x: LOSSES[name](**x).mean())(inputs(name, dtype))
        assert value.dtype == dtype
        np.testing.assert_allclose(value, case["loss"], rtol=rtol)
        for key, expected in case["grads"].items():
            gradient = np.asarray(grads[key])
            np.testing.assert_allclose(np.linalg.norm(gradient), expected["norm"], rtol=rtol)
            np.testing.assert_allclose(
                gradient.ravel()[:4], expected["first"], rtol=rtol, atol=rtol * expected["norm"]
            )


def test_wsld_weights():
    with jax.enable_x64(True):
        weights = wsld_weights(**inputs("wsld", "float64"), labels=labels())
    np.testing.assert_allclose(weights, CASES["wsld"]["weights"], rtol=1e-9)


def test_metrics():
    case = CASES["metrics"]
    n, classes = case["n"], case["classes"]
    logits = recipe().draw(f"{TAG}/metrics/logits", (n, classes), *case["logits"])
    drawn = np.floor(recipe().draw(f"{TAG}/metrics/labels", (n,), 0, classes)).astype(int)
    keep = recipe().draw(f"{TAG}/metrics/keep", (n,), 0, 1) < 0.6
    scores = metrics.evaluate(logits, np.where(keep, logits.argmax(axis=1), drawn))
    expected = {
        "top1": 100 * case["top1"],
        "top5": 100 * case["top5"],
        "nll": case["nll"],
        "brier": case["brier"],
        "ece": case["ece_percent_bins10"],
        "aurc": case["aurc_x1000"],
        "eaurc": case["eaurc_x1000"],
    }
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(scores[name], value, rtol=1e-9, err_msg=name)

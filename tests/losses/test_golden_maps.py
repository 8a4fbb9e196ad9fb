"""Losses of maps and classifiers, published after 2022, against their authors' PyTorch code."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_losses import TOLERANCES, Golden, assert_gradient
from helpers import recipe
from losses_helpers import batch

from ipwd_jax import class_distances
from ipwd_jax.losses.cat_kd import CATKD
from ipwd_jax.losses.sdd import SDD, region_logits, region_weights
from ipwd_jax.losses.simkd import SimKD
from ipwd_jax.losses.srrl import SRRL
from ipwd_jax.losses.wkd import WKDFeatures, WKDLogits, transport_cost
from ipwd_jax.models import Outputs
from ipwd_jax.pytorch.names import from_torch, to_torch

GOLDEN = Golden("losses_modern.json")
TAG, CASES = GOLDEN.tag, GOLDEN.cases
PRECISIONS = pytest.mark.parametrize(("dtype", "rtol"), TOLERANCES)


def hyper(case, name):
    return CASES[case]["hyper"][name]


def drawn(case, key):
    return GOLDEN.draw(case, key, "float64")


def distances_of_wkd_l():
    """The distances of the cost of the case: symmetric, with a diagonal of zeros."""
    cost = drawn("wkd_l", "cost")
    cost = (cost + cost.T) / 2 * (1 - np.eye(len(cost)))
    return tuple(map(tuple, -np.log1p(-cost)))


@dataclasses.dataclass(frozen=True)
class Spec:
    """A term, and the fields of the two networks' `Outputs` that the inputs of a case fill."""

    term: nn.Module
    student: str
    teacher: str
    names: tuple[str, str] = ("", "")  # prefix of our parameters' names -> prefix in the file


def of_maps(term):
    return Spec(term, "pre_pool", "pre_pool")


def cat_kd(case):
    return of_maps(CATKD(hyper(case, "resolution"), hyper(case, "normalize")))


def sdd(base, *weights):
    return of_maps(SDD(base, hyper(f"sdd_{base}", "T"), *weights, warmup=0))


def wkd_f(case):
    term = WKDFeatures(hyper(case, "mean_cov_ratio"), hyper(case, "grid"))
    return Spec(term, "features", "features", ("regressor.", ""))


SPECS = {
    "srrl": Spec(SRRL(), "embedding", "embedding", ("connector.", "transfer.")),
    "srrl_map": Spec(SRRL("map"), "pre_pool", "embedding", ("connector.", "Connectors.")),
    "cat_kd": cat_kd("cat_kd"),
    "cat_kd_norm": cat_kd("cat_kd_norm"),
    "sdd_kd": sdd("kd"),
    "sdd_dkd": sdd("dkd", hyper("sdd_dkd", "alpha"), hyper("sdd_dkd", "beta")),
    "sdd_nkd": sdd("nkd", 0.0, hyper("sdd_nkd", "gamma")),
    "wkd_l": Spec(
        WKDLogits(
            temperature=hyper("wkd_l", "T"),
            gamma=hyper("wkd_l", "gamma"),
            regularization=hyper("wkd_l", "sinkhorn_lambda"),
            iterations=hyper("wkd_l", "sinkhorn_iter"),
            class_distances=distances_of_wkd_l(),
        ),
        "logits",
        "logits",
    ),
    "wkd_f": wkd_f("wkd_f"),
    "wkd_f_global": wkd_f("wkd_f_global"),
}


def classifier_of(case, who, dtype):
    """Return kernel and bias of a network's classifier; a bias that the case lacks is 0."""
    shapes = CASES[case].get(f"{who}_params", {})
    weights = recipe().weights(f"{TAG}/{case}", shapes)
    kernel = weights.get(f"{who}_classifier.weight", np.zeros((GOLDEN.classes, 1))).T
    bias = weights.get(f"{who}_classifier.bias", np.zeros(kernel.shape[1]))
    return kernel.astype(dtype), bias.astype(dtype)


def outputs(who, field, inputs, classifier):
    """Return a network's `Outputs` with the inputs of a case, whose maps have channels first."""
    logits = inputs.get(f"{who}_logits", jnp.zeros((GOLDEN.batch, GOLDEN.classes)))
    seen = Outputs(logits, jnp.zeros((len(logits), 1)), (), (), classifier=classifier)
    for key in (f"{who}0", f"{who}_map"):
        if key in inputs:
            x = inputs[key]
            x = jnp.moveaxis(x, 1, -1) if x.ndim == 4 else x
            if field == "embedding" and x.ndim == 4:
                x = x.mean((1, 2))
            seen = seen.replace(**{field: (x,) if field == "features" else x})
    return seen


def variables_of(case, spec, seen, dtype):
    """Return the term's variables with the file's numbers, and those numbers' names by ours."""
    template = jax.eval_shape(spec.term.init, jax.random.key(0), *seen)
    template = {k: v for k, v in template.items() if k in ("params", "batch_stats")}
    ours, golden = spec.names
    zeros = to_torch(jax.tree.map(lambda x: np.zeros(x.shape), template))
    names = {name: golden + name.removeprefix(ours) for name in zeros}
    tensors = recipe().weights(f"{TAG}/{case}", CASES[case]["params"])
    assert set(names.values()) == set(tensors)
    found = from_torch({name: tensors[golden] for name, golden in names.items()}, template)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), found), names


def assert_norms(grads, expected, rtol):
    # A bias before BatchNorm has a gradient of zero, up to rounding.
    atol = rtol * max(expected.values(), default=0.0)
    for name, norm in expected.items():
        np.testing.assert_allclose(np.linalg.norm(grads[name]), norm, rtol=rtol, atol=atol)


@PRECISIONS
@pytest.mark.parametrize("name", SPECS)
def test_value_and_gradient(name, dtype, rtol):
    case, spec = CASES[name], SPECS[name]
    with jax.enable_x64(dtype == "float64"):
        inputs = {key: drawn(name, key).astype(dtype) for key in case["inputs"]}
        rows = batch(GOLDEN.batch, epoch=0).replace(label=GOLDEN.labels(name))
        of_student, of_teacher = (classifier_of(name, who, dtype) for who in ("student", "teacher"))

        def seen(inputs, classifier):
            student = outputs("student", spec.student, inputs, classifier)
            return student, outputs("teacher", spec.teacher, inputs, of_teacher), rows

        variables, names = variables_of(name, spec, seen(inputs, of_student), dtype)

        def loss(inputs, classifier, params):
            given = {**variables, "params": params}
            mutable = ["batch_stats"]
            values, _ = spec.term.apply(given, *seen(inputs, classifier), mutable=mutable)
            assert values.shape == (GOLDEN.batch,)
            return values.mean()

        compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        value, grads = compute(inputs, of_student, variables.get("params", {}))
        assert value.dtype == dtype
        np.testing.assert_allclose(value, case["loss"], rtol=rtol)
        for key, expected in case["grads"].items():
            assert_gradient(grads[0][key], expected, rtol)
        of_classifier = dict(zip(("weight", "bias"), grads[1], strict=True))
        of_classifier = {f"student_classifier.{key}": x for key, x in of_classifier.items()}
        assert_norms(of_classifier, case.get("student_param_grad_norms", {}), rtol)
        of_params = {names[key]: x for key, x in to_torch({"params": grads[2]}).items()}
        assert_norms(of_params, case["param_grad_norms"], rtol)


@PRECISIONS
@pytest.mark.parametrize("name", ["simkd", "simkd_pool", "simkd_small"])
def test_simkd_and_its_prediction(name, dtype, rtol):
    """The parameters are those of the head, which makes the map that the term compares."""
    case, term = CASES[name], SimKD(hyper(name, "factor"))
    with jax.enable_x64(dtype == "float64"):
        inputs = {key: drawn(name, key).astype(dtype) for key in case["inputs"]}
        of_teacher = classifier_of(name, "teacher", dtype)
        teacher = outputs("teacher", "pre_pool", inputs, of_teacher)
        head, rows = term.replacement_head(teacher, None), batch(GOLDEN.batch)

        def seen(inputs):
            return outputs("student", "features", inputs, None)

        template = jax.eval_shape(lambda key: head.init(key, seen(inputs), True), jax.random.key(0))
        zeros = to_torch(jax.tree.map(lambda x: np.zeros(x.shape), template))
        names = {name: name.replace("projector.", "transfer.") for name in zeros}
        tensors = recipe().weights(f"{TAG}/{name}", case["params"])
        kernel, bias = of_teacher
        tensors |= {"classifier.weight": kernel.T, "classifier.bias": bias}
        assert set(names.values()) == set(tensors)
        variables = from_torch({name: tensors[golden] for name, golden in names.items()}, template)
        variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)

        def loss(inputs, params):
            given = {**variables, "params": params}
            student, _ = head.apply(given, seen(inputs), True, rows.mask, mutable=["batch_stats"])
            return term.apply({}, student, teacher, rows).mean(), student.logits

        compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (value, logits), grads = compute(inputs, variables["params"])
        assert value.dtype == dtype
        np.testing.assert_allclose(value, case["loss"], rtol=rtol)
        if "prediction" in case:
            assert_gradient(logits, case["prediction"], rtol)
        assert_gradient(grads[0]["student0"], case["grads"]["student0"], rtol)
        of_params = {names[key]: x for key, x in to_torch({"params": grads[1]}).items()}
        assert_norms(of_params, case["param_grad_norms"], rtol)


@pytest.mark.parametrize("name", [name for name in SPECS if name.startswith("sdd")])
def test_regions_of_sdd(name):
    with jax.enable_x64(True):
        teacher = jnp.moveaxis(drawn(name, "teacher_map"), 1, -1)
        logits = region_logits(teacher, classifier_of(name, "teacher", "float64"), (1, 2, 4))
        weights = region_weights(logits, GOLDEN.labels(name))
        assert logits.shape[1] == CASES[name]["regions"]
        assert (weights == 2).sum() == CASES[name]["doubled"]
        assert (logits[:, 0].argmax(axis=1) == GOLDEN.labels(name)).sum() == CASES[name][
            "global_right"
        ]


@PRECISIONS
def test_distances_and_costs_of_wkd(dtype, rtol):
    case = CASES["wkd_cost"]
    with jax.enable_x64(dtype == "float64"):
        features = drawn("wkd_cost", "features").astype(dtype)
        distances = class_distances.of_features(jnp.asarray(features))
        cost = transport_cost(distances, hyper("wkd_cost", "sharpen"))
    assert cost.dtype == dtype
    np.testing.assert_allclose(distances, case["distance"], rtol=rtol, atol=rtol)
    np.testing.assert_allclose(cost, case["cost"], rtol=rtol, atol=rtol)

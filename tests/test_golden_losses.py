"""Losses, weights and metrics against the public PyTorch implementations."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_json, recipe

from ipwd_jax import metrics
from ipwd_jax.losses.ab import AB
from ipwd_jax.losses.at import AT
from ipwd_jax.losses.base import Batch
from ipwd_jax.losses.cc import CC
from ipwd_jax.losses.ce import CrossEntropy
from ipwd_jax.losses.dkd import DKD
from ipwd_jax.losses.fitnet import FitNet
from ipwd_jax.losses.ft import FT
from ipwd_jax.losses.kd import KD
from ipwd_jax.losses.nst import NST
from ipwd_jax.losses.pkt import PKT
from ipwd_jax.losses.reviewkd import ReviewKD, hcl_loss
from ipwd_jax.losses.rkd import RKD
from ipwd_jax.losses.sp import SP
from ipwd_jax.losses.vid import VID
from ipwd_jax.losses.weighting import wsld_weights
from ipwd_jax.models import Outputs
from ipwd_jax.pytorch.names import from_torch, to_torch

FILE = golden_json("losses.json")
TAG, CASES = FILE["tag"], FILE["cases"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """How a case of the file is put to a term.

    Attributes:
        term: the term.
        student: field of the student's `Outputs` that the case's inputs fill; maps fill those
            after the stem, which is a dummy here.
        teacher: the same of the teacher.
        names: our prefix of a parameter's name -> the file's.
        epoch: epochs finished.
        weights: per-sample weights by which the term is multiplied, if any.
        method: of the term, where it is not the call.
        trained: prefix that the file drops from the names of gradients.
    """

    term: nn.Module
    student: str = "features"
    teacher: str = "features"
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    epoch: int = 0
    method: str | None = None
    trained: str = ""


def hyper(case, name):
    return CASES[case]["hyper"][name]


class HCL(nn.Module):
    """`hcl_loss` alone, of maps that need no fusion."""

    def __call__(self, student, teacher, batch):
        return hcl_loss(student.features[1:], teacher.features[1:])


SPECS = {
    "ce": Spec(CrossEntropy(), "logits", "logits"),
    "kd": Spec(KD(temperature=hyper("kd", "T")), "logits", "logits"),
    "wsld": Spec(KD(temperature=hyper("wsld", "T"), cross_entropy=True), "logits", "logits"),
    "dkd": Spec(
        DKD(alpha=hyper("dkd", "alpha"), beta=hyper("dkd", "beta"), temperature=hyper("dkd", "T")),
        "logits",
        "logits",
        epoch=19,
    ),
    "hcl": Spec(HCL()),
    "reviewkd": Spec(ReviewKD(), "maps_and_embedding", "maps_and_embedding", epoch=19),
    "ab": Spec(AB(), "preact", "preact"),
    "ft": Spec(FT(), trained="translator."),
    "ft_pretrain": Spec(FT(), names={"paraphraser.": ""}, method="pretrain"),
    "at_same": Spec(AT()),
    "at_mixed": Spec(AT()),
    "nst_same": Spec(NST()),
    "nst_mixed": Spec(NST()),
    "sp": Spec(SP()),
    "fitnet_same": Spec(FitNet(layer=1), names={"regressor.": ""}),
    "fitnet_down": Spec(FitNet(layer=1), names={"regressor.": ""}),
    "fitnet_up": Spec(FitNet(layer=1), names={"regressor.": ""}),
    "fitnet_crop": Spec(FitNet(layer=1), names={"regressor.": ""}),
    "cc": Spec(CC(), "embedding", "embedding"),
    "vid_same": Spec(VID(), names={"0.": ""}),
    "vid_pool": Spec(VID(), names={"0.": ""}),
    "rkd": Spec(
        RKD(distance_weight=hyper("rkd", "w_d"), angle_weight=hyper("rkd", "w_a")),
        "embedding",
        "embedding",
    ),
    "pkt": Spec(PKT(), "embedding", "embedding"),
}
# Cases with a test of their own below.
OWN_TESTS = {"metrics", "crd", "pskd", "sskd_ss", "sskd_tf"}  # the last in test_golden_memories.py


def labels(rows=FILE["batch"]):
    return jnp.asarray(recipe().labels(f"{TAG}/y", rows, FILE["classes"]))


def draw(name, key, dtype):
    x = CASES[name]["inputs"][key]
    return recipe().draw(f"{TAG}/{name}/{key}", x["shape"], x["low"], x["high"]).astype(dtype)


def outputs(field, arrays):
    """`Outputs` whose `field` is made of NumPy arrays in the file's layout (channels first)."""
    rows = len(arrays[0]) if arrays else FILE["batch"]  # a case may draw one side only
    empty = Outputs(
        logits=jnp.zeros((rows, FILE["classes"])), embedding=jnp.zeros((rows, 1)), features=(),
        preact=(),
    )  # fmt: skip
    if not arrays:
        return empty
    if field == "maps_and_embedding":  # the last one is the pooled vector
        *maps, embedding = arrays
        embedding = embedding.reshape(len(embedding), -1)
        return outputs("features", maps).replace(embedding=embedding)
    if field not in ("features", "preact"):
        return empty.replace(**{field: arrays[0]})
    maps = tuple(jnp.moveaxis(x, 1, -1) for x in arrays)
    stem = jnp.zeros((rows, 4, 4, 2), maps[0].dtype)
    return empty.replace(features=(stem, *maps), preact=(stem, *maps))


def batch(rows, epoch=0):
    index = jnp.arange(rows, dtype=jnp.int32)
    return Batch(
        image=jnp.zeros((rows, 4, 4, 3)),
        label=labels(rows),
        index=index,
        view=index,
        mask=jnp.ones(rows),
        epoch=jnp.int32(epoch),
        train_labels=labels(rows),
        key=jax.random.key(0),
    )


def variables_of(spec, name, student, teacher, rows, dtype):
    """The term's variables with the file's numbers, and the names of its parameters there."""
    template = jax.eval_shape(
        functools.partial(spec.term.init, method=spec.method),
        jax.random.key(0), student, teacher, batch(rows, spec.epoch),
    )  # fmt: skip
    template = {k: v for k, v in template.items() if k in ("params", "batch_stats")}

    def theirs(ours):
        for prefix, golden in spec.names.items():
            if ours.startswith(prefix):
                return golden + ours.removeprefix(prefix)
        return ours

    shapes = to_torch(jax.tree.map(lambda x: np.zeros(x.shape), template))
    tensors = recipe().weights(f"{TAG}/{name}", CASES[name]["params"])
    assert {theirs(ours) for ours in shapes} == set(tensors)
    variables = from_torch({ours: tensors[theirs(ours)] for ours in shapes}, template)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), variables), theirs


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("name", SPECS)
def test_value_and_gradient(name, dtype, rtol):
    case, spec = CASES[name], SPECS[name]
    with jax.enable_x64(dtype == "float64"):
        drawn = {key: draw(name, key, dtype) for key in case["inputs"]}
        rows = len(next(iter(drawn.values())))

        def as_outputs(drawn, who, field):
            return outputs(field, [x for key, x in sorted(drawn.items()) if key.startswith(who)])

        student = as_outputs(drawn, "student", spec.student)
        teacher = as_outputs(drawn, "teacher", spec.teacher)
        variables, theirs = variables_of(spec, name, student, teacher, rows, dtype)

        def loss(drawn, params):
            values, _ = spec.term.apply(
                {**variables, "params": params},
                as_outputs(drawn, "student", spec.student),
                as_outputs(drawn, "teacher", spec.teacher),
                batch(rows, spec.epoch),
                mutable=["batch_stats", "memory"],
                method=spec.method,
            )
            if name == "wsld":
                values *= wsld_weights(drawn["student_logits"], drawn["teacher_logits"], labels())
            return values.mean()

        params = variables.get("params", {})
        value, (grads, param_grads) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
            drawn, params
        )
        assert value.dtype == dtype
        np.testing.assert_allclose(value, case["loss"], rtol=rtol)
        for key, expected in case["grads"].items():
            gradient = np.asarray(grads[key])
            np.testing.assert_allclose(np.linalg.norm(gradient), expected["norm"], rtol=rtol)
            np.testing.assert_allclose(
                gradient.ravel()[:4], expected["first"], rtol=rtol, atol=rtol * expected["norm"]
            )
        norms = {theirs(k): np.linalg.norm(g) for k, g in to_torch({"params": param_grads}).items()}
        largest = max(case["param_grad_norms"].values(), default=0.0)
        for key, expected in case["param_grad_norms"].items():
            # A bias before BatchNorm has a gradient of zero, up to rounding.
            np.testing.assert_allclose(
                norms[spec.trained + key], expected, rtol=rtol, atol=rtol * largest
            )


def test_every_case_has_a_test():
    assert set(CASES) == set(SPECS) | OWN_TESTS


def test_wsld_weights():
    with jax.enable_x64(True):
        logits = {key: draw("wsld", key, "float64") for key in CASES["wsld"]["inputs"]}
        weights = wsld_weights(**logits, labels=labels())
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

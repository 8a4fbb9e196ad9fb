"""Losses, weights and metrics against the public PyTorch implementations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_losses import TOLERANCES, Golden, Spec, assert_gradient
from helpers import recipe
from losses_helpers import batch

from ipwd_jax import metrics
from ipwd_jax.losses.ab import AB
from ipwd_jax.losses.at import AT
from ipwd_jax.losses.cc import CC
from ipwd_jax.losses.ce import CrossEntropy
from ipwd_jax.losses.crd import CRD
from ipwd_jax.losses.dkd import DKD
from ipwd_jax.losses.fitnet import FitNet
from ipwd_jax.losses.ft import FT
from ipwd_jax.losses.kd import KD
from ipwd_jax.losses.nst import NST
from ipwd_jax.losses.pkt import PKT
from ipwd_jax.losses.pskd import PSKD
from ipwd_jax.losses.reviewkd import ReviewKD, hcl_loss
from ipwd_jax.losses.rkd import RKD
from ipwd_jax.losses.sp import SP
from ipwd_jax.losses.sskd import SSKD, best_ranked, similarity
from ipwd_jax.losses.vid import VID
from ipwd_jax.losses.weighting import wsld_weights
from ipwd_jax.pytorch.names import from_torch

GOLDEN = Golden("losses.json")
TAG, CASES = GOLDEN.tag, GOLDEN.cases


def hyper(case, name):
    return CASES[case]["hyper"][name]


class HCL(nn.Module):
    """`hcl_loss` alone, for maps that need no fusion."""

    def __call__(self, student, teacher, batch):
        return hcl_loss(student.features[1:], teacher.features[1:])


SPECS = {
    "ce": Spec(CrossEntropy(), "logits", "logits"),
    "kd": Spec(KD(temperature=hyper("kd", "T")), "logits", "logits"),
    "wsld": Spec(
        KD(temperature=hyper("wsld", "T"), cross_entropy=True),
        "logits",
        "logits",
        weights=wsld_weights,
    ),
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
OWN_TESTS = {"metrics", "crd", "pskd", "sskd_ss", "sskd_tf"}


labels = functools.partial(GOLDEN.labels, "")
draw, outputs = GOLDEN.draw, GOLDEN.outputs


@pytest.mark.parametrize(("dtype", "rtol"), TOLERANCES)
@pytest.mark.parametrize("name", SPECS)
def test_value_and_gradient(name, dtype, rtol):
    GOLDEN.check(name, SPECS[name], dtype, rtol)


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


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "rtol"),
    [("float64", 1e-9), pytest.param("float32", 1e-4, marks=pytest.mark.slow)],
    ids=["float64", "float32"],
)


@PRECISIONS
def test_golden_loss_crd(dtype, rtol):
    case = CASES["crd"]
    sizes, bank = case["hyper"], case["memory"]
    term = CRD(
        feat_dim=sizes["feat_dim"],
        negatives=sizes["nce_k"],
        temperature=sizes["nce_t"],
        momentum=sizes["nce_m"],
        train_size=sizes["n_data"],
    )
    index = np.array(case["index"])
    shape = (len(index), sizes["nce_k"] + 1)
    contrast = np.floor(recipe().draw(f"{TAG}/crd/contrast_idx", shape, 0, sizes["n_data"]))
    contrast[:, 0] = index
    with jax.enable_x64(dtype == "float64"):
        banks = {
            name: jnp.asarray(
                recipe().draw(f"{TAG}/crd/{name}", bank["shape"], bank["low"], bank["high"]), dtype
            )
            for name in bank["names"]
        }
        tensors = recipe().weights(f"{TAG}/crd", case["params"])
        rows = batch(len(index), labels=labels(len(index))).replace(index=jnp.asarray(index))

        def both(drawn):
            student = outputs("embedding", [drawn["student0"]])
            teacher = outputs("embedding", [drawn["teacher0"]])
            return student, teacher

        drawn = {key: draw("crd", key, dtype) for key in case["inputs"]}
        template = jax.eval_shape(term.init, jax.random.key(0), *both(drawn), rows)
        params = from_torch(tensors, {"params": template["params"]})["params"]
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
        memory = {**banks, "Z": jnp.zeros(2, dtype)}

        def loss(drawn, params, memory):
            return term.apply(
                {"params": params, "memory": memory},
                *both(drawn),
                rows,
                jnp.asarray(contrast, jnp.int32),
                mutable=["memory"],
            )

        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, new), (grads, param_grads) = grad(drawn, params, memory)
        np.testing.assert_allclose(value, case["loss"], rtol=rtol)
        assert_gradient(grads["student0"], case["grads"]["student0"], rtol)
        norms = {k: np.linalg.norm(v) for k, v in param_grads["embed_t.linear"].items()}
        expected = case["param_grad_norms"]
        np.testing.assert_allclose(norms["kernel"], expected["linear.weight"], rtol=rtol)
        np.testing.assert_allclose(norms["bias"], expected["linear.bias"], rtol=rtol)

        new = new["memory"]
        np.testing.assert_allclose(new["Z"], case["Z"], rtol=rtol)
        sums = [np.asarray(new[name]).sum() for name in bank["names"]]
        np.testing.assert_allclose(sums, case["memory_after_norms"], rtol=rtol, atol=10 * rtol)
        np.testing.assert_allclose(new["memory_v1"][index[0]][:4], case["memory_v1_row"], rtol=rtol)
        second, _ = loss(drawn, params, new)
        np.testing.assert_allclose(second, case["second_call_loss"], rtol=rtol)


@PRECISIONS
def test_golden_loss_sskd_similarity(dtype, rtol):
    case = CASES["sskd_ss"]
    term = SSKD(similarity_temperature=case["hyper"]["T"], similarity_share=case["hyper"]["ratio"])
    with jax.enable_x64(dtype == "float64"):
        student, teacher = (draw("sskd_ss", f"{who}_rep", dtype) for who in ("student", "teacher"))
        mask = jnp.ones(len(student) // 4, dtype)
        value, gradient = jax.value_and_grad(term.similarity_loss)(student, teacher, mask)
        np.testing.assert_allclose(value, case["loss"], rtol=rtol)
        assert_gradient(gradient, case["grads"]["student_rep"], rtol)
        target, valid = jnp.repeat(jnp.arange(len(mask)), 3), jnp.ones(3 * len(mask))
        kept = best_ranked(similarity(teacher), target, valid, term.similarity_share)
        np.testing.assert_array_equal(np.flatnonzero(kept), case["kept"])


@PRECISIONS
def test_golden_loss_sskd_transform(dtype, rtol):
    case = CASES["sskd_tf"]
    term = SSKD(transform_temperature=case["hyper"]["T"], transform_share=case["hyper"]["ratio"])
    with jax.enable_x64(dtype == "float64"):
        logits = [draw("sskd_tf", f"{who}_logits", dtype) for who in ("student", "teacher")]
        mask = jnp.ones(len(logits[0]) // 4, dtype)
        value, gradient = jax.value_and_grad(term.transform_loss)(*logits, labels(), mask)
    np.testing.assert_allclose(value, case["loss"], rtol=rtol)
    assert_gradient(gradient, case["grads"]["student_logits"], rtol)


@PRECISIONS
def test_golden_loss_pskd(dtype, rtol):
    case = CASES["pskd"]
    hyper = case["hyper"]
    with jax.enable_x64(dtype == "float64"):
        logits = {key: draw("pskd", key, dtype) for key in case["inputs"]}
        rows = len(logits["student_logits"])
        term = PSKD(last_share=hyper["alpha_T"], train_size=rows, epochs=hyper["epochs"])
        table = jax.nn.softmax(logits["teacher_logits"])

        def loss(student_logits):
            seen = outputs("logits", [student_logits])
            now = batch(rows, epoch=hyper["epoch"] - 1, labels=labels(rows))
            of_teacher, new = term.apply(
                {"memory": {"predictions": table}}, seen, None, now, mutable=["memory"]
            )
            of_labels = term.label_loss(seen, now)
            assert of_teacher.shape == of_labels.shape == (rows,)
            return (of_labels + of_teacher).mean(), new["memory"]["predictions"]

        student = jnp.asarray(logits["student_logits"])
        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(student)
    np.testing.assert_allclose(value, case["loss"], rtol=rtol)
    assert_gradient(gradient, case["grads"]["student_logits"], rtol)
    np.testing.assert_allclose(new, np.float32(jax.nn.softmax(jnp.float32(student))), rtol=1e-5)

"""CRD, SSKD and PS-KD against the public PyTorch implementations: losses that remember or rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recipe
from test_golden_losses import CASES, TAG, batch, draw, labels, outputs

from ipwd_jax.losses.crd import CRD
from ipwd_jax.losses.pskd import PSKD
from ipwd_jax.losses.sskd import SSKD, best_ranked, similarity
from ipwd_jax.pytorch.names import from_torch

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "rtol"), [("float64", 1e-9), ("float32", 1e-4)], ids=["float64", "float32"]
)


def assert_gradient(actual, expected, rtol):
    actual = np.asarray(actual)
    np.testing.assert_allclose(np.linalg.norm(actual), expected["norm"], rtol=rtol)
    np.testing.assert_allclose(
        actual.ravel()[:4], expected["first"], rtol=rtol, atol=rtol * expected["norm"]
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
        rows = batch(len(index)).replace(index=jnp.asarray(index))

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
            now = batch(rows, epoch=hyper["epoch"] - 1)
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

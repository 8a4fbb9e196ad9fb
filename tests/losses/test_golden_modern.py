"""Losses of methods after 2022 against their authors' PyTorch implementations."""

import jax
import numpy as np
import pytest
from golden_losses import TOLERANCES, Golden, Spec

from ipwd_jax.losses.abkd import ABKD
from ipwd_jax.losses.base import standardize_logits
from ipwd_jax.losses.crld import CRLD
from ipwd_jax.losses.ctkd import CTKD, reversal
from ipwd_jax.losses.dist import DIST
from ipwd_jax.losses.dkd import DKD
from ipwd_jax.losses.kd import KD
from ipwd_jax.losses.mlkd import MLKD
from ipwd_jax.losses.nkd import NKD, USKD
from ipwd_jax.losses.rld import RLD
from ipwd_jax.losses.ttm import TTM, WTTM

GOLDEN = Golden("losses_modern.json")
CASES = GOLDEN.cases

# Names of hyper-parameters in the file -> ours.
_OURS = {"T": "temperature", "tau": "temperature", "alpha_T": "confidence_temperature"}
_OURS |= {"t_start": "start_temperature", "t_end": "temperature_range", "loops": "warmup"}
# These belong to the case and not to the term.
_OF_CASE = {"labels", "epoch", "lambda"}


def of_logits(name, term, epoch=0, **changes):
    """Return the `Spec` of a term of logits with the hyper-parameters of the case."""
    hyper = {_OURS.get(k, k): v for k, v in CASES[name]["hyper"].items() if k not in _OF_CASE}
    return Spec(term(**hyper), "logits", "logits", epoch=epoch, **changes)


def of_ctkd(name, **changes):
    """Return the `Spec` of CTKD in the epoch of the case."""
    form = "dkd" if name == "ctkd_dkd" else "kd"
    return of_logits(
        name,
        lambda **hyper: CTKD(form=form, **hyper),
        epoch=CASES[name]["hyper"]["epoch"] - 1,
        names={"temperature": "global_T"},
        **changes,
    )


def of_mlkd(name, part=None):
    """Return the `Spec` of MLKD, or of one of its three parts."""
    hyper, parts = CASES[name]["hyper"], ("kd_weight", "class_weight", "sample_weight")
    weights = {x: hyper["kd_weight"] * (part in (None, x)) for x in parts}
    assert hyper["temperatures"][1:] == [3.0, 5.0, 2.0, 6.0]
    standardize = hyper.get("standardize", False)
    return Spec(MLKD(hyper["T"], **weights, standardize=standardize), "views", "views")


def of_crld(hyper):
    weights = hyper["T"], hyper["wv_weight"], hyper["cv_weight"]
    return Spec(CRLD(*weights, hyper["tau_w"], hyper["tau_s"]), "views", "views")


SPECS = {
    "lskd_kd": of_logits("lskd_kd", KD),
    "lskd_dkd": of_logits("lskd_dkd", DKD, epoch=19),  # after the warm-up
    # The gradient of the temperature is a difference of large numbers.
    "lskd_ctkd": of_ctkd("lskd_ctkd", float32_params=3e-3),
    "ctkd": of_ctkd("ctkd"),
    "ctkd_dkd": of_ctkd("ctkd_dkd"),
    "dist": of_logits("dist", DIST),
    "dist_t1": of_logits("dist_t1", DIST),
    "nkd": of_logits("nkd", NKD),
    "ttm": of_logits("ttm", TTM),
    "wttm": of_logits("wttm", WTTM),
    "rld": of_logits("rld", RLD, epoch=19),
    "abkd": of_logits("abkd", ABKD),
    "uskd": Spec(USKD(**{k: CASES["uskd"]["hyper"][k] for k in ("alpha", "beta", "mu")}),
                 "logits_and_pooled_map"),
    "mlkd": of_mlkd("mlkd"),
    "mlkd_kd": of_mlkd("mlkd_kd", "kd_weight"),
    "mlkd_cc": of_mlkd("mlkd_cc", "class_weight"),
    "mlkd_bc": of_mlkd("mlkd_bc", "sample_weight"),
    "lskd_mlkd": of_mlkd("lskd_mlkd"),
    "crld": of_crld(CASES["crld"]["hyper"]),
}  # fmt: skip
# Cases that are compared in test_golden_maps.py, and those of losses that the package lacks.
OF_MAPS = {
    *("wkd_l", "wkd_cost", "wkd_f", "wkd_f_global", "sdd_kd", "sdd_dkd", "sdd_nkd"),
    *("srrl", "srrl_map", "cat_kd", "cat_kd_norm", "simkd", "simkd_pool", "simkd_small"),
}
WITHOUT_A_TERM = {
    "deepkd_topk",
}


@pytest.mark.parametrize(("dtype", "rtol"), TOLERANCES)
@pytest.mark.parametrize("name", SPECS)
def test_value_and_gradient(name, dtype, rtol):
    found = GOLDEN.check(name, SPECS[name], dtype, rtol)
    if "global_T_grad" in CASES[name]:
        np.testing.assert_array_equal(
            np.sign(found["global_T"]), np.sign(CASES[name]["global_T_grad"])
        )


def test_every_case_is_accounted_for():
    assert sorted(CASES) == sorted([*SPECS, *OF_MAPS, *WITHOUT_A_TERM])


def test_standardised_logits():
    case = "lskd_kd"
    with jax.enable_x64(True):
        z = standardize_logits(GOLDEN.draw(case, "student_logits", "float64"))
    np.testing.assert_allclose(z[0, :4], CASES[case]["standardized_first"], rtol=1e-9)


@pytest.mark.parametrize("name", ["ctkd", "ctkd_dkd", "lskd_ctkd"])
def test_temperature(name):
    g = np.array(CASES[name]["global_T"])
    found = SPECS[name].term.scalars({"params": {"temperature": g}})
    assert found.keys() == {"temperature"}
    np.testing.assert_allclose(found["temperature"], CASES[name]["temperature"], rtol=1e-12)


def test_schedule_of_the_temperature():
    schedule = CASES["ctkd"]["schedule"]
    found = [reversal(epoch, 10) for epoch in range(len(schedule))]
    np.testing.assert_allclose(found, schedule, atol=1e-6)

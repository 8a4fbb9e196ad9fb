"""The registries of loss terms and weightings. Adding a term takes one file and one line here.

A term defined outside the package can be registered anywhere, as long as this happens before the
config is created: after `TERMS["mine"] = Mine`, `config.loss.mine` is the weight of the term and
`config.terms.mine` holds its fields.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ipwd_jax.errors import UserError
from ipwd_jax.losses.ab import AB
from ipwd_jax.losses.abkd import ABKD
from ipwd_jax.losses.at import AT
from ipwd_jax.losses.base import RUN_FIELDS, Term
from ipwd_jax.losses.cat_kd import CATKD
from ipwd_jax.losses.cc import CC
from ipwd_jax.losses.ce import ClsHead, CrossEntropy
from ipwd_jax.losses.crd import CRD
from ipwd_jax.losses.crld import CRLD
from ipwd_jax.losses.ctkd import CTKD
from ipwd_jax.losses.dist import DIST
from ipwd_jax.losses.dkd import DKD
from ipwd_jax.losses.fitnet import FitNet
from ipwd_jax.losses.fsp import FSP
from ipwd_jax.losses.ft import FT
from ipwd_jax.losses.kd import KD, KDHead
from ipwd_jax.losses.la import KDLA
from ipwd_jax.losses.mlkd import MLKD
from ipwd_jax.losses.nkd import NKD, USKD
from ipwd_jax.losses.nst import NST
from ipwd_jax.losses.ofd import OFD
from ipwd_jax.losses.pkt import PKT
from ipwd_jax.losses.pskd import PSKD
from ipwd_jax.losses.reviewkd import ReviewKD
from ipwd_jax.losses.rkd import RKD
from ipwd_jax.losses.rld import RLD
from ipwd_jax.losses.sdd import SDD
from ipwd_jax.losses.simkd import SimKD
from ipwd_jax.losses.sp import SP
from ipwd_jax.losses.srrl import SRRL
from ipwd_jax.losses.sskd import SSKD
from ipwd_jax.losses.taps import check_taps
from ipwd_jax.losses.ttm import TTM, WTTM
from ipwd_jax.losses.vid import VID
from ipwd_jax.losses.weighting import WEIGHTINGS, Weighting
from ipwd_jax.losses.wkd import WKDFeatures, WKDLogits
from ipwd_jax.typing import PyTree

__all__ = ["TERMS", "WEIGHTINGS", "Term", "Weighting", "create", "hyper_parameters", "init"]

TERMS: dict[str, type[Term]] = {
    "ce": CrossEntropy,
    "cls": ClsHead,
    "kd": KD,
    "kd_head": KDHead,
    "crd": CRD,
    "sskd": SSKD,
    "pskd": PSKD,
    "at": AT,
    "sp": SP,
    "fitnet": FitNet,
    "cc": CC,
    "vid": VID,
    "rkd": RKD,
    "pkt": PKT,
    "nst": NST,
    "ab": AB,
    "dkd": DKD,
    "fsp": FSP,
    "ft": FT,
    "kd_la": KDLA,
    "ofd": OFD,
    "reviewkd": ReviewKD,
    "dist": DIST,
    "ctkd": CTKD,
    "nkd": NKD,
    "uskd": USKD,
    "ttm": TTM,
    "wttm": WTTM,
    "rld": RLD,
    "abkd": ABKD,
    "srrl": SRRL,
    "cat_kd": CATKD,
    "sdd": SDD,
    "wkd_l": WKDLogits,
    "wkd_f": WKDFeatures,
    "simkd": SimKD,
    "mlkd": MLKD,
    "crld": CRLD,
}


def _fields(name: str) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(TERMS[name]) if f.name not in ("parent", "name")]


def hyper_parameters(name: str) -> dict[str, Any]:
    """The fields of a term and their defaults, as they appear in `config.terms.NAME`.

    Raises:
        ValueError: a field has no default, or a default that a config cannot hold.
    """
    found = {f.name: f.default for f in _fields(name) if f.name not in RUN_FIELDS}
    for field, default in found.items():
        several = isinstance(default, tuple) and default
        if not all(isinstance(x, bool | int | float | str) for x in several or [default]):
            raise ValueError(
                f"the field {field!r} of the loss term {name!r} needs a default that is a number, "
                "a string, True, False or a tuple of these, because the field becomes the setting "
                f"config.terms.{name}.{field}"
            )
    return found


def create(loss: ConfigDict, hyper: ConfigDict, run: Mapping[str, Any]) -> dict[str, Term]:
    """The active terms by name, that is, those whose weight in `loss` is not zero.

    Args:
        loss: weight of each term.
        hyper: hyper-parameters of each term (`config.terms`).
        run: values for `RUN_FIELDS`; each term receives those for which it has a field.

    Raises:
        UserError: a term rejects its hyper-parameters.
    """
    terms = {}
    for name, weight in loss.items():
        if weight:
            names = {field.name for field in _fields(name)}
            of_run = {key: value for key, value in run.items() if key in names}
            try:
                terms[name] = TERMS[name](**hyper[name], **of_run)
                check_taps("this term", terms[name].teacher_taps)
            except ValueError as error:
                raise UserError(f"config.terms.{name}: {error}") from error
    return terms


def init(term: Term, key: jax.Array, *seen: PyTree) -> dict[str, PyTree]:
    """The variables of a term, as returned by `term.init(key, *seen)`.

    Args:
        term: an instance of one of the classes in `TERMS`.
        key: typed PRNG key.
        seen: the arguments of its call: the outputs of student and teacher, and the batch.

    Raises:
        ValueError: the term cannot process these arguments, or its loss does not have the shape
            that `Term.per_sample` declares.
    """
    loss, variables = term.init_with_output(key, *seen)
    wanted = seen[-1].mask.shape if term.per_sample else ()
    if jnp.shape(loss) != wanted:
        kind = "(B,), one loss per sample" if term.per_sample else "(), one loss per batch"
        raise ValueError(
            f"the loss term {type(term).__name__} must return an array of shape {kind}, because "
            f"it declares per_sample={term.per_sample}; for {seen[-1].mask.shape[0]} samples it "
            f"returns {jnp.shape(loss)}. Change what it returns or what it declares."
        )
    return dict(variables)

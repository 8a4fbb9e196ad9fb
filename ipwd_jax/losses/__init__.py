"""The registry of loss terms. A new term is one file and one line here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ipwd_jax.losses.ab import AB
from ipwd_jax.losses.at import AT
from ipwd_jax.losses.base import RUN_FIELDS, Term
from ipwd_jax.losses.cc import CC
from ipwd_jax.losses.ce import ClsHead, CrossEntropy
from ipwd_jax.losses.crd import CRD
from ipwd_jax.losses.dkd import DKD
from ipwd_jax.losses.fitnet import FitNet
from ipwd_jax.losses.fsp import FSP
from ipwd_jax.losses.ft import FT
from ipwd_jax.losses.kd import KD, KDHead
from ipwd_jax.losses.la import KDLA
from ipwd_jax.losses.nst import NST
from ipwd_jax.losses.ofd import OFD
from ipwd_jax.losses.pkt import PKT
from ipwd_jax.losses.pskd import PSKD
from ipwd_jax.losses.reviewkd import ReviewKD
from ipwd_jax.losses.rkd import RKD
from ipwd_jax.losses.sp import SP
from ipwd_jax.losses.sskd import SSKD
from ipwd_jax.losses.vid import VID

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
}


def _fields(name: str) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(TERMS[name]) if f.name not in ("parent", "name")]


def hyper_parameters(name: str) -> dict[str, Any]:
    """The fields of a term and their defaults, as they stand in `config.terms.NAME`."""
    return {f.name: f.default for f in _fields(name) if f.name not in RUN_FIELDS}


def create(loss: ConfigDict, hyper: ConfigDict, run: Mapping[str, Any]) -> dict[str, Term]:
    """The active terms, by name: those whose weight in `loss` is not zero.

    Args:
        loss: weight of each term.
        hyper: hyper-parameters of each term (`config.terms`).
        run: values of the `RUN_FIELDS`, of which each term gets those that it has.
    """
    terms = {}
    for name, weight in loss.items():
        if weight:
            names = {field.name for field in _fields(name)}
            of_run = {key: value for key, value in run.items() if key in names}
            terms[name] = TERMS[name](**hyper[name], **of_run)
    return terms

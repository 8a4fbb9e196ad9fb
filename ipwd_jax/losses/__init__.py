"""The registry of loss terms. A new term is one file and one line here."""

import dataclasses

import flax.linen as nn
from ml_collections import ConfigDict

from ipwd_jax.losses.ce import ClsHead, CrossEntropy
from ipwd_jax.losses.kd import KD

TERMS: dict[str, type[nn.Module]] = {
    "ce": CrossEntropy,
    "cls": ClsHead,
    "kd": KD,
}


def hyper_parameters(name: str) -> dict:
    """The fields of a term and their defaults, as they stand in `config.terms.NAME`."""
    fields = dataclasses.fields(TERMS[name])
    return {f.name: f.default for f in fields if f.name not in ("parent", "name")}


def create(loss: ConfigDict, hyper: ConfigDict) -> dict[str, nn.Module]:
    """The active terms, by name: those whose weight in `loss` is not zero.

    Args:
        loss: weight of each term.
        hyper: hyper-parameters of each term (`config.terms`).
    """
    return {name: TERMS[name](**hyper[name]) for name, weight in loss.items() if weight}

"""Whether the terms and the weighting of a run are defined for the images that the networks see."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from ipwd_jax.data.base import Dataset
from ipwd_jax.errors import UserError
from ipwd_jax.losses import weighting
from ipwd_jax.losses.base import Term


def check_images(config: ConfigDict, terms: Mapping[str, Term], dataset: Dataset) -> None:
    """Raise `UserError` if the terms of a stage do not fit its images or each other's.

    Args:
        config: config of the run.
        terms: the terms of the stage, by name.
        dataset: data set of the run.
    """
    for name, term in terms.items():
        if term.rotations and config.data.rand_augment:
            raise UserError(
                f"the loss term {name} sees four rotations of each image, which "
                "config.data.rand_augment would distort differently; leave one of them out"
            )
        if term.strong_view:
            _check_strong_view(config, name, terms, dataset)
    if config.data.mixup or config.data.cutmix:
        _check_mixing(config, terms)


def _check_strong_view(
    config: ConfigDict, name: str, terms: Mapping[str, Term], dataset: Dataset
) -> None:
    """Raise `UserError` if a term cannot compare each image with a strong view of it."""
    needs = f"the loss term {name} compares each image with a strong view of it"
    if (channels := dataset.train.images.shape[-1]) not in (1, 3):
        raise UserError(
            f"{needs}, which is made of grey or RGB images, but those of {dataset.name} have "
            f"{channels} channels; choose another loss term"
        )
    if config.data.rand_augment:
        raise UserError(
            f"{needs}, and config.data.rand_augment would distort the other view too; leave one "
            "of them out"
        )
    if rotating := [other for other, term in terms.items() if term.rotations]:
        raise UserError(
            f"{needs}, and the loss term {rotating[0]} with rotations of it; leave one of the two "
            "out"
        )


def _check_mixing(config: ConfigDict, terms: Mapping[str, Term]) -> None:
    """Raise `UserError` if a term or the weighting is not defined for mixed images."""
    kind = weighting.create(config.weighting)
    parts = [(f"the loss term {name}", term.mixed_images) for name, term in terms.items()]
    parts += [(f"config.weighting.name={config.weighting.name}", kind.mixed_images)]
    for what, mixed in parts:
        if not mixed:
            raise UserError(
                f"{what} is not defined for images that config.data.mixup or config.data.cutmix "
                "has mixed; leave these settings out, or choose other loss terms and weightings"
            )

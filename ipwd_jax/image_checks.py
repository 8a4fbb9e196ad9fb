"""Whether the terms and the weighting of a run are defined for the images that the networks see."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import losses
from ipwd_jax.data.base import Dataset
from ipwd_jax.errors import UserError
from ipwd_jax.losses import weighting
from ipwd_jax.losses.base import Term


def sees_strong_views(config: ConfigDict) -> bool:
    """Return whether a term of any stage asks for strong views of the images."""
    weights = (item for stage in config_lib.stages(config) for item in stage.loss.items())
    return any(losses.TERMS[name].strong_view for name, weight in weights if weight)


def check_images(config: ConfigDict, terms: Mapping[str, Term], dataset: Dataset) -> None:
    """Raise `UserError` if the terms of a stage do not fit its images or each other.

    Args:
        config: config of the run.
        terms: the terms of the stage, by name.
        dataset: data set of the run.
    """
    for name, term in terms.items():
        if term.rotations:
            _check_rotations(config, name, term, dataset)
        if term.strong_view:
            _check_strong_view(config, name, terms, dataset)
    if config.data.mixup or config.data.cutmix:
        _check_mixing(config, terms)


def _check_rotations(config: ConfigDict, name: str, term: Term, dataset: Dataset) -> None:
    """Raise `UserError` if a term cannot see four rotations of each image."""
    if term.heads:
        raise UserError(
            f"the loss term {name} has heads, which do not see the rotations; leave out its heads, "
            "or rotate no images"
        )
    _, height, width, _ = dataset.train.images.shape
    if config.data.rand_augment:
        raise UserError(
            f"the loss term {name} sees four rotations of each image, which "
            "config.data.rand_augment would distort differently; leave one of them out"
        )
    if height != width:
        raise UserError(
            f"the loss term {name} rotates images and needs square ones, found {height}x{width}; "
            "crop or resize them to squares"
        )
    if dataset.train.streamed:
        raise UserError(
            f"the loss term {name} crops each rotation of an image separately, which streamed "
            "images do not allow; set --config.data.streaming=False"
        )


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

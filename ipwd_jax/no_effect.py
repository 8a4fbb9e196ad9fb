"""Settings that are allowed, but have no effect in the run that they belong to."""

import collections
import dataclasses
from collections.abc import Iterator

from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import losses

# How a teacher is found and asked. Its recipe is left out: configs share it between methods with
# and without a teacher.
_OF_TEACHER = {"workdir", "pretrained", "which", "train_mode", "view_cache", "look_ahead", "fold"}


def warnings(config: ConfigDict) -> list[str]:
    """Return a sentence about each group of settings that have no effect for the same reason.

    Args:
        config: a config of valid values, as `validate.validate` accepts them.
    """
    unread = collections.defaultdict(list)
    for path in _changed(config):
        if reason := _reason(config, path):
            unread[reason].append(f"config.{path}")
    lines = [
        f"{', '.join(paths)} {'have' if len(paths) > 1 else 'has'} no effect, because {reason}"
        for reason, paths in unread.items()
    ]
    return [*lines, *_too_late(config)]


def _changed(config: ConfigDict) -> Iterator[str]:
    """Yield the paths of the settings that are not at their defaults."""
    defaults = config_lib.flat(config_lib.default())
    for path, value in config_lib.flat(config).items():
        value = tuple(value) if isinstance(value, list) else value
        if not isinstance(value, ConfigDict) and value != defaults[path]:
            yield path


def _reason(config: ConfigDict, path: str) -> str:
    """Return why nothing reads a setting; empty if something does."""
    section, _, name = path.partition(".")
    if section == "first_stage" and not config.first_stage.epochs:
        return "config.first_stage.epochs is 0"
    if section == "teacher" and name in _OF_TEACHER and not config.teacher.name:
        return "config.teacher.name is empty"
    if path == "seed" and config.seeds:
        return f"config.seeds is {tuple(config.seeds)}"
    if path == "steps_per_call" and config.teacher.name and config.teacher.look_ahead:
        return f"config.teacher.look_ahead is {config.teacher.look_ahead}"
    if path == "data.rand_magnitude" and not config.data.rand_augment:
        return "config.data.rand_augment is 0"
    if path.endswith(("optimizer.milestones", "optimizer.decay")):
        recipe = f"{path.rpartition('.')[0]}.schedule"
        schedule = config_lib.flat(config)[recipe]
        unread = schedule != "step" and (section != "teacher" or config.teacher.name)
        return f"config.{recipe} is {schedule}" if unread else ""
    if section == "terms":
        term = name.partition(".")[0]
        if not any(stage.loss.get(term, 0) for stage in config_lib.stages(config)):
            return f"config.loss.{term} is 0"
        (instance,) = losses.create({term: 1.0}, config.terms, {}).values()
        other = instance.unread().get(name.partition(".")[2])
        return f"config.terms.{term}.{other} is {config.terms[term][other]}" if other else ""
    if section == "weighting" and name != "name":
        kind = losses.WEIGHTINGS[config.weighting.name]
        own = {field.name for field in dataclasses.fields(kind)}
        of_others = name in losses.weighting.settings().keys() - own
        useless = name == "average" and not kind.varies
        if of_others or not kind.weighs or useless:
            return f"config.weighting.name is {config.weighting.name}"
        if name in own and not kind.varies and config.weighting.batch_normalize:
            return "config.weighting.batch_normalize is True"
    return ""


def _too_late(config: ConfigDict) -> Iterator[str]:
    """Yield a sentence about each setting that would take effect after the last epoch."""
    used = {"": True, "first_stage.": config.first_stage.epochs, "teacher.": config.teacher.name}
    for prefix in (prefix for prefix, is_used in used.items() if is_used):
        section = config[prefix.rstrip(".")] if prefix else config
        late = [m for m in section.optimizer.milestones if m >= section.epochs]
        if late and section.optimizer.schedule == "step":
            yield (
                f"config.{prefix}optimizer.milestones has no effect at "
                f"{', '.join(map(str, late))}, because config.{prefix}epochs is {section.epochs}"
            )
    weighting = config.weighting
    if losses.weighting.create(weighting).weighs and weighting.start_epoch >= config.epochs:
        yield (
            f"config.weighting.name={weighting.name} has no effect, because "
            f"config.weighting.start_epoch is {weighting.start_epoch} and config.epochs is "
            f"{config.epochs}"
        )

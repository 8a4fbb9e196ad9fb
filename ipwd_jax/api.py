"""The functions that `import ipwd_jax` offers and that belong to no other module."""

import importlib.util
import pathlib
import sys
from typing import Any

from ml_collections import ConfigDict

from ipwd_jax import losses, models
from ipwd_jax.config import default as default_config
from ipwd_jax.config import flat, unknown_key
from ipwd_jax.errors import UserError
from ipwd_jax.models import create as create_model

__all__ = ["create_model", "default_config", "load_config", "networks", "terms", "weightings"]


def load_config(path: str | pathlib.Path, **changes: Any) -> ConfigDict:
    """Read the config of a file as `--config=PATH` does, and change some of its settings.

    Args:
        path: path of a file with a function `get_config`. Anything after a colon is the argument of
            that function, as in "configs/cifar_ipwd.py:resnet110,resnet32".
        changes: new value of each setting to change. A double underscore stands for the dot in the
            name of a nested setting, as in `optimizer__learning_rate=0.1`.

    Raises:
        UserError: the file is missing or raises an error; or a setting does not exist, or cannot
            have the new value.

    Examples:
        >>> config = ipwd_jax.load_config("configs/digits_ipwd.py", weighting__ratio="B")
        >>> config.weighting.name, config.weighting.ratio
        ('ipwd', 'B')
        >>> ipwd_jax.load_config("configs/cifar_ipwd.py:resnet110,resnet32").model.name
        'resnet32'
    """
    name, colon, argument = str(path).partition(":")
    module = load_module(pathlib.Path(name).expanduser())
    if not hasattr(module, "get_config"):
        raise UserError(f"{name} has no function get_config, which every config file needs")
    try:
        config = module.get_config(argument) if colon else module.get_config()
    except UserError:
        raise
    except Exception as error:  # whatever the file raises
        raise UserError(f"get_config() of {name} fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of {name} returns {config!r}, not the config")
    for key, value in changes.items():
        key = key.replace("__", ".")
        if key not in flat(config):
            raise unknown_key(key, config)
        try:
            config.update_from_flattened_dict({key: value})
        except TypeError as error:
            raise UserError(f"config.{key} cannot be {value!r}: {error}") from error
    return config


def load_module(path: pathlib.Path) -> Any:
    """Run a config file, which can add entries to the registries, and return its module.

    Raises:
        UserError: the file is missing or raises an error.
    """
    try:
        spec = importlib.util.spec_from_file_location(f"ipwd_jax_config_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ImportError("not the name of a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up there what an annotation means
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file raises
        raise UserError(
            f"the config file {path} cannot be run: {type(error).__name__}: {error}"
        ) from error
    return module


def networks() -> list[str]:
    """Return the names of the networks.

    Networks of other sizes can be named `wrn_<depth>_<width>` and `MobileNetV2_<width>`.

    Examples:
        >>> ipwd_jax.networks()[:3]
        ['resnet8', 'resnet14', 'resnet20']
    """
    return list(models.NETWORKS)


def terms() -> list[str]:
    """Return the names of all loss terms.

    Examples:
        >>> ipwd_jax.terms()[:3]
        ['ce', 'cls', 'kd']
    """
    return list(losses.TERMS)


def weightings() -> list[str]:
    """Return the names of all weightings.

    Examples:
        >>> ipwd_jax.weightings()[:4]
        ['uniform', 'constant', 'wsld', 'ipwd']
    """
    return list(losses.WEIGHTINGS)

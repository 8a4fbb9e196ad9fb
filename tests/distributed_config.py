"""The runs of `test_distributed.py`, as config files of the command line: `FILE:KIND`."""

import os

import helpers  # noqa: F401  registers "tiny_net"
from ml_collections import ConfigDict

from ipwd_jax.config import default

# Kind -> the settings that differ from those of `get_config`.
KINDS = {
    "plain": {"teacher.name": "", "loss.kd": 0.0},
    "seeds": {"teacher.name": "", "loss.kd": 0.0, "seeds": (0, 1)},
    "pskd": {"teacher.name": "", "loss.kd": 0.0, "loss.pskd": 1.0},
    "kd": {"teacher.view_cache": "off", "sync_batch_norm": False, "batch_size": 149},
    "ipwd": {
        "loss.cls": 1.0,
        "weighting.name": "ipwd",
        "weighting.average": 0.5,
        "weighting.batch_normalize": True,
        "teacher.view_cache": "all",
    },
    "crd": {"loss.crd": 0.5, "terms.crd.negatives": 64},
    "streamed": {
        "data.name": f"folder:{os.environ.get('IMAGES', '')}",
        "data.crop_padding": 0,
        "data.streaming": True,
        "data.image_size": 8,
        "data.flip": True,
        "batch_size": 16,
        "teacher.batch_size": 16,
        "loss.rkd": 0.1,
    },
}


def get_config(kind: str) -> ConfigDict:
    """Return the config of two epochs of a tiny network on the digits."""
    config = default()
    config.data.update({"name": "digits", "crop_padding": 1, "flip": False})
    config.model.name = config.teacher.name = "tiny_net"
    config.epochs, config.teacher.epochs = 2, 1
    config.batch_size = config.teacher.batch_size = 150
    config.log_every_steps = 3
    config.optimizer.milestones = config.teacher.optimizer.milestones = (1,)
    config.loss.kd = 1.0
    config.update_from_flattened_dict(KINDS[kind])
    return config

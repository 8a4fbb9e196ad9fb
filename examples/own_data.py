"""A data source of your own: some of the ten digits.

    python -m ipwd_jax.main --config=examples/own_data.py
    python -m ipwd_jax.main --config=examples/own_data.py --config.data.name=some_digits:0,8

A source is a function that returns a `Dataset`. Its arguments are `config.data` and, if the name of
the source has a colon, the text after it. `from_arrays` checks NumPy arrays and makes a `Dataset`
from them. A setting that only some sources read is refused for all others, so `USED_BY` has to
say that this one reads `test_fraction`.
"""

import numpy as np
from sklearn.datasets import load_digits

from ipwd_jax import data
from ipwd_jax.config import default


def some_digits(config, which):
    """Return the images of the digits `which`, such as "3,5", with the classes in that order."""
    digits = [int(digit) for digit in which.split(",")]
    bunch = load_digits()
    images, digit_of = np.uint8(bunch.images * 15), bunch.target
    keep = np.isin(digit_of, digits)
    labels = np.array([digits.index(digit) for digit in digit_of[keep]])
    return data.from_arrays(
        images[keep], labels, name=f"digits {which}", class_names=[*map(str, digits)],
        mean=config.mean, std=config.std, test_fraction=config.test_fraction,
    )  # fmt: skip


data.SOURCES["some_digits:DIGITS"] = some_digits
data.USED_BY["test_fraction"] += ("some_digits",)


def get_config():
    """Train resnet8 on labels only to tell 3, 5 and 8 apart."""
    config = default()
    config.name = "own_data"
    config.data.update({"name": "some_digits:3,5,8", "crop_padding": 1, "flip": False})
    config.model.name, config.epochs, config.optimizer.schedule = "resnet8", 30, "cosine"
    return config

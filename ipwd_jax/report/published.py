"""Published accuracies, to be shown beside those that were measured."""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

_FILE = pathlib.Path(__file__).with_name("published.json")


@functools.cache
def of_data(data: str) -> Mapping[str, Mapping[str, Any]]:
    """The published accuracies on a data set, empty if none are known.

    Args:
        data: name of the data set, for example "cifar100".

    Returns:
        By the name of the method in `configs/cifar_baselines.py`, or "teacher": `source`, which
        also says whether they are of the last or the best epoch, and `top1` in percent by pair,
        for example "resnet32x4 → resnet8x4".
    """
    return json.loads(_FILE.read_text()).get(data, {})

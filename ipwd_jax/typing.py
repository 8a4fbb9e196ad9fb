"""The type aliases that several modules share. At run time, this module imports none of them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax

if TYPE_CHECKING:
    from ipwd_jax.losses.base import Batch
    from ipwd_jax.models.base import Outputs

# Nested dictionaries, tuples and dataclasses whose leaves are arrays.
PyTree: TypeAlias = Any
# The function by which a step asks a teacher: `answer(inputs, images, batch) -> Outputs`.
Answer: TypeAlias = Callable[[PyTree, jax.Array, "Batch"], "Outputs"]

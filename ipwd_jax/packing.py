"""The form that a state has within a call of the step: few long vectors instead of many leaves.

On a GPU, a small array costs as much time as a large one, because launching a kernel takes longer
than the kernel. The metrics of a step are therefore kept in one vector per type. In a loop over
several steps, so are the kernels of the networks, which the optimiser then updates all at once.
Outside of the step, and so in every checkpoint, a state has its leaves by name.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
from clu.metrics import Average

from ipwd_jax.state import TrainState
from ipwd_jax.typing import PyTree


def vectors_pay() -> bool:
    """Return whether this device processes one long vector faster than many arrays."""
    return jax.default_backend() != "cpu"


def output_first(tree: PyTree) -> PyTree:
    """Move the last axis of each kernel to the front, which is the order in which cuDNN reads them.

    Without it, a GPU transposes every kernel of the networks in each step. Vectors stay as they
    are.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0) if x.ndim > 1 else x, tree)


def output_last(tree: PyTree) -> PyTree:
    """Undo `output_first`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1) if x.ndim > 1 else x, tree)


@flax.struct.dataclass
class Flat:
    """Parameters, or a pytree with their structure: kernels in one vector, the rest as leaves.

    Attributes:
        kernels: (N,), all arrays with at least two axes, one after the other (`output_first`).
        vectors: all other arrays, in the order of the leaves.
    """

    kernels: jax.Array
    vectors: tuple[jax.Array, ...]


def flatten(tree: PyTree) -> Flat:
    """Return a pytree of arrays, at least one of which is a kernel, as a `Flat`."""
    leaves = jax.tree.leaves(output_first(tree))
    kernels = [x.ravel() for x in leaves if x.ndim > 1]
    return Flat(jnp.concatenate(kernels), tuple(x for x in leaves if x.ndim < 2))


def unflatten(flat: Flat, like: PyTree) -> PyTree:
    """Return the pytree that was flattened, of which `like` has the structure and the shapes."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(output_first, like))
    shapes = [x.shape for x in leaves if x.ndim > 1]
    ends = list(itertools.accumulate(map(math.prod, shapes)))
    parts = zip(jnp.split(flat.kernels, ends[:-1]), shapes, strict=True)
    vectors = iter(flat.vectors)
    kernels = (part.reshape(shape) for part, shape in parts)
    found = [next(kernels if x.ndim > 1 else vectors) for x in leaves]
    return output_last(jax.tree.unflatten(treedef, found))


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a state is packed, and how it is unpacked.

    Attributes:
        like: shapes of the state, which is not packed.
        flat: whether parameters, and what the optimiser keeps for each of them, become a `Flat`.
    """

    like: TrainState
    flat: bool

    def pack(self, state: TrainState) -> TrainState:
        """Return the packed state."""
        return dataclasses.replace(
            state,
            params=self.pack_params(state.params),
            opt_state=self._of_params(self.pack_params, state.opt_state),
            metrics=self.pack_metrics(state.metrics),
            nonfinite=jnp.stack([state.nonfinite[name] for name in self.like.metrics]),
        )

    def unpack(self, state: TrainState) -> TrainState:
        """Return the state that was packed."""
        metrics, first = state.metrics, state.nonfinite
        names = enumerate(self.like.metrics)
        return dataclasses.replace(
            state,
            params=self.unpack_params(state.params),
            opt_state=self._of_params(self.unpack_params, state.opt_state),
            metrics={name: jax.tree.map(lambda x, i=i: x[i], metrics) for i, name in names},
            nonfinite={name: first[i] for i, name in enumerate(self.like.metrics)},
        )

    def pack_params(self, params: PyTree) -> PyTree:
        """Pack the parameters, or a pytree with their structure."""
        return flatten(params) if self.flat else params

    def unpack_params(self, params: PyTree) -> PyTree:
        """Return what `pack_params` was given."""
        return unflatten(params, self.like.params) if self.flat else params

    def pack_metrics(self, averages: Mapping[str, Average]) -> Average:
        """Return one average of vectors (M,), in the order of the metrics of the state."""
        return jax.tree.map(
            lambda *x: jnp.stack(x), *(averages[name] for name in self.like.metrics)
        )

    def _of_params(self, change: Callable[[PyTree], PyTree], opt_state: PyTree) -> PyTree:
        """Change the parts of the optimiser's state that have the structure of the parameters."""
        structure: object = jax.tree.structure(self.like.params)

        def has_it(tree: PyTree) -> bool:
            return isinstance(tree, Flat) or structure == jax.tree.structure(tree)

        return jax.tree.map(
            lambda tree: change(tree) if has_it(tree) else tree, opt_state, is_leaf=has_it
        )

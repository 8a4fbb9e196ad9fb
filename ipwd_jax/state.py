"""What a run carries from step to step: one pytree, donated to each step, saved whole."""

import dataclasses
import functools
from collections.abc import Mapping

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from clu.metrics import Average
from ml_collections import ConfigDict

from ipwd_jax import losses
from ipwd_jax.losses import weighting
from ipwd_jax.losses.base import Batch, Term
from ipwd_jax.models.base import Outputs
from ipwd_jax.models.heads import Heads
from ipwd_jax.typing import PyTree


@flax.struct.dataclass
class TrainState:
    """The state of a run.

    Attributes:
        step: scalar int32, steps taken in this stage.
        params: `{"student": …, "heads": …, "terms": {term: …}}`.
        batch_stats: `{"student": …, "heads": …, "terms": {term: …}}`.
        memory: `{"terms": {term: …}, "weighting": …}`, what is remembered of training samples.
        opt_state: of optax.
        metrics: name -> average over the epoch so far.
        nonfinite: loss name -> first step of the stage at which it was not finite, or -1.
        key: typed PRNG key from which order, crops and flips of every epoch follow; never changes.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    memory: PyTree
    opt_state: optax.OptState
    metrics: dict[str, Average]
    nonfinite: dict[str, jax.Array]
    key: jax.Array

    def network(self) -> dict[str, PyTree]:
        """The student's own variables, as its `apply` takes them."""
        return {"params": self.params["student"], "batch_stats": self.batch_stats["student"]}


def not_finite(tree: PyTree) -> list[str]:
    """Paths of the leaves of a pytree that hold a nan, an infinity, or a number near to one.

    A parameter whose square overflows (1e19 in float32) is finite, but what it multiplies is not.
    """
    leaves = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    finite = jax.device_get(_all_finite([leaf for _, leaf in leaves]))
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, _), good in zip(leaves, finite, strict=True)
        if not good
    ]


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(jnp.square(leaf)).all() for leaf in leaves]


def order_key(key: jax.Array) -> jax.Array:
    """The key from which the order of the samples is drawn."""
    return jax.random.fold_in(key, 1)


def augment_key(key: jax.Array) -> jax.Array:
    """The key from which the views of the samples are drawn."""
    return jax.random.fold_in(key, 2)


def terms_key(key: jax.Array) -> jax.Array:
    """The key from which terms draw."""
    return jax.random.fold_in(key, 3)


def network_shapes(network: nn.Module, image_shape: tuple[int, ...]) -> dict[str, PyTree]:
    """Shapes and dtypes of the variables of a network for images of shape (H, W, channels)."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def init_state(
    seed: int,
    network: nn.Module,
    heads: Heads,
    terms: Mapping[str, Term],
    teacher: nn.Module | None,
    weighting_config: ConfigDict,
    image_shape: tuple[int, ...],
    train_size: int,
) -> TrainState:
    """The state before the first step, without an optimiser's (see `begin_stage`).

    Args:
        seed: of every random number of the run.
        network: the student.
        heads: its extra heads.
        terms: the terms of all stages.
        teacher: the teacher's network, of which only shapes are used.
        weighting_config: `config.weighting`.
        image_shape: (H, W, channels).
        train_size: number of training samples.
    """
    key = jax.random.key(seed)
    student_key, heads_key, init_key = jax.random.split(jax.random.fold_in(key, 0), 3)
    variables = jax.jit(network.init)(student_key, jnp.zeros((1, *image_shape)))

    batch = _batch_of_zeros(image_shape, train_size, key)
    student = _outputs_of_zeros(network, batch.image)
    teacher_outputs = _outputs_of_zeros(teacher, batch.image) if teacher else None
    of_heads = heads.init(heads_key, student.embedding, batch.image, False)
    student = dataclasses.replace(
        student, extra_logits={name: jnp.zeros_like(student.logits) for name in heads.sources}
    )
    weighting.check(weighting_config, student, teacher_outputs, batch)
    term_variables = {
        name: _init_term(jax.random.fold_in(init_key, i), term, student, teacher_outputs, batch)
        for i, (name, term) in enumerate(sorted(terms.items()))
    }

    def collection(name: str) -> dict[str, PyTree]:
        return {term: v[name] for term, v in term_variables.items() if name in v}

    return TrainState(
        step=jnp.int32(0),
        params={
            "student": variables["params"],
            "heads": of_heads.get("params", {}),
            "terms": collection("params"),
        },
        batch_stats={
            "student": variables.get("batch_stats", {}),
            "heads": of_heads.get("batch_stats", {}),
            "terms": collection("batch_stats"),
        },
        memory={
            "terms": collection("memory"),
            "weighting": weighting.init_memory(weighting_config, train_size),
        },
        opt_state=(),
        metrics={},
        nonfinite={},
        key=key,
    )


def _batch_of_zeros(image_shape: tuple[int, ...], train_size: int, key: jax.Array) -> Batch:
    """Two samples, of which only shapes and types matter."""
    rows = jnp.zeros(2, jnp.int32)
    return Batch(
        image=jnp.zeros((2, *image_shape)),
        label=rows,
        index=rows,
        view=rows,
        mask=jnp.ones(2),
        epoch=jnp.int32(0),
        train_labels=jnp.zeros(train_size, jnp.int32),
        key=key,
    )


def _outputs_of_zeros(network: nn.Module, image: jax.Array) -> Outputs:
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: network.init_with_output(key, image)[0])
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _init_term(
    key: jax.Array, term: Term, student: Outputs, teacher: Outputs | None, batch: Batch
) -> dict[str, PyTree]:
    """The variables of a term."""
    seen = student, teacher
    if term.rotations:
        seen = jax.tree.map(lambda x: jnp.repeat(x, 4, axis=0), seen)
    if hasattr(term, "axis_name"):
        term = term.clone(axis_name=None)  # nothing is mapped here
    return jax.jit(functools.partial(losses.init, term))(key, *seen, batch)


def begin_stage(
    state: TrainState, optimizer: optax.GradientTransformation, metric_names: list[str]
) -> TrainState:
    """The state at the first step of a stage: a fresh optimiser, counters at zero."""
    return dataclasses.replace(
        state,
        step=jnp.int32(0),
        opt_state=optimizer.init(state.params),
        metrics={name: Average.empty() for name in metric_names},
        nonfinite={name: jnp.int32(-1) for name in metric_names},
    )

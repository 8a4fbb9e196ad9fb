"""The state of a run: a pytree that is donated to each step and saved in full."""

import contextlib
import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu.metrics import Average
from flax.errors import FlaxError
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ipwd_jax import losses
from ipwd_jax.losses import weighting
from ipwd_jax.losses.base import Batch, Term, as_seen
from ipwd_jax.losses.taps import only_declared
from ipwd_jax.models.base import Outputs
from ipwd_jax.models.heads import Heads
from ipwd_jax.typing import PyTree


@flax.struct.dataclass
class TrainState:
    """The state of a run.

    Attributes:
        step: scalar int32, number of steps taken in this stage.
        params: `{"student": …, "heads": …, "terms": {term: …}}`.
        batch_stats: `{"student": …, "heads": …, "terms": {term: …}}`.
        memory: `{"terms": {term: …}, "weighting": …}`, what is stored about training samples.
        opt_state: state of the optax optimiser.
        metrics: `{name: Average}`, the average of each metric over the epoch so far.
        nonfinite: `{name: scalar int32}`, the index of the first step of the stage at which the
            metric was not finite, or -1.
        key: typed PRNG key from which the order, the crops and flips, and the random draws of the
            terms are derived in every epoch; it never changes.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    memory: PyTree
    opt_state: optax.OptState
    metrics: PyTree
    nonfinite: PyTree
    key: jax.Array

    def network(self) -> dict[str, PyTree]:
        """Return the student's own variables, as its `apply` takes them."""
        return {"params": self.params["student"], "batch_stats": self.batch_stats["student"]}

    def replace_network(self, variables: Mapping[str, PyTree]) -> "TrainState":
        """Return the state with the student's own variables, as `network` returns them."""
        return dataclasses.replace(
            self,
            params={**self.params, "student": variables["params"]},
            batch_stats={**self.batch_stats, "student": variables["batch_stats"]},
        )


def not_finite(tree: PyTree) -> list[str]:
    """Return the paths of the leaves that hold NaN, infinity or a number close to overflow.

    A number counts as close to overflow if its square overflows (from about 1.8e19 in float32).
    Such a number is still finite, but its products can overflow.
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
    """Return the key from which the order of the samples is drawn."""
    return jax.random.fold_in(key, 1)


def augment_key(key: jax.Array) -> jax.Array:
    """Return the key from which the views of the samples are drawn."""
    return jax.random.fold_in(key, 2)


def terms_key(key: jax.Array) -> jax.Array:
    """Return the key for the random draws of the terms."""
    return jax.random.fold_in(key, 3)


def classifier_key(key: jax.Array) -> jax.Array:
    """Return the key from which a classifier without a bias is drawn."""
    return jax.random.fold_in(key, 4)


def network_shapes(network: nn.Module, image_shape: tuple[int, ...]) -> dict[str, PyTree]:
    """Return the shapes and dtypes of a network's variables for images (H, W, channels)."""
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
    """Return the state before the first step, without optimiser state (see `begin_stage`).

    Args:
        seed: seed of all random numbers of the run.
        network: the student.
        heads: the student's extra heads.
        terms: the terms of all stages, by name.
        teacher: the teacher's network, of which only the shapes of its outputs are used.
        weighting_config: `config.weighting`.
        image_shape: (H, W, channels).
        train_size: number of training samples.

    Raises:
        ValueError: a term or the weighting cannot process outputs of these shapes.
    """
    key = jax.random.key(seed)
    student_key, heads_key, init_key = jax.random.split(jax.random.fold_in(key, 0), 3)
    variables = jax.jit(network.init)(student_key, jnp.zeros((1, *image_shape)))
    batch = batch_of_zeros(image_shape, train_size, key)
    student = outputs_of_zeros(network, batch.image)
    teacher_outputs = outputs_of_zeros(teacher, batch.image) if teacher else None
    of_heads = heads.init(heads_key, student.embedding, batch.image, False)
    kind = weighting.create(weighting_config)
    student = dataclasses.replace(
        student, extra_logits={name: jnp.zeros_like(student.logits) for name in heads.sources}
    )
    with _explained(f"config.weighting.name={weighting_config.name}", kind.weights, kind):
        weighting.check(weighting_config, student, teacher_outputs, batch)
    term_variables = {
        name: _init_term(
            jax.random.fold_in(init_key, i), name, term, student, teacher_outputs, batch
        )
        for i, (name, term) in enumerate(sorted(terms.items()))
    }

    def of_terms(collection: str) -> dict[str, PyTree]:
        return {k: v[collection] for k, v in term_variables.items() if collection in v}

    def of_all(collection: str) -> dict[str, PyTree]:
        networks = {"student": variables, "heads": of_heads}
        inside = {name: tree.get(collection, {}) for name, tree in networks.items()}
        return {**inside, "terms": of_terms(collection)}

    of_weighting = weighting.init_memory(weighting_config, train_size)
    return TrainState(
        step=jnp.int32(0),
        params=of_all("params"),
        batch_stats=of_all("batch_stats"),
        memory={"terms": of_terms("memory"), "weighting": of_weighting},
        opt_state=(),
        metrics={},
        nonfinite={},
        key=key,
    )


def batch_of_zeros(image_shape: tuple[int, ...], train_size: int, key: jax.Array) -> Batch:
    """Return a batch of two samples, of which only the shapes and types matter."""
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


def outputs_of_zeros(network: nn.Module, image: jax.Array) -> Outputs:
    """Return the outputs of a network for images (B, H, W, channels), with zeros in all arrays."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: network.init_with_output(key, image)[0])
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _init_term(
    key: jax.Array, name: str, term: Term, student: Outputs, teacher: Outputs | None, batch: Batch
) -> dict[str, PyTree]:
    """Return the variables of a term, which is shown only what it declares of the teacher."""
    seen = [as_seen(term, x) for x in (student, only_declared(teacher, term.teacher_taps))]
    if hasattr(term, "axis_name"):
        term = term.clone(axis_name=None)  # initialisation is not mapped over the devices
    with _explained(f"the loss term {name}", type(term).__call__, term):
        variables = jax.jit(functools.partial(losses.init, term))(key, *seen, batch)
        # Flax lets `init` draw numbers that a step would refuse.
        for method in [None, "pretrain"] if term.first_stage_params else [None]:
            apply = functools.partial(term.apply, mutable=["batch_stats", "memory"], method=method)
            jax.eval_shape(apply, variables, *seen, batch)
        return variables


@contextlib.contextmanager
def _explained(
    what: str, function: Callable, declares: Term | weighting.Weighting
) -> Iterator[None]:
    """Say where a function of a term or a weighting fails, and what it may read of the teacher."""
    try:
        yield
    except (AttributeError, IndexError, TypeError, FlaxError) as error:
        file = inspect.unwrap(function).__code__.co_filename
        frames = [x for x in traceback.extract_tb(error.__traceback__) if x.filename == file]
        place = f" ({file}, line {frames[-1].lineno})" if frames else ""
        raise ValueError(
            f"{what} cannot be computed{place}: {type(error).__name__}: {error}. Of the teacher it "
            f"sees only what its teacher_taps name: {', '.join(declares.teacher_taps) or 'none'}."
        ) from error


def with_network(
    state: TrainState, variables: Mapping[tuple[str, ...], np.ndarray | jax.Array]
) -> TrainState:
    """Return the state with some of the student's variables replaced.

    Args:
        state: a state on one device.
        variables: the new values by their paths, such as `("params", "fc", "kernel")`.
    """
    # Copies, because the step reuses the memory of the state that it is given.
    new = {k: jnp.array(x) for k, x in variables.items()}
    flat = flatten_dict(state.network(), keep_empty_nodes=True)
    return state.replace_network(unflatten_dict(flat | new))


def begin_stage(
    state: TrainState, optimizer: optax.GradientTransformation, metric_names: list[str]
) -> TrainState:
    """Return the state at the first step of a stage, with fresh optimiser state and metrics."""
    return dataclasses.replace(
        state,
        step=jnp.int32(0),
        opt_state=optimizer.init(state.params),
        metrics={name: Average.empty() for name in metric_names},
        nonfinite={name: jnp.int32(-1) for name in metric_names},
    )

"""The train step, written for the rows of one device with collectives over `parallel.AXIS`."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from clu.metrics import Average
from jax import lax
from ml_collections import ConfigDict

from ipwd_jax import precision
from ipwd_jax.data import augment
from ipwd_jax.data.resident import Resident
from ipwd_jax.losses.base import Batch, Term
from ipwd_jax.losses.weighting import weigh
from ipwd_jax.models.base import BatchNorm, Outputs
from ipwd_jax.models.heads import Heads
from ipwd_jax.parallel import AXIS
from ipwd_jax.state import TrainState, augment_key, terms_key

# Fields of a `Batch` that have a row for each sample.
_ROWS = ("image", "label", "index", "view", "mask")


def metric_names(terms: Mapping[str, Term]) -> list[str]:
    """What the train step averages over an epoch: `loss`, each term, and `top1` (a share)."""
    return ["loss", *sorted(terms), "top1"]


def teacher_taps(config: ConfigDict, terms: Mapping[str, Term]) -> frozenset[str]:
    """Fields of the teacher's `Outputs` that a stage with these terms reads."""
    taps = {tap for term in terms.values() for tap in term.teacher_taps}
    return frozenset(taps | ({"logits"} if config.weighting.name == "wsld" else set()))


def make_train_step(
    config: ConfigDict,
    stage: ConfigDict,
    network: nn.Module,
    heads: Heads,
    terms: Mapping[str, Term],
    teacher: Callable[..., Outputs] | None,
    optimizer: optax.GradientTransformation,
    trainable: Any,
    steps_per_epoch: int,
) -> Callable:
    """Builds the step of one stage.

    The loss is the sum over terms of `stage.loss[name]` times the mean over the global batch of
    the term's per-sample loss, multiplied by the weighting for the terms that it names.

    Args:
        config: of the run.
        stage: of `config.stages`.
        network: the student.
        heads: its extra heads.
        terms: the active terms of this stage.
        teacher: `teacher(inputs, images, batch) -> Outputs`, as `teacher.Teacher.answer`; None:
            there is none.
        optimizer: of `optim.sgd`.
        trainable: bools like `TrainState.params`; other leaves stay as they are, and the
            BatchNorm layers among them keep their running statistics and normalise by these.
        steps_per_epoch: steps of one epoch.

    Returns:
        `step(state, data, teacher_inputs, index, mask, streamed=None) -> state` for one device's
        rows of K steps of one epoch: `index` (K, B) int32 into `data`, `mask` (K, B) float32,
        `streamed` (K, B, H, W, channels) uint8 where the images are not in `data`.
    """
    padding, flip = config.data.crop_padding, config.data.flip
    rotated = any(term.rotations for term in terms.values())
    taps = teacher_taps(config, terms)
    weighted = config.weighting.terms if config.weighting.name != "uniform" else ()
    frozen_norms = _frozen_modules(trainable["student"])

    def load(
        state: TrainState,
        data: Resident,
        index: jax.Array,
        mask: jax.Array,
        streamed: jax.Array | None,
    ):
        """The batch, and the images that the networks see: (B, ...), or (4 B, ...) if rotated."""
        epoch = state.step // steps_per_epoch
        key = augment_key(state.key)
        if streamed is not None:  # cropped and mirrored by the host
            view, images = jnp.zeros_like(index), streamed
        elif rotated:
            views = augment.draw_rotated_views(key, epoch, index, padding, flip)
            view = views[:, 0]
            images = augment.apply_rotated_views(data.images[index], views, padding, flip)
        else:
            view = augment.draw_views(key, epoch, index, augment.num_views(padding, flip))
            images = augment.apply_views(data.images[index], view, padding, flip)
        images = augment.normalize(images, data.mean, data.std)
        batch = Batch(
            image=_upright(images) if rotated else images,
            label=data.labels[index],
            index=index,
            view=view,
            mask=mask,
            epoch=epoch,
            train_labels=data.labels,
            key=jax.random.fold_in(terms_key(state.key), epoch),
        )
        return batch, images

    def ask(inputs: Any, images: jax.Array, batch: Batch) -> Outputs | None:
        if not taps:
            return None
        answers = teacher(inputs, images, batch)
        # What no term reads is not kept, so that it is never computed.
        unread = {"features", "preact"} - taps
        return precision.at_least_float32(answers.replace(**dict.fromkeys(unread, ())))

    def forward(params: Any, batch_stats: Any, batch: Batch, images: jax.Array):
        mask = jnp.repeat(batch.mask, 4) if rotated else batch.mask
        low = precision.cast(config.precision, (params["student"], images))
        with _without_training(frozen_norms):
            student, updated = network.apply(
                {"params": low[0], "batch_stats": batch_stats["student"]},
                low[1],
                train=True,
                mask=mask,
                mutable=["batch_stats"],
            )
        student = precision.at_least_float32(student)
        embedding = _upright(student.embedding) if rotated else student.embedding
        extra, of_heads = heads.apply(
            {"params": params["heads"], "batch_stats": batch_stats["heads"]},
            embedding,
            batch.image,
            True,
            batch.mask,
            mutable=["batch_stats"],
        )
        stats = {"student": updated["batch_stats"], "heads": of_heads.get("batch_stats", {})}
        return student, extra, stats

    def apply_terms(state: TrainState, params: Any, seen: Callable, batch: Batch):
        values, batch_stats, memory = {}, {}, {}
        for name, term in terms.items():
            variables = {
                "params": params["terms"],
                "batch_stats": state.batch_stats["terms"],
                "memory": state.memory["terms"],
            }
            variables = {k: v[name] for k, v in variables.items() if name in v}
            pretrains = stage.name == "first" and term.first_stage_params
            values[name], updated = term.apply(
                variables,
                *seen(term),
                batch,
                mutable=["batch_stats", "memory"],
                method="pretrain" if pretrains else None,
            )
            batch_stats |= {name: updated["batch_stats"]} if "batch_stats" in updated else {}
            memory |= {name: updated["memory"]} if "memory" in updated else {}
        return values, state.batch_stats["terms"] | batch_stats, state.memory["terms"] | memory

    def update(state: TrainState, batch: Batch, images: jax.Array, answers: Outputs | None):
        mask = batch.mask
        count = lax.psum(mask.sum(), AXIS)

        def loss_fn(params):
            outputs, extra, stats = forward(params, state.batch_stats, batch, images)
            student = (_upright(outputs) if rotated else outputs).replace(extra_logits=extra)
            teacher_outputs = _upright(answers) if rotated else answers
            weights, weighting_memory = weigh(
                config.weighting, student, teacher_outputs, batch, state.memory["weighting"], AXIS
            )

            def seen(term: Term) -> tuple[Outputs, Outputs | None]:
                return (outputs, answers) if term.rotations else (student, teacher_outputs)

            values, term_stats, term_memory = apply_terms(state, params, seen, batch)
            values = {n: _weigh(v, weights if n in weighted else None) for n, v in values.items()}
            loss = sum(stage.loss[name] * value for name, value in values.items())
            correct = student.logits.argmax(axis=1) == batch.label
            averages = {"loss": loss, **values, "top1": correct.astype(jnp.float32)}
            return (jnp.broadcast_to(loss, mask.shape) * mask).sum() / count, (
                {**stats, "terms": term_stats},
                {"terms": term_memory, "weighting": weighting_memory},
                {
                    name: Average.from_model_output(jnp.broadcast_to(v, mask.shape), mask=mask)
                    for name, v in averages.items()
                },
            )

        grads, (batch_stats, memory, averages) = jax.grad(loss_fn, has_aux=True)(state.params)
        # Each device differentiated its share of the global mean; their sum is the gradient.
        grads, averages = lax.psum((grads, averages), AXIS)
        if not config.sync_batch_norm:
            batch_stats = lax.pmean(batch_stats, AXIS)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda u, t: u if t else jnp.zeros_like(u), updates, trainable)
        new_epoch = state.step % steps_per_epoch == 0
        return state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            memory=memory,
            opt_state=opt_state,
            metrics={
                name: jax.tree.map(
                    lambda old, new: jnp.where(new_epoch, new, old + new),
                    state.metrics[name],
                    average,
                )
                for name, average in averages.items()
            },
            nonfinite={
                name: jnp.where(
                    (first < 0) & ~jnp.isfinite(averages[name].total), state.step, first
                )
                for name, first in state.nonfinite.items()
            },
        )

    def step(
        state: TrainState,
        data: Resident,
        teacher_inputs: Any,
        index: jax.Array,
        mask: jax.Array,
        streamed: jax.Array | None = None,
    ) -> TrainState:
        def take(state: TrainState, batch: Batch, images: jax.Array, answers: Outputs | None):
            return update(state, batch, images, answers), None

        def one(state: TrainState, rows: tuple[jax.Array, jax.Array, jax.Array | None]):
            batch, images = load(state, data, *rows)
            return take(state, batch, images, ask(teacher_inputs, images, batch))

        def ahead(state: TrainState):
            """All rows of the call at once, cut into steps."""
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (index, mask, streamed))
            batch, images = load(state, data, *flat)
            answers = ask(teacher_inputs, images, batch)
            rows = {name: getattr(batch, name) for name in _ROWS}
            cut = jax.tree.map(
                lambda x: x.reshape(len(index), -1, *x.shape[1:]), (rows, images, answers)
            )
            return lambda state, xs: take(state, batch.replace(**xs[0]), *xs[1:]), cut

        with precision.of_products(config.precision):
            if len(index) == 1:
                return one(state, jax.tree.map(lambda x: x[0], (index, mask, streamed)))[0]
            look_ahead = taps and config.teacher.look_ahead > 1
            body, rows = ahead(state) if look_ahead else (one, (index, mask, streamed))
            # A convolution's weight gradient inside a loop is many times slower on a CPU.
            unroll = len(index) if jax.default_backend() == "cpu" else 1
            return lax.scan(body, state, rows, unroll=unroll)[0]

    return step


def _weigh(value: Any, weights: jax.Array | None) -> jax.Array:
    """A term's loss times weights, which leave alone the labels' part of one that has two parts."""
    of_labels, of_teacher = value if isinstance(value, tuple) else (0.0, value)
    return of_labels + (of_teacher if weights is None else of_teacher * weights)


def _upright(tree: Any) -> Any:
    """Of four rotations the first: (4 B, ...) -> (B, ...) in every leaf."""
    return jax.tree.map(lambda x: x[::4], tree)


def _frozen_modules(trainable: Any) -> frozenset[tuple[str, ...]]:
    """Paths of the modules of which no parameter is trained."""
    leaves = jax.tree_util.tree_leaves_with_path(trainable)
    paths = [(tuple(entry.key for entry in path[:-1]), trained) for path, trained in leaves]
    return frozenset(p for p, _ in paths) - {p for p, trained in paths if trained}


@contextlib.contextmanager
def _without_training(modules: frozenset[tuple[str, ...]]) -> Iterator[None]:
    """Within it the BatchNorm layers among `modules` are in inference mode."""

    def freeze(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        layer = context.module
        if isinstance(layer, BatchNorm) and context.method_name == "__call__":
            kwargs = {**kwargs, "frozen": layer.path in modules}
        return call(*args, **kwargs)

    with nn.intercept_methods(freeze) if modules else contextlib.nullcontext():
        yield

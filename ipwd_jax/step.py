"""The train step, written for the rows of one device with collectives over `parallel.AXIS`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from clu.metrics import Average
from jax import lax
from ml_collections import ConfigDict

from ipwd_jax.data import augment
from ipwd_jax.data.resident import Resident
from ipwd_jax.losses.base import Batch
from ipwd_jax.losses.weighting import weigh
from ipwd_jax.models.base import Outputs
from ipwd_jax.models.heads import Heads
from ipwd_jax.parallel import AXIS
from ipwd_jax.state import TrainState, augment_key


def metric_names(terms: dict[str, nn.Module]) -> list[str]:
    """What the train step averages over an epoch: `loss`, each term, and `top1` (a share)."""
    return ["loss", *sorted(terms), "top1"]


def make_train_step(
    config: ConfigDict,
    stage: ConfigDict,
    network: nn.Module,
    heads: Heads,
    terms: dict[str, nn.Module],
    teacher: nn.Module | None,
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
        teacher: the teacher's network, or None.
        optimizer: of `optim.sgd`.
        trainable: bools like `TrainState.params`; other leaves stay as they are.
        steps_per_epoch: steps of one epoch.

    Returns:
        `step(state, data, teacher_variables, index, mask) -> state` for one device's rows: `index`
        (B,) int32 into `data`, `mask` (B,) float32.
    """
    padding, flip = config.data.crop_padding, config.data.flip
    views = augment.num_views(padding, flip)
    needs_teacher = teacher is not None and (
        any(term.needs_teacher for term in terms.values()) or config.weighting.name == "wsld"
    )
    weighted = config.weighting.terms if config.weighting.name != "uniform" else ()

    def load(state: TrainState, data: Resident, index: jax.Array, mask: jax.Array) -> Batch:
        epoch = state.step // steps_per_epoch
        view = augment.draw_views(augment_key(state.key), epoch, index, views)
        image = augment.apply_views(data.images[index], view, padding, flip)
        return Batch(
            image=augment.normalize(image, data.mean, data.std),
            label=data.labels[index],
            index=index,
            view=view,
            mask=mask,
            epoch=epoch,
        )

    def forward(params: Any, batch_stats: Any, batch: Batch) -> tuple[Outputs, Any]:
        variables = {"params": params["student"], "batch_stats": batch_stats["student"]}
        student, updated = network.apply(
            variables, batch.image, train=True, mask=batch.mask, mutable=["batch_stats"]
        )
        extra = heads.apply({"params": params["heads"]}, student.embedding)
        return student.replace(extra_logits=extra), updated["batch_stats"]

    def apply_terms(state: TrainState, params: Any, student: Outputs, teacher_outputs, batch):
        values, batch_stats, memory = {}, {}, {}
        for name, term in terms.items():
            variables = {
                "params": params["terms"],
                "batch_stats": state.batch_stats["terms"],
                "memory": state.memory["terms"],
            }
            variables = {k: v[name] for k, v in variables.items() if name in v}
            values[name], updated = term.apply(
                variables, student, teacher_outputs, batch, mutable=["batch_stats", "memory"]
            )
            batch_stats |= {name: updated["batch_stats"]} if "batch_stats" in updated else {}
            memory |= {name: updated["memory"]} if "memory" in updated else {}
        return values, state.batch_stats["terms"] | batch_stats, state.memory["terms"] | memory

    def step(
        state: TrainState, data: Resident, teacher_variables: Any, index: jax.Array, mask: jax.Array
    ) -> TrainState:
        batch = load(state, data, index, mask)
        teacher_outputs = teacher.apply(teacher_variables, batch.image) if needs_teacher else None
        count = lax.psum(mask.sum(), AXIS)

        def loss_fn(params):
            student, student_stats = forward(params, state.batch_stats, batch)
            weights, weighting_memory = weigh(
                config.weighting,
                student,
                teacher_outputs,
                batch,
                state.memory["weighting"],
                AXIS,
            )
            values, term_stats, term_memory = apply_terms(
                state, params, student, teacher_outputs, batch
            )
            values = {n: v * weights if n in weighted else v for n, v in values.items()}
            loss = sum(stage.loss[name] * value for name, value in values.items())
            correct = student.logits.argmax(axis=1) == batch.label
            averages = {"loss": loss, **values, "top1": correct.astype(jnp.float32)}
            return (jnp.broadcast_to(loss, mask.shape) * mask).sum() / count, (
                {"student": student_stats, "terms": term_stats},
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

    return step

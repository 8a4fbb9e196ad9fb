"""The train step, in the order of its computation.

`train_step` takes a state through the steps of one call. Each step loads a batch (`load_batch`),
asks the teacher about it (`ask_teacher`), runs the student and its heads (`forward`), applies the
loss terms (`apply_terms`), differentiates their weighted sum (`loss_and_updates`) and updates the
state (`update`). All functions process the rows of one device and communicate with the other
devices by collectives over `parallel.AXIS`.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from clu.metrics import Average
from jax import lax

from ipwd_jax import precision
from ipwd_jax.data import views
from ipwd_jax.data.resident import Resident
from ipwd_jax.losses import weighting
from ipwd_jax.losses.base import Batch
from ipwd_jax.losses.taps import only_declared
from ipwd_jax.models.base import Outputs, frozen_norms
from ipwd_jax.models.heads import Heads
from ipwd_jax.packing import Packing
from ipwd_jax.parallel import AXIS
from ipwd_jax.stages import Stage
from ipwd_jax.state import TrainState, augment_key, terms_key
from ipwd_jax.typing import Answer, PyTree

# Fields of a `Batch` that have one row per sample.
_ROWS = ("image", "label", "index", "view", "mask", "partner_label", "share", "strong_image")


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """The static part of the steps of one stage, as `assemble.Experiment.step_spec` returns it.

    The loss is the sum over the terms of `stage.loss[name]` times the mean of the term's loss
    over the global batch. The losses of the terms that the weighting names are first multiplied by
    the per-sample weights, except for the part that `Term.label_loss` returns.

    Attributes:
        augmentation: the random changes of the images.
        precision: number format of convolutions and matrix products; see `ipwd_jax.precision`.
        sync_batch_norm: whether batch statistics are already those of the global batch.
        look_ahead: whether the teacher is asked about the images of all steps of a call at once.
        steps_per_epoch: number of steps in an epoch.
        network: the student.
        heads: the student's extra heads.
        stage: the stage, with its terms, weighting, optimiser and trained parameters. A BatchNorm
            layer that trains none of its parameters normalises by its running statistics and leaves
            them unchanged.
        answer: the function by which the teacher is asked, or None if there is no teacher.
        flat: whether a call of several steps keeps the kernels of the networks, and what the
            optimiser keeps for each of their numbers, in vectors (`packing.Flat`). The optimiser
            must then change every number independently of the others.
    """

    augmentation: views.Augmentation
    precision: str
    sync_batch_norm: bool
    look_ahead: bool
    steps_per_epoch: int
    network: nn.Module
    heads: Heads
    stage: Stage
    answer: Answer | None
    flat: bool


def train_step(
    spec: StepSpec,
    state: TrainState,
    data: Resident,
    teacher_inputs: PyTree,
    index: jax.Array,
    mask: jax.Array,
    streamed: jax.Array | None = None,
) -> TrainState:
    """Return the state after the K steps of one call, which all belong to the same epoch.

    Args:
        spec: static part of the steps.
        state: the state before the call.
        data: the training split on the device.
        teacher_inputs: the inputs that `spec.answer` reads.
        index: (K, B) int32, positions in `data` of the rows of one device.
        mask: (K, B) float32, 0 for padding rows and 1 for all others.
        streamed: (K, B, H, W, channels) uint8, the images if they are streamed, else None; or
            (K, B, 2, H, W, channels), two crops of each, if some stage has a strong view.
    """
    packing = Packing(jax.eval_shape(lambda: state), spec.flat and len(index) > 1)

    def one(state: TrainState, rows: PyTree) -> tuple[TrainState, None]:
        batch, images = load_batch(spec, state, data, *rows)
        answers = ask_teacher(spec, teacher_inputs, images, batch)
        return update(spec, packing, state, batch, images, answers), None

    def ahead(state: TrainState) -> tuple[Callable, PyTree]:
        """Ask the teacher about all rows of the call at once, and split its answers into steps."""
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (index, mask, streamed))
        batch, images = load_batch(spec, state, data, *flat)
        answers = ask_teacher(spec, teacher_inputs, images, batch)
        assert answers is not None
        rows = {name: getattr(batch, name) for name in _ROWS}
        classifier, of_rows = answers.classifier, dataclasses.replace(answers, classifier=None)
        cut = jax.tree.map(
            lambda x: x.reshape(len(index), -1, *x.shape[1:]), (rows, images, of_rows)
        )

        def answered(state: TrainState, step: PyTree) -> tuple[TrainState, None]:
            rows, images, of_rows = step
            this = dataclasses.replace(batch, **rows)
            answers = dataclasses.replace(of_rows, classifier=classifier)
            return update(spec, packing, state, this, images, answers), None

        return answered, cut

    with precision.of_products(spec.precision):
        looks_ahead = spec.look_ahead and spec.stage.teacher_taps and len(index) > 1
        body, rows = ahead(state) if looks_ahead else (one, (index, mask, streamed))
        packed = packing.pack(state)
        if len(index) == 1:
            packed, _ = body(packed, jax.tree.map(lambda x: x[0], rows))
        else:
            # On a CPU, the gradient of a convolution with respect to its kernel is many times
            # slower inside a loop.
            unroll = len(index) if jax.default_backend() == "cpu" else 1
            packed, _ = lax.scan(body, packed, rows, unroll=unroll)
        return packing.unpack(packed)


def load_batch(
    spec: StepSpec,
    state: TrainState,
    data: Resident,
    index: jax.Array,
    mask: jax.Array,
    streamed: jax.Array | None,
) -> tuple[Batch, jax.Array]:
    """Return the augmented batch (B, ...), and the images that the networks see.

    These are the images of the batch, or (4 B, ...) if the networks see them in four rotations.
    """
    epoch = state.step // spec.steps_per_epoch
    how, key, second = spec.augmentation, augment_key(state.key), None
    if streamed is not None and streamed.ndim == 5:
        streamed, second = streamed[:, 0], streamed[:, 1]
    images, view, mixed = views.load(how, key, epoch, data, index, streamed, spec.stage.rotated)
    strong_image = None
    if spec.stage.strong_view:
        strong_image = views.strong(how, key, epoch, data, index, second)
    batch = Batch(
        image=_upright(images) if spec.stage.rotated else images,
        label=data.labels[index],
        index=index,
        view=view,
        mask=mask,
        epoch=epoch,
        train_labels=data.labels,
        key=jax.random.fold_in(terms_key(state.key), epoch),
        strong_image=strong_image,
        **mixed,
    )
    return batch, images


def ask_teacher(spec: StepSpec, inputs: PyTree, images: jax.Array, batch: Batch) -> Outputs | None:
    """Return the teacher's answers in float32 or better, or None if nothing reads them."""
    if not spec.stage.teacher_taps:
        return None
    assert spec.answer is not None
    answers = spec.answer(inputs, images, batch)
    # What nothing reads is dropped here, so that it is never computed.
    return precision.at_least_float32(only_declared(answers, spec.stage.teacher_taps))


def forward(
    spec: StepSpec, params: PyTree, batch_stats: PyTree, batch: Batch, images: jax.Array
) -> tuple[Outputs, dict[str, jax.Array], PyTree]:
    """Run the student and its heads in training mode; the heads see no strong view.

    Returns:
        The outputs of the student, the logits of its heads by name, and the new running statistics
        of both.
    """
    mask = jnp.repeat(batch.mask, 4) if spec.stage.rotated else batch.mask
    cast = functools.partial(precision.cast, spec.precision)

    def run(images: jax.Array, batch_stats: PyTree) -> tuple[Outputs, PyTree]:
        outputs, updated = spec.network.apply(
            {
                "params": cast(params["student"]),
                "batch_stats": batch_stats,
                "frozen": frozen_norms(spec.stage.trainable["student"]),
            },
            cast(images),
            train=True,
            mask=mask,
            mutable=["batch_stats"],
        )
        return precision.at_least_float32(outputs), updated.get("batch_stats", {})

    student, of_student = run(images, batch_stats["student"])
    if batch.strong_image is not None:
        strong, of_student = run(batch.strong_image, of_student)
        student = student.with_strong(strong)
    of_heads, image = params["heads"], batch.image
    if spec.heads.network is not None:  # it has the student's precision; linear heads do not
        of_heads = {**of_heads, "network": cast(of_heads["network"])}
        image = cast(image)
    extra, updated_heads = spec.heads.apply(
        {
            "params": of_heads,
            "batch_stats": batch_stats["heads"],
            "frozen": frozen_norms(spec.stage.trainable["heads"]),
        },
        _upright(student.embedding) if spec.stage.rotated else student.embedding,
        image,
        True,
        batch.mask,
        mutable=["batch_stats"],
    )
    stats = {"student": of_student, "heads": updated_heads.get("batch_stats", {})}
    return student, precision.at_least_float32(extra), stats


def apply_terms(
    spec: StepSpec,
    state: TrainState,
    params: PyTree,
    rotated: tuple[Outputs, Outputs | None],
    upright: tuple[Outputs, Outputs | None],
    batch: Batch,
) -> tuple[dict[str, jax.Array], PyTree, PyTree]:
    """Return the unweighted loss of each term, and the terms' new running statistics and memories.

    Args:
        spec: static part of the step.
        state: the state before the step.
        params: the parameters, in the structure of `TrainState.params`, at which the loss is
            computed.
        rotated: outputs of student and teacher for all images that they saw.
        upright: their outputs for the upright images alone.
        batch: batch of the step.
    """
    losses: dict[str, jax.Array] = {}
    batch_stats: dict[str, PyTree] = {}
    memory: dict[str, PyTree] = {}
    for name, term in spec.stage.terms.items():
        variables = {
            "params": params["terms"],
            "batch_stats": state.batch_stats["terms"],
            "memory": state.memory["terms"],
        }
        variables = {k: v[name] for k, v in variables.items() if name in v}
        frozen = frozen_norms(spec.stage.trainable["terms"].get(name, {}))
        losses[name], updated = term.apply(
            {**variables, "frozen": frozen},
            *(rotated if term.rotations else upright),
            batch,
            mutable=["batch_stats", "memory"],
            method="pretrain" if spec.stage.pretrains and term.first_stage_params else None,
        )
        batch_stats |= {name: updated["batch_stats"]} if "batch_stats" in updated else {}
        memory |= {name: updated["memory"]} if "memory" in updated else {}
    return losses, state.batch_stats["terms"] | batch_stats, state.memory["terms"] | memory


def loss_and_updates(
    spec: StepSpec,
    state: TrainState,
    params: PyTree,
    batch: Batch,
    images: jax.Array,
    answers: Outputs | None,
) -> tuple[jax.Array, tuple[PyTree, PyTree, dict[str, Average]]]:
    """Return this device's share of the mean loss, and everything else that the step computes.

    Returns:
        The share, which summed over the devices is the mean loss over the global batch; and the new
        `batch_stats`, the new `memory`, and the averages of this step by name.
    """
    outputs, extra, stats = forward(spec, params, state.batch_stats, batch, images)
    student = outputs.map_rows(_upright) if spec.stage.rotated else outputs
    student = dataclasses.replace(student, extra_logits=extra)
    teacher = answers.map_rows(_upright) if spec.stage.rotated and answers else answers
    weights, of_weighting = None, state.memory["weighting"]
    if spec.stage.weighting:
        weights, of_weighting = weighting.weigh(
            spec.stage.weighting, student, teacher, batch, of_weighting, AXIS
        )
    losses, of_terms, memory = apply_terms(
        spec, state, params, (outputs, answers), (student, teacher), batch
    )
    for name, term in spec.stage.terms.items():
        if weights is not None and spec.stage.weighting and name in spec.stage.weighting.terms:
            losses[name] = losses[name] * weights
        if (of_labels := term.label_loss(student, batch)) is not None:
            losses[name] = of_labels + losses[name]
    loss = sum(spec.stage.loss[name] * value for name, value in losses.items())
    predicted = student.logits.argmax(axis=1)
    correct = batch.over_labels(lambda label: (predicted == label).astype(jnp.float32))
    mask = batch.mask
    averages = {
        name: Average.from_model_output(jnp.broadcast_to(value, mask.shape), mask=mask)
        for name, value in {"loss": loss, **losses, "top1": correct}.items()
    }
    share = (jnp.broadcast_to(loss, mask.shape) * mask).sum() / lax.psum(mask.sum(), AXIS)
    new_memory = {"terms": memory, "weighting": of_weighting}
    return share, ({**stats, "terms": of_terms}, new_memory, averages)


def update(
    spec: StepSpec,
    packing: Packing,
    state: TrainState,
    batch: Batch,
    images: jax.Array,
    answers: Outputs | None,
) -> TrainState:
    """Return the state after one step of the optimiser; both states are packed."""

    def loss_fn(params: PyTree) -> tuple[jax.Array, PyTree]:
        return loss_and_updates(spec, state, params, batch, images, answers)

    params = packing.unpack_params(state.params)
    grads, (batch_stats, memory, averages) = jax.grad(loss_fn, has_aux=True)(params)
    # Each device has differentiated its share of the mean loss; the sum of these is the gradient.
    grads, averages = lax.psum((packing.pack_params(grads), packing.pack_metrics(averages)), AXIS)
    if not spec.sync_batch_norm:
        # Each device's running statistics are weighted by its share of the valid rows.
        share = batch.mask.sum() / lax.psum(batch.mask.sum(), AXIS)
        batch_stats = lax.psum(jax.tree.map(lambda x: share * x, batch_stats), AXIS)
    updates, opt_state = spec.stage.optimizer.update(grads, state.opt_state, state.params)
    new_epoch = state.step % spec.steps_per_epoch == 0
    first, bad = state.nonfinite, ~jnp.isfinite(averages.total)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        memory=memory,
        opt_state=opt_state,
        metrics=jax.tree.map(
            lambda old, new: jnp.where(new_epoch, new, old + new), state.metrics, averages
        ),
        nonfinite=jnp.where((first < 0) & bad, state.step, first),
    )


def _upright(rows: jax.Array) -> jax.Array:
    """Return the first of each four rotations: (4 B, ...) -> (B, ...)."""
    return rows[::4]

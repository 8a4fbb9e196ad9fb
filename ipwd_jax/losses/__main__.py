"""List the loss terms and weightings: `python -m ipwd_jax.losses [TEACHER STUDENT]`.

The column "parameters" counts the parameters that a term adds to the student, with 100 classes and
images of 32x32 pixels. The column "memory" counts the numbers that the term stores for 50,000
training images.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ipwd_jax import losses, models, signals
from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Term, as_seen
from ipwd_jax.models.base import Outputs
from ipwd_jax.models.heads import Heads
from ipwd_jax.state import batch_of_zeros, outputs_of_zeros
from ipwd_jax.typing import PyTree

CLASSES, SIZE, TRAIN_SIZE = 100, 32, 50_000


def network_outputs(name: str) -> Outputs:
    """What the network `name` returns for two images, with zeros in all arrays.

    Raises:
        UserError: the network does not exist, or needs larger images.
    """
    models.check_input(name, SIZE, SIZE)
    return outputs_of_zeros(models.create(name, CLASSES), jnp.zeros((2, SIZE, SIZE, 3)))


def variable_shapes(
    term: Term, student_outputs: Outputs, teacher_outputs: Outputs | None, train_size: int
) -> dict[str, PyTree]:
    """Shapes of the variables of a term by collection, including those of its linear heads.

    A head that is a separate network is as large as the student and is not counted.

    Args:
        term: an instance of one of the classes in `losses.TERMS`.
        student_outputs: outputs of the student, as arrays or shapes.
        teacher_outputs: outputs of the teacher, as arrays or shapes; None if there is no teacher.
        train_size: number of training images.

    Raises:
        ValueError: the term cannot be applied to the two networks; the message says why.
    """
    linear = {name: source for name, source in term.heads.items() if source != "network"}
    if hasattr(term, "train_size"):
        term = term.clone(train_size=train_size)

    def init(key: jax.Array, student: Outputs, teacher: Outputs | None) -> dict[str, PyTree]:
        batch = batch_of_zeros((1, 1, 1), train_size, key)
        heads = Heads(student.logits.shape[1], linear)
        of_heads = heads.init(key, student.embedding, batch.image, False)
        student = dataclasses.replace(
            student, extra_logits=dict.fromkeys(term.heads, student.logits)
        )
        head = term.replacement_head(teacher, None) if teacher and term.replaces_head else None
        of_head: PyTree = {}
        if head is not None:
            student, of_head = head.init_with_output(key, student, False)
        seen = (as_seen(term, outputs) for outputs in (student, teacher))
        variables = term.init(key, *seen, batch)
        of_all = (variables, of_heads, of_head)
        params = {name: x for part in of_all for name, x in part.get("params", {}).items()}
        return {**variables, "params": params}

    return jax.eval_shape(init, jax.random.key(0), student_outputs, teacher_outputs)


def extra_parameters(
    term: Term, student_outputs: Outputs, teacher_outputs: Outputs | None, train_size: int
) -> dict[str, int]:
    """Number of parameters that each part of a term adds; arguments as in `variable_shapes`."""
    shapes = variable_shapes(term, student_outputs, teacher_outputs, train_size)
    return {part: _count(tree) for part, tree in shapes["params"].items()}


def describe(name: str, student: Outputs, teacher: Outputs) -> str:
    """Lines that describe a term: what it reads, kind, size for two networks, paper, settings."""
    term = losses.TERMS[name]()
    reads = " ".join(term.teacher_taps) or "-"
    kind = "per sample" if term.per_sample else "relational"
    lines = []
    try:
        shapes = variable_shapes(term, student, teacher, TRAIN_SIZE)
        sizes = [f"{_count(shapes.get(part, {})):,}" for part in ("params", "memory")]
    except ValueError as error:
        sizes = ["-", "-"]
        lines.append(f"does not fit: {error}")
    settings = losses.hyper_parameters(name).items()
    if settings:
        lines.insert(0, " ".join(f"{key}={value!r}" for key, value in settings))
    row = f"{name:10}{reads:29}{kind:11}{sizes[0]:>12}{sizes[1]:>12}  {term.paper}"
    return "\n".join([row, *(f"{'':10}{line}" for line in lines)])


def main(names: Sequence[str]) -> None:
    """Print the table for `names`: a teacher and a student, or nothing for the default pair."""
    if len(names) not in (0, 2):
        raise UserError(f"give a TEACHER and a STUDENT, or no names; found {' '.join(names)!r}")
    teacher, student = names or ("resnet32x4", "resnet8x4")
    outputs = [network_outputs(name) for name in (student, teacher)]
    print(f"Teacher {teacher}, student {student}, {CLASSES} classes, images of {SIZE}x{SIZE}")
    print(f"{'term':10}{'reads from teacher':29}{'kind':11}{'parameters':>12}{'memory':>12}  paper")
    for name in losses.TERMS:
        print(describe(name, *outputs), flush=True)
    print(f"\nMemory: how many numbers the term stores for {TRAIN_SIZE:,} training images.")
    print(f"\n{'weighting':10}{'reads from teacher':29}settings in config.weighting")
    for name, kind in losses.WEIGHTINGS.items():
        fields = " ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(kind))
        print(f"{name:10}{' '.join(kind.teacher_taps) or '-':29}{fields}".rstrip())


def _count(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    with signals.exit_statuses(resumes=False):
        parser = argparse.ArgumentParser(prog="python -m ipwd_jax.losses", description=__doc__)
        parser.add_argument("names", nargs="*", metavar="TEACHER STUDENT", help="two networks")
        main(parser.parse_args().names)

"""Golden values of losses: how a term computes a case of a file, and whether it agrees."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from helpers import golden_json, recipe
from losses_helpers import batch

from ipwd_jax.models import Outputs
from ipwd_jax.pytorch.names import from_torch, to_torch

# The precisions of a comparison and the relative tolerance of each.
TOLERANCES = [("float64", 1e-9), ("float32", 1e-4)]


@dataclasses.dataclass(frozen=True)
class Spec:
    """How a term computes a case of a file.

    Attributes:
        term: the term.
        student: field of the student's `Outputs` that the inputs of the case fill. Maps come after
            a stem, which is a dummy here.
        teacher: the same for the teacher.
        names: prefixes of our parameters' names -> prefixes in the file.
        epoch: number of finished epochs.
        method: the method of the term that is applied; None for its call.
        trained: prefix that the names of gradients lack in the file.
        weights: weights of the samples, from both networks' logits and the labels.
        float32_params: relative tolerance in float32 of the parameters' gradients.
    """

    term: nn.Module
    student: str = "features"
    teacher: str = "features"
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    epoch: int = 0
    method: str | None = None
    trained: str = ""
    weights: Callable | None = None
    float32_params: float = 1e-4


def assert_gradient(actual, expected, rtol):
    actual = np.asarray(actual)
    np.testing.assert_allclose(np.linalg.norm(actual), expected["norm"], rtol=rtol)
    np.testing.assert_allclose(
        actual.ravel()[:4], expected["first"], rtol=rtol, atol=rtol * expected["norm"]
    )


class Golden:
    """A file of cases, their inputs and the comparison with them.

    Attributes:
        tag: prefix of the names from which the inputs are drawn.
        cases: the cases by name.
        batch: number of samples of most cases.
        classes: number of classes.
    """

    def __init__(self, name):
        file = golden_json(name)
        self.tag, self.cases = file["tag"], file["cases"]
        self.batch, self.classes = file["batch"], file["classes"]

    def labels(self, name="", rows=None):
        """Return the labels of a case, by default those that most cases share."""
        own = self.cases[name]["hyper"].get("labels") if name else None
        if isinstance(own, list):
            return jnp.asarray(own)
        return jnp.asarray(recipe().labels(f"{self.tag}/y", rows or self.batch, self.classes))

    def draw(self, name, key, dtype):
        """Return an input of a case."""
        x = self.cases[name]["inputs"][key]
        drawn = recipe().draw(f"{self.tag}/{name}/{key}", x["shape"], x["low"], x["high"])
        return drawn.astype(dtype)

    def outputs(self, field, arrays):
        """Return `Outputs` whose `field` has NumPy arrays in the file's layout (channels first)."""
        rows = len(arrays[0]) if arrays else self.batch  # some cases draw one side only
        empty = Outputs(
            logits=jnp.zeros((rows, self.classes)), embedding=jnp.zeros((rows, 1)), features=(),
            preact=(),
        )  # fmt: skip
        if not arrays:
            return empty
        if field == "maps_and_embedding":  # the last one is the pooled vector
            *maps, embedding = arrays
            embedding = embedding.reshape(len(embedding), -1)
            return self.outputs("features", maps).replace(embedding=embedding)
        if field == "views":  # the logits of the strong view and of the weak one
            strong, weak = (empty.replace(logits=logits) for logits in arrays)
            return weak.with_strong(strong)
        if field == "logits_and_pooled_map":  # the map before the last one
            logits, pooled = arrays
            pooled = jnp.broadcast_to(pooled[..., None, None], (*pooled.shape, 2, 2))
            maps = self.outputs("features", [pooled, jnp.zeros((rows, 1, 1, 1), pooled.dtype)])
            return maps.replace(logits=logits)
        if field not in ("features", "preact"):
            return empty.replace(**{field: arrays[0]})
        maps = tuple(jnp.moveaxis(x, 1, -1) for x in arrays)
        stem = jnp.zeros((rows, 4, 4, 2), maps[0].dtype)
        return empty.replace(features=(stem, *maps), preact=(stem, *maps))

    def check(self, name, spec, dtype, rtol):
        """Compare a case's value and gradients, and return those of the parameters."""
        with jax.enable_x64(dtype == "float64"):
            drawn = {key: self.draw(name, key, dtype) for key in self.cases[name]["inputs"]}
            return self._check(name, spec, drawn, dtype, rtol)

    def _check(self, name, spec, drawn, dtype, rtol):
        case, rows = self.cases[name], len(next(iter(drawn.values())))
        seen = batch(rows, epoch=spec.epoch, labels=self.labels(name, rows))
        variables, theirs = self._variables(spec, name, drawn, seen, dtype)

        def loss(drawn, params):
            values, _ = spec.term.apply(
                {**variables, "params": params},
                *self._both(spec, drawn),
                seen,
                mutable=["batch_stats", "memory"],
                method=spec.method,
            )
            if spec.weights is not None:
                values *= spec.weights(drawn["student_logits"], drawn["teacher_logits"], seen.label)
            return values.mean()

        params = variables.get("params", {})
        value, (grads, param_grads) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
            drawn, params
        )
        assert value.dtype == dtype
        np.testing.assert_allclose(value, case["loss"], rtol=rtol)
        for key, expected in case["grads"].items():
            assert_gradient(grads[key], expected, rtol)
        rtol = spec.float32_params if dtype == "float32" else rtol
        found = {theirs(key): grad for key, grad in to_torch({"params": param_grads}).items()}
        largest = max(case["param_grad_norms"].values(), default=0.0)
        for key, expected in case["param_grad_norms"].items():
            # A bias before BatchNorm has a gradient of zero, up to rounding.
            norm = np.linalg.norm(found[spec.trained + key])
            np.testing.assert_allclose(norm, expected, rtol=rtol, atol=rtol * largest)
        return found

    def _both(self, spec, drawn):
        """Return the outputs of student and teacher."""
        return (
            self.outputs(field, [x for key, x in sorted(drawn.items()) if key.startswith(who)])
            for who, field in (("student", spec.student), ("teacher", spec.teacher))
        )

    def _variables(self, spec, name, drawn, seen, dtype):
        """Return the term's variables with the file's numbers, and a map of our names to its."""
        init = functools.partial(spec.term.init, method=spec.method)
        template = jax.eval_shape(init, jax.random.key(0), *self._both(spec, drawn), seen)
        template = {k: v for k, v in template.items() if k in ("params", "batch_stats")}

        def theirs(ours):
            for prefix, golden in spec.names.items():
                if ours.startswith(prefix):
                    return golden + ours.removeprefix(prefix)
            return ours

        shapes = to_torch(jax.tree.map(lambda x: np.zeros(x.shape), template))
        tensors = recipe().weights(f"{self.tag}/{name}", self.cases[name]["params"])
        assert {theirs(ours) for ours in shapes} == set(tensors)
        variables = from_torch({ours: tensors[theirs(ours)] for ours in shapes}, template)
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), variables), theirs

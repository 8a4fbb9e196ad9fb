"""Export trained classifiers to files that run without this package, as StableHLO or as ONNX.

    python -m ipwd_jax.convert export runs/digits_ipwd_seed0 student.stablehlo --which=best
    python -m ipwd_jax.convert export runs/digits_ipwd_seed0 student.onnx

Both formats hold the whole computation, from images (N, H, W, channels) uint8 to logits
(N, classes) float32, for any N. The images are normalised inside. A StableHLO file needs the
packages `jax` and `flatbuffers`, and its JSON file has the names of the classes:

    import pathlib
    from jax import export

    student = export.deserialize(bytearray(pathlib.Path("student.stablehlo").read_bytes()))
    logits = student.call(images)

The JAX releases of the six months after the export read such a file
(https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees). An ONNX file
needs no JSON file, because it holds the same entries as its metadata:

    session = onnxruntime.InferenceSession("student.onnx")
    (logits,) = session.run(None, {"images": images})
    class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import export as jax_export
from jax.extend.core import jaxpr_as_fun

from ipwd_jax import writers
from ipwd_jax.errors import UserError, first_line
from ipwd_jax.runs import Classifier, Run, load_run

_STABLEHLO, _ONNX = ".stablehlo", ".onnx"
SUFFIXES = (_STABLEHLO, _ONNX)
# Kinds of devices on which a StableHLO file runs.
PLATFORMS = ("cpu", "cuda", "tpu")

# Suffix -> module that the format needs, and how to install it.
_PACKAGES = {
    _STABLEHLO: ("flatbuffers", "pip install 'ipwd_jax[export]'"),
    _ONNX: ("jax2onnx", "pip install 'ipwd_jax[onnx]'"),
}
# What the JSON file of every StableHLO file says.
_ENTRIES = {"class_names", "image_shape", "input", "output", "centre_crop", "versions", "platforms"}
# How far the logits of an ONNX file may be from JAX's, as a share of the largest logit or of 1.
_TOLERANCE = 1e-4


def export_run(
    workdir: str | pathlib.Path, path: str | pathlib.Path, which: str = "last"
) -> dict[str, Any]:
    """Write the network that a run trained to a StableHLO or an ONNX file.

    Args:
        workdir: the work directory of the run.
        path: the file to write, as in `export_classifier`.
        which: the epoch to export, "last" or "best".

    Returns:
        What the file says of itself, as `export_classifier` returns it, with the name of the
        `network` and the `epoch`.

    Raises:
        UserError: as in `export_classifier`; or the run has no readable checkpoint, or it is not
            known how to normalise images for its network, as for an imported one.
    """
    path = _checked(path)
    run = load_run(workdir)
    _check_run(run)
    about = {"network": run.config.model.name, "epoch": which}
    return export_classifier(run.classifier(which), path, about)


def export_classifier(
    classifier: Classifier,
    path: str | pathlib.Path,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write a classifier to a StableHLO or an ONNX file, which computes what its `logits` returns.

    A StableHLO file `NAME.stablehlo` gets a file `NAME.stablehlo.json` beside it. An ONNX file
    holds the same entries as its metadata, each value as JSON. It is written only if onnxruntime
    computes the same logits from it as JAX does.

    Args:
        classifier: the network, with the mean and deviation of the pixels it was trained on.
        path: the file to write, which ends in .stablehlo or .onnx. Neither it nor its JSON file may
            exist, except for a JSON file left behind by an export that was killed. The files
            appear whole or not at all.
        about: more entries for the JSON file or the metadata.

    Returns:
        The entries: those of `about`, the `class_names` in the order of the logits, the
        `image_shape` (H, W, channels), `input` and `output` in words, `centre_crop` (whether test
        images were resized to 8/7 of the size and cropped), and the `versions` of the packages.

    Raises:
        UserError: `path` exists, has another suffix or cannot be written, a package is missing, or
            the network cannot be exported.
    """
    path = _checked(path)
    entries = {**about, **_entries(classifier)}
    if path.suffix == _ONNX:
        entries["versions"]["jax2onnx"] = importlib.metadata.version("jax2onnx")
        _write(path, _onnx(classifier, entries))
    else:
        entries["platforms"] = PLATFORMS
        _write(path, _stablehlo(classifier), _json_of(path), entries)
    return entries


def _json_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.json")


def _checked(path: str | pathlib.Path) -> pathlib.Path:
    """Return the path of a file; raise `UserError` first thing if it cannot be written."""
    path = pathlib.Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise UserError(f"the file to write must end in {' or '.join(SUFFIXES)}, found {path}")
    for file in (path, _json_of(path)) if path.suffix == _STABLEHLO else (path,):
        if os.path.exists(file) and not (file != path and _is_left_behind(file)):
            raise UserError(f"{file} exists already; delete it or choose another name")
    module, command = _PACKAGES[path.suffix]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{path.suffix} files need a package that is not installed: {command}")
    return path


def _is_left_behind(beside: pathlib.Path) -> bool:
    """Return whether a JSON file without its StableHLO file is that of an export that was killed.

    The JSON file is written first, so that no StableHLO file ever lacks it.
    """
    try:
        return json.loads(beside.read_text()).keys() >= _ENTRIES
    except (OSError, ValueError, AttributeError):
        return False


def _check_run(run: Run) -> None:
    """Raise `UserError` if it is unknown how to normalise images for the network of a run."""
    if not run.data and run.result.get("imported"):
        raise UserError(
            f"{run.workdir} is an imported network, of which the class names and the normalisation "
            f"of the images are not known. {' and '.join(SUFFIXES)} files contain both: make an "
            "ipwd_jax.runs.Classifier with them and pass it to ipwd_jax.export.export_classifier. "
            "A .pth, .pt or .safetensors file needs neither."
        )


def _images(classifier: Classifier, count: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *classifier.image_shape), np.uint8)


def _entries(classifier: Classifier) -> dict[str, Any]:
    """What every file says of itself; raises `UserError` if the network does not match it."""
    try:
        logits = jax.eval_shape(classifier.logits, _images(classifier, 1))
    except Exception as error:  # Flax and JAX raise many kinds
        raise UserError(
            f"the network does not accept images of shape {classifier.image_shape} with the given "
            f"mean and deviation: {first_line(error)}"
        ) from error
    if logits.shape[1] != len(classifier.class_names):
        raise UserError(
            f"the network has {logits.shape[1]} logits, but the classifier has "
            f"{len(classifier.class_names)} class names; give it one for each logit"
        )
    shape = ", ".join(map(str, classifier.image_shape))
    return {
        "class_names": list(classifier.class_names),
        "image_shape": list(classifier.image_shape),
        "input": f"images (N, {shape}) uint8, pixels from 0 to 255; they are normalised inside",
        "output": f"logits (N, {logits.shape[1]}) float32, before the softmax",
        "centre_crop": classifier.centre_crop,
        "versions": writers.versions(),
    }


def _stablehlo(classifier: Classifier) -> bytes:
    """The bytes from which `jax.export.deserialize` makes the function again."""
    (batch,) = jax_export.symbolic_shape("batch")
    function = jax_export.export(jax.jit(classifier.logits), platforms=PLATFORMS)
    limit = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    # The file would otherwise name the source files and folders of this machine.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        return bytes(function(_images(classifier, batch)).serialize())
    except Exception as error:  # JAX raises many kinds, and so does a network of the user's own
        raise UserError(
            "the network cannot be exported for any number of images and for the platforms "
            f"{', '.join(PLATFORMS)}: {first_line(error)}"
        ) from error
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def _onnx(classifier: Classifier, entries: Mapping[str, Any]) -> bytes:
    """The bytes of an ONNX model, of which onnxruntime has computed the logits of two images."""
    # jax2onnx logs and warns about operations that it skips. What matters is checked below.
    logging.getLogger("jax2onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        import jax2onnx
        import onnx

    (batch,) = jax_export.symbolic_shape("batch")
    images = _images(classifier, batch)
    try:
        # jax2onnx 0.13 to 0.17 mistranslate the pooling functions of Flax when they trace them, and
        # translate the operations of a function that JAX has traced before correctly.
        with mock.patch.object(nn, "max_pool", _max_pool):
            traced = jaxpr_as_fun(jax.make_jaxpr(classifier.logits)(images))
        with warnings.catch_warnings(action="ignore"):
            model = jax2onnx.to_onnx(
                lambda x: traced(x)[0],
                [images],
                model_name=str(entries.get("network", "classifier")),
                input_names=["images"],
                output_names=["logits"],
            )
    except Exception as error:  # jax2onnx raises many kinds
        raise UserError(
            f"jax2onnx cannot convert the network: {first_line(error)}. Export it to "
            f"{_STABLEHLO} instead."
        ) from error
    values = {key: json.dumps(writers.plain(value)) for key, value in entries.items()}
    onnx.helper.set_model_props(model, values)
    data = model.SerializeToString()
    _check_onnx(classifier, data)
    return data


def _max_pool(
    x: jax.Array,
    window_shape: tuple[int, int],
    strides: tuple[int, int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array:
    """`flax.linen.max_pool` as the maximum of shifted maps (N, H, W, C).

    jax2onnx translates JAX's own operation to a pooling over four axes, which onnxruntime lacks.
    Where a window reaches beyond the map, it sees the pixel at the border once more, which does not
    change the maximum.
    """
    for axis, window, stride, (low, high) in zip(
        (1, 2), window_shape, strides, padding, strict=True
    ):
        size = x.shape[axis]
        starts = np.arange(-low, size + high - window + 1, stride)
        pixels = [np.clip(starts + i, 0, size - 1) for i in range(window)]
        x = functools.reduce(jnp.maximum, [jnp.take(x, p, axis, mode="clip") for p in pixels])
    return x


def _check_onnx(classifier: Classifier, data: bytes) -> None:
    """Raise `UserError` if onnxruntime does not compute the logits that JAX computes."""
    import onnxruntime

    images = np.random.default_rng(0).integers(0, 256, (2, *classifier.image_shape), np.uint8)
    expected = np.asarray(jax.jit(classifier.logits)(images))
    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"images": images})
    except Exception as error:  # onnxruntime raises many kinds
        raise UserError(
            f"onnxruntime cannot run the ONNX model: {first_line(error)}. Export the network to "
            f"{_STABLEHLO} instead."
        ) from error
    difference, largest = np.abs(logits - expected).max(), np.abs(expected).max()
    if not difference <= _TOLERANCE * max(1, largest):
        raise UserError(
            f"the logits of the ONNX model differ by up to {difference:.1g} from JAX's, the "
            f"largest of which is {largest:.1g}; nothing is written. Export to {_STABLEHLO} "
            "instead."
        )


def _write(
    path: pathlib.Path,
    data: bytes,
    beside: pathlib.Path | None = None,
    entries: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a file and its JSON file, or neither of them."""
    try:
        if beside:
            writers.write_json(beside, entries)
        writers.write_atomically(path, data)
    except UserError:
        if beside:
            with contextlib.suppress(OSError):
                beside.unlink()
        raise

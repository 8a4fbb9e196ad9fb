"""Decode images into training crops and centre crops with the fastest decoder that is installed.

Pillow does the resizing whichever package decodes JPEG, because it averages the pixels that it
scales down. Training and evaluation therefore scale images in the same way.
"""

import contextlib
import functools
import importlib
import io
import math
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import numpy as np

from ipwd_jax.data import folder
from ipwd_jax.errors import UserError

_ATTEMPTS = 10  # attempts at a random crop that fits into the image
_DRAWS = 2 * _ATTEMPTS + 3  # area and ratio of each attempt; row, column, mirroring
_AREA = 0.08, 1.0
_LOG_RATIO = math.log(3 / 4), math.log(4 / 3)


def decoder_name() -> str:
    """Return the package that decodes JPEG here: "simplejpeg", "cv2" or "PIL"."""
    return next((name for name in ("simplejpeg", "cv2") if _optional(name)), "PIL")


@functools.cache
def _optional(name: str) -> ModuleType | None:
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    if name == "cv2":
        module.setNumThreads(1)  # its own threads would compete with the worker threads
    return module


def _draw(rng_key: tuple[int, int, int]) -> list[float]:
    seed, epoch, index = map(int, rng_key)
    key = (seed % 2**64) << 64 | epoch << 32 | index
    return np.random.Generator(np.random.Philox(key=key)).random(_DRAWS).tolist()


def crop_box(height: int, width: int, draws: list[float]) -> tuple[int, int, int, int]:
    """Choose a crop as torchvision's `RandomResizedCrop.get_params` does, from random numbers.

    There are ten attempts at an area of 8 to 100 % and an aspect ratio of 3/4 to 4/3 (uniform in
    its logarithm). If none of them fits into the image, the crop is the largest centred box of a
    permitted ratio.

    Args:
        height: height of the image.
        width: width of the image.
        draws: uniform in [0, 1): the area and the ratio of each attempt, then row and column.

    Returns:
        Top, left, height and width in pixels.
    """
    low, high = _LOG_RATIO
    for attempt in range(_ATTEMPTS):
        share, position = draws[2 * attempt : 2 * attempt + 2]
        area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * share)
        ratio = math.exp(low + (high - low) * position)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            row, column = draws[2 * _ATTEMPTS : 2 * _ATTEMPTS + 2]
            return int(row * (height - h + 1)), int(column * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the decoders raise many types
        raise UserError(f"cannot be read as an image: {error}") from error


@_errors()
def decode_train(
    encoded: bytes,
    rng_key: tuple[int, int, int],
    size: int,
    out: np.ndarray | None = None,
    flip: bool = True,
) -> np.ndarray:
    """Decode a random crop of an image, resize it, and mirror it with a probability of one half.

    Decoding stops below the last row of the crop where the format and the decoder allow it. If both
    sides of the crop are at least two (four, eight) times `size`, the image is first reduced to a
    half (a quarter, an eighth) of its resolution, which a JPEG decoder does while it decodes, and
    the crop is rounded to whole pixels of the reduced image.

    Args:
        encoded: the content of a file of any format that Pillow reads.
        rng_key: seed, epoch and index. The crop and the mirroring depend on nothing else. Epoch and
            index must be below 2^32.
        size: height and width of the result.
        out: array for the result, (size, size, 3) uint8; a new one by default.
        flip: whether the crop can be mirrored; the crop itself does not depend on this.

    Returns:
        (size, size, 3) uint8, RGB: what torchvision's `RandomResizedCrop(size)` (bilinear,
        antialiased) returns for a Pillow image, up to the rounding by the reduction. JPEG decoders
        can differ in the last bits.

    Raises:
        UserError: the content is not an image, or is a damaged one.
    """
    from PIL import Image

    draws = _draw(rng_key)
    image = _open(encoded)
    top, left, height, width = crop_box(image.height, image.width, draws)
    reduce = next(r for r in (8, 4, 2, 1) if r == 1 or min(height, width) >= r * size)
    pixels = image.decode(reduce, top + height)
    top, bottom, left, right = (
        round(edge / reduce) for edge in (top, top + height, left, left + width)
    )
    # The crop is cut out first, because the filter of `resize` with a box would see beyond the box.
    crop = Image.fromarray(pixels[top:bottom, left:right])
    resized = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))
    out = np.empty((size, size, 3), np.uint8) if out is None else out
    out[:] = resized[:, ::-1] if flip and draws[-1] < 0.5 else resized
    return out


@_errors()
def decode_eval(encoded: bytes, size: int, out: np.ndarray | None = None) -> np.ndarray:
    """Decode an image, resize its shorter side to 256/224 of `size`, and cut out the centre square.

    Args:
        encoded: as in `decode_train`.
        size: height and width of the result.
        out: as in `decode_train`.

    Returns:
        (size, size, 3) uint8, RGB: what torchvision's `Resize` (bilinear, antialiased) and
        `CenterCrop` return for a Pillow image.

    Raises:
        UserError: the content is not an image, or is a damaged one.
    """
    from PIL import Image

    image = _open(encoded)
    short = round(size * 256 / 224)
    box = []
    for side in (image.width, image.height):
        resized = int(short * side / min(image.width, image.height))
        start = round((resized - size) / 2)
        box.append((start * side / resized, (start + size) * side / resized))
    (left, right), (top, bottom) = box
    pixels = Image.fromarray(image.decode(1, image.height))
    # Only the centre square is computed; the filter still sees the pixels around it.
    pixels = pixels.resize((size, size), Image.Resampling.BILINEAR, (left, top, right, bottom))
    out = np.empty((size, size, 3), np.uint8) if out is None else out
    out[:] = np.asarray(pixels)
    return out


class _Jpeg(NamedTuple):
    encoded: bytes
    height: int
    width: int
    frame: int  # offset of the frame header
    baseline: bool

    def decode(self, reduce: int, rows: int) -> np.ndarray:
        """Return the image at 1/`reduce` of its resolution.

        Only what lies in the top `rows` of the original is sure to be decoded.
        """
        if simplejpeg := _optional("simplejpeg"):
            width = -(-self.width // reduce)
            encoded = self._shortened(rows, reduce)
            # Like Pillow and OpenCV, this tolerates errors from which the decoder can recover.
            return simplejpeg.decode_jpeg(
                encoded, min_height=1, min_width=width, min_factor=reduce, strict=False
            )
        if cv2 := _optional("cv2"):
            name = f"IMREAD_REDUCED_COLOR_{reduce}" if reduce > 1 else "IMREAD_COLOR"
            flags = getattr(cv2, name) | cv2.IMREAD_IGNORE_ORIENTATION
            pixels = cv2.imdecode(np.frombuffer(self.encoded, np.uint8), flags)
            return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        from PIL import Image

        with Image.open(io.BytesIO(self._shortened(rows, reduce))) as image:
            image.draft("RGB", (image.width // reduce, image.height // reduce))
            return np.asarray(image.convert("RGB"))

    def _shortened(self, rows: int, reduce: int) -> bytes:
        # A decoder stops early if the header says that the image ends below the crop. Two more rows
        # are kept because JPEG can store colour for every second row only, and interpolate it.
        rows += 2 * reduce
        if not self.baseline or rows >= self.height:
            return self.encoded
        at = self.frame + 5
        return b"".join((self.encoded[:at], rows.to_bytes(2, "big"), self.encoded[at + 2 :]))


class _Other(NamedTuple):
    pixels: np.ndarray
    height: int
    width: int

    def decode(self, reduce: int, rows: int) -> np.ndarray:
        from PIL import Image

        if reduce == 1:
            return self.pixels
        return np.asarray(Image.fromarray(self.pixels[:rows]).reduce(reduce))


def _open(encoded: bytes) -> _Jpeg | _Other:
    if found := _jpeg(encoded):
        return found
    pixels = np.asarray(folder.to_rgb(io.BytesIO(encoded)))
    return _Other(pixels, *pixels.shape[:2])


def _jpeg(encoded: bytes) -> _Jpeg | None:
    """Read the header of a JPEG; None if Pillow has to decode the file.

    That is the case unless the file is complete, has one or three channels of 8 bits, is at least 8
    pixels wide, needs no rotation, and is not so large that Pillow refuses it.
    """
    from PIL import Image

    at = 2 if encoded.startswith(b"\xff\xd8") else len(encoded)
    while at + 10 <= len(encoded) and encoded[at] == 0xFF:
        marker, length = encoded[at + 1], int.from_bytes(encoded[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xC2:
            bits, channels = encoded[at + 4], encoded[at + 9]
            height, width = (int.from_bytes(encoded[i : i + 2], "big") for i in (at + 5, at + 7))
            # A truncated file has no end marker, and some decoders would fill it up with grey.
            whole = encoded.rfind(b"\xff\xd9", at) > 0
            # A decoder that may reduce the height alone would, if the width is below 8.
            known = whole and bits == 8 and channels in (1, 3) and height and width >= 8
            # Pillow refuses such a size. Other decoders take the memory that a few bytes declare.
            known = known and height * width <= 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
            return _Jpeg(encoded, height, width, at, marker < 0xC2) if known else None
        if marker == 0xE1 and _turned(encoded):  # it holds Exif or XMP data
            return None
        at += 1 if marker == 0xFF else 2 + length
    return None


def _turned(encoded: bytes) -> bool:
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return image.getexif().get(0x0112, 1) != 1

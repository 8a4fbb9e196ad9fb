"""Image folders, NumPy archives and checkpoints of any content are read, or refused by name."""

import collections
import io
import pickletools
import shutil
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from data_helpers import config as data_config
from data_helpers import encode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pytorch_helpers import legacy_of, memory_below, state_dict, view

from ipwd_jax import data
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch import files
from ipwd_jax.pytorch.convert import load_variables
from ipwd_jax.pytorch.state_dicts import unwrap

OPTIONS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
MEGABYTE = 2**20


# Image folders

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
PHOTO, GREY = Image.fromarray(PIXELS), Image.fromarray(PIXELS[:, :, 0])


def upside_down():
    exif = Image.Exif()
    exif[0x0112] = 3
    return {"exif": exif}


def declared(encoded, height, width):
    """Return an image file whose header declares another size than it has."""
    if encoded.startswith(b"\x89PNG"):
        header = b"IHDR" + struct.pack(">II", width, height) + encoded[24:29]
        return encoded[:12] + header + struct.pack(">I", zlib.crc32(header)) + encoded[33:]
    at = encoded.index(b"\xff\xc0") + 5
    return encoded[:at] + struct.pack(">HH", height, width) + encoded[at + 4 :]


PNG, JPEG = encode(PHOTO, "PNG"), encode(PHOTO)
GOOD = {
    "photo.png": PNG,
    "photo.jpg": JPEG,
    "grey.jpg": encode(GREY),
    "grey.png": encode(GREY, "PNG"),
    "alpha.png": encode(PHOTO.convert("RGBA"), "PNG"),
    "grey with alpha.png": encode(PHOTO.convert("LA"), "PNG"),
    "print.jpg": encode(PHOTO.convert("CMYK")),
    "palette.png": encode(PHOTO.convert("P"), "PNG"),
    "palette.gif": encode(PHOTO.convert("P"), "GIF"),
    "black and white.png": encode(PHOTO.convert("1"), "PNG"),
    "16 bits.png": encode(Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257), "PNG"),
    "animated.gif": encode(PHOTO, "GIF", save_all=True, append_images=[GREY]),
    "animated.webp": encode(PHOTO, "WEBP", save_all=True, append_images=[PHOTO]),
    "turned.jpg": encode(PHOTO, **upside_down()),
    "turned.png": encode(PHOTO, "PNG", **upside_down()),
    "misnamed.jpg": PNG,
    "misnamed.png": JPEG,
    "NAME.JPG": JPEG,
    "é 日本 \U0001f600.png": PNG,
    "of one pixel.png": encode(PHOTO.crop((0, 0, 1, 1)), "PNG"),
    "wide.png": encode(PHOTO.resize((300, 1)), "PNG"),
}
BAD = {
    "empty.png": b"",
    "empty.jpg": b"",
    "text.jpg": b"hello",
    "cut.png": PNG[: len(PNG) // 2],
    "cut.jpg": JPEG[: len(JPEG) // 2],
    "header alone.jpg": JPEG[:20],
    "float.tiff": encode(Image.fromarray(np.ones((6, 6), np.float32)), "TIFF"),
    "huge.png": declared(PNG, 60_000, 60_000),
    "huge.jpg": declared(JPEG, 65_500, 65_500),
    "empty header.png": declared(PNG, 0, 0),
}
LINKS = ["loop.png", "loop", "dangling.png", "above", "unreadable.png"]
FILES = st.tuples(st.sampled_from("ab"), st.sampled_from([*GOOD, *GOOD, *GOOD, *BAD, *LINKS]))


def written(root, places):
    """Write a folder of images; return the bad ones."""
    shutil.rmtree(root, ignore_errors=True)
    bad = []
    for number, (label, name) in enumerate(places):
        path = root / label / f"{number} {name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in LINKS:
            targets = {"loop.png": path, "loop": path, "above": root, "dangling.png": root / "no"}
            path.symlink_to(targets.get(name, "/proc/self/mem"))
            bad += [path.name] if name == "unreadable.png" else []
        else:
            path.write_bytes({**GOOD, **BAD}[name])
            bad += [path.name] if name in BAD else []
    return bad


def every_image(dataset):
    """Return all images of a data set, decoded; of streamed ones, as they are tested."""
    for split in (dataset.train, dataset.test):
        if split.streamed:
            rows = np.arange(len(split.labels), dtype=np.int32)[:, None]
            for train in (False, True):
                yield from split.images.batches(rows, 0, 0, train)
        else:
            yield split.images


def of_folder(root, streaming):
    """Return what reading a folder says; empty if every image can be decoded."""
    config = data_config(f"folder:{root}", image_size=8, streaming=streaming, crop_padding=0)
    try:
        with memory_below(800 * MEGABYTE):
            for images in every_image(data.load(config)):
                assert images.dtype == np.uint8 and images.shape[-3:] == (8, 8, 3)
    except UserError as error:
        return str(error)
    return ""


def any_folder(count, root):
    counts = collections.Counter()

    @settings(max_examples=count, **OPTIONS)
    @given(places=st.lists(FILES, min_size=1, max_size=6), streaming=st.booleans())
    def check(places, streaming):
        bad = written(root, places)
        message = of_folder(root, streaming)
        counts["refused" if message else "accepted"] += 1
        assert bool(message) or not bad
        assert not message or any(name in message for name in (str(root), root.name, *bad))

    check()
    return counts


def test_any_folder_of_images(tmp_path, capsys):
    counts = any_folder(40, tmp_path / "photos")
    assert counts["accepted"] > 3 and counts["refused"] > 3


@pytest.mark.parametrize("streaming", [False, True])
def test_every_good_file_is_read(streaming, tmp_path):
    written(tmp_path / "photos", [(label, name) for label in "ab" for name in GOOD])
    assert of_folder(tmp_path / "photos", streaming) == ""


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_every_bad_file_is_named(name, streaming, tmp_path):
    written(tmp_path / "photos", [*(("a", "photo.png"),) * 2, *(("b", name),) * 2])
    message = of_folder(tmp_path / "photos", streaming)
    assert f" {name} " in message, message


# NumPy archives

TYPES = ["u1", "u1", "u1", "i1", "<u2", ">i4", "<i8", "<u8", "f2", "<f4", "<f8", "?", "O", "U3"]
TYPES += ["S2", "M8[s]", "c8", "V4"]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 6, 12]), max_size=5).map(tuple)
FILLS = st.sampled_from([0, 1, 2, -1, 255, 2**31 - 1, 2**31, 2**62, np.nan, np.inf])
ARRAYS = st.tuples(SHAPES, st.sampled_from(TYPES), FILLS)
GOOD_IMAGES = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), np.uint8)
GOOD_LABELS = np.arange(12) % 3


def array_of(shape, kind, fill):
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return np.full(shape, fill).astype(kind)
        except (TypeError, ValueError, OverflowError):
            return np.zeros(shape, kind)


NAMES = ["train_images", "train_labels", "test_images", "test_labels", "class_names", "other"]
ARCHIVES = st.dictionaries(st.sampled_from(NAMES), ARRAYS, max_size=3)
DAMAGES = st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=4)), max_size=2)


def of_archive(path):
    """Return what reading an archive says; empty if it makes a data set."""
    try:
        with memory_below(100 * MEGABYTE):
            dataset = data.load(data_config(f"numpy:{path}"))
    except UserError as error:
        return str(error)
    assert len(dataset.class_names) == len(np.unique(dataset.train.labels)) >= 2
    assert np.isfinite(dataset.mean).all() and (dataset.std > 0).all()
    return ""


def any_archive(count, folder):
    counts, path = collections.Counter(), folder / "mine.npz"

    @settings(max_examples=count, **OPTIONS)
    @given(
        arrays=ARCHIVES,
        wrong=DAMAGES,
        cut=st.one_of(st.none(), st.none(), st.integers(0, 5000)),
        compressed=st.booleans(),
    )
    def check(arrays, wrong, cut, compressed):
        given_arrays = {name: array_of(*how) for name, how in arrays.items()}
        content = {"train_images": GOOD_IMAGES, "train_labels": GOOD_LABELS, **given_arrays}
        (np.savez_compressed if compressed else np.savez)(path, **content)
        damaged = path.read_bytes()
        for place, inserted in wrong:
            damaged = damaged[:place] + inserted + damaged[place + len(inserted) :]
        path.write_bytes(damaged[:cut])
        message = of_archive(path)
        counts["refused" if message else "accepted"] += 1
        assert not message or "mine" in message

    check()
    return counts


def test_any_archive(tmp_path):
    counts = any_archive(60, tmp_path)
    assert counts["accepted"] > 3 and counts["refused"] > 10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_images": GOOD_IMAGES / 255}, "uint8 with pixels in 0..255, found (12, 6, 6, 3) f"),
        ({"train_images": np.full((12, 6, 6, 3), np.nan)}, "found (12, 6, 6, 3) float64"),
        ({"train_labels": GOOD_LABELS * np.nan}, "12 integers, one per image, found (12,) float64"),
        ({"train_labels": GOOD_LABELS * 10**9}, "no training image of the classes [1, 2, 3, 4, "),
        ({"class_names": np.array("abc")}, "class_names must be one string for each class, found "),
        ({"class_names": np.array([["a"], ["b"], ["c"]])}, "one string for each class, found "),
        ({"class_names": np.arange(3)}, "one string for each class, found (3,) int64"),
    ],
)
def test_wrong_arrays_are_described(changes, words, tmp_path):
    content = {"train_images": GOOD_IMAGES, "train_labels": GOOD_LABELS, **changes}
    np.savez(tmp_path / "mine.npz", **content)
    message = of_archive(tmp_path / "mine.npz")
    assert "mine" in message and words in message, message


# Checkpoints of PyTorch and safetensors

TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}


def zip_boundaries(content):
    """Return where the parts of a zip archive begin, and the data within each of them."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            start = entry.header_offset
            name, extra = struct.unpack_from("<HH", content, start + 26)
            yield from (start, start + 30, start + 30 + name + extra)
            yield start + 30 + name + extra + entry.file_size
        yield from (archive.start_dir, content.rindex(b"PK\x05\x06"))


def legacy_boundaries(content):
    """Return where each instruction of the five pickles begins, and each part of the storages."""
    file = io.BytesIO(content)
    for _ in range(5):
        start = file.tell()
        yield from (start + at for _, _, at in pickletools.genops(content[start:]))
        list(pickletools.genops(file))
    yield from range(file.tell(), len(content), 4)


def safetensors_boundaries(content):
    (length,) = struct.unpack_from("<Q", content)
    yield from (0, 8, 8 + length, *range(8 + length, len(content), 4))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return the content of a file of each format, and where its parts begin."""
    folder = tmp_path_factory.mktemp("checkpoints")
    views = {"a.weight": view(6, (2, 3), (3, 1)), "b": view(4, (4,), (1,), key="1")}
    legacy_of(state_dict(views), folder / "a.pt", [x.tobytes() for x in TENSORS.values()])
    for suffix in (".pth", ".safetensors"):
        files.save(folder / f"a{suffix}", TENSORS)
    boundaries = {
        ".pth": zip_boundaries,
        ".pt": legacy_boundaries,
        ".safetensors": safetensors_boundaries,
    }
    contents = {suffix: (folder / f"a{suffix}").read_bytes() for suffix in boundaries}
    return {suffix: (x, sorted({*boundaries[suffix](x)})) for suffix, x in contents.items()}


def of_checkpoint(path):
    """Return what reading a checkpoint says, and its tensors."""
    try:
        with memory_below(100 * MEGABYTE):
            return "", unwrap(files.load(path))[0]
    except UserError as error:
        return str(error), {}


SUFFIXES = [".pth", ".pt", ".safetensors"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_checkpoints_cut_at_every_boundary(suffix, checkpoints, tmp_path):
    content, boundaries = checkpoints[suffix]
    path = tmp_path / f"a{suffix}"
    for place in {at + step for at in boundaries for step in (-1, 0, 1)} - {-1}:
        path.write_bytes(content[:place])
        message, _ = of_checkpoint(path)
        assert bool(message) == (place < len(content)), place


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_checkpoints_with_a_flipped_byte(suffix, checkpoints, tmp_path):
    content, boundaries = checkpoints[suffix]
    path = tmp_path / f"a{suffix}"
    for place in boundaries:
        for bits in (1, 0x80, 0xFF):
            if place < len(content):
                path.write_bytes(flipped(content, place, bits))
                of_checkpoint(path)


def test_what_is_no_state_dict_is_named(tmp_path):
    path = legacy_of(b"\x80\x02).", tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: the file holds a tuple instead of a state dict"):
        load_variables(path)


def flipped(content, place, bits):
    return content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]


def any_checkpoint(count, checkpoints, folder):
    """Flip several bytes and cut the end off, where `test_hostile` only replaces some bytes."""
    counts = collections.Counter()

    @settings(max_examples=count, **OPTIONS)
    @given(
        suffix=st.sampled_from(SUFFIXES),
        flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 255)), max_size=3),
        cut=st.one_of(st.none(), st.integers(0, 5000)),
    )
    def check(suffix, flips, cut):
        content, path = checkpoints[suffix][0], folder / f"any{suffix}"
        for place, bits in flips:
            content = flipped(content, place % len(content), bits)
        path.write_bytes(content[:cut])
        message, _ = of_checkpoint(path)
        counts["refused" if message else "accepted"] += 1

    check()
    return counts


@pytest.mark.slow
def test_four_thousand_inputs(checkpoints, tmp_path, capsys):
    """With the settings of the other file, ten thousand."""
    counts = {
        "folders of images": any_folder(1000, tmp_path / "photos"),
        "NumPy archives": any_archive(2500, tmp_path),
        "checkpoints": any_checkpoint(500, checkpoints, tmp_path),
    }
    with capsys.disabled():
        for name, found in counts.items():
            print(f"\n{name}: {found['accepted']} accepted, {found['refused']} refused", end="")

"""Files that were made to exhaust memory, or damaged, are read or refused without harm."""

import math
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pytorch_helpers import (
    MEGABYTE,
    error_of,
    function,
    legacy_of,
    memory_below,
    state_dict,
    text,
    view,
    zip_of,
)

from ipwd_jax.errors import UserError
from ipwd_jax.pytorch import files
from ipwd_jax.pytorch.state_dicts import unwrap

# Small pickles of large objects


def calls(name, count, argument):
    """A list of `count` results of a function of one memoised `argument`."""
    call = function(name) + b"q\x01" + b"h\x01h\x00\x85R" * count
    return b"\x80\x04](" + argument + b"q\x00" + call + b"e."


def doubled(opcode, levels, end):
    """Something of two of itself, `levels` times over, from a few bytes."""
    return b"\x80\x02}" + text("a") + (b"q\x00h\x00" + opcode) * levels + end


NUMBERS = b"](" + b"K\x01" * 20_000 + b"e"
PAIRS = b"](" + b"".join(b"M" + struct.pack("<H", i) + b"N\x86" for i in range(5_000)) + b"e"
NAMESPACE = b"cargparse\nNamespace\n)\x81h\x00b"
ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text("b") + b"tR"
    b"(K\x01J\x40\x0d\x03\x00\x85cnumpy\ndtype\n" + text("u1") + b"\x85R\x89h\x00tb"
)
HUGE = struct.pack("<Q", 2**31)
PICKLES = {
    "memo": b"\x80\x02}r\xff\xff\xff\x03.",
    "text": b"\x80\x04\x8d" + HUGE + b"a.",
    "bytes": b"\x80\x04\x8e" + HUGE + b"a.",
    "bytearray": b"\x80\x05\x96" + HUGE + b"a.",
    "frame": b"\x80\x04\x95" + HUGE + b"}.",
    "short text": b"\x80\x02X\xff\xff\xff\x7fa.",
    "integer": b"\x80\x02\x8b\xff\xff\xff\x7fa.",
    "tuples": calls("torch.Size", 2_000, NUMBERS),
    "sets": calls("builtins.set", 1_000, PAIRS.replace(b"N\x86", b"")),
    "dictionaries": calls("collections.OrderedDict", 1_000, PAIRS),
    "namespaces": b"\x80\x02](}("
    + PAIRS[2:-1].replace(b"\x86", b"")
    + b"uq\x00"
    + NAMESPACE * 1_000
    + b"e.",
    "encoded": calls("_codecs.encode", 1_000, text("a" * 200_000)),
    "arrays": b"\x80\x02](" + text("a" * 200_000) + b"q\x00" + ARRAY * 1_000 + b"e.",
    "devices": doubled(b"\x86q\x01ctorch\ndevice\nh\x01R", 26, b"Ns."),
    "shared tuples as a key": doubled(b"\x86", 50, b"Ns."),
    "a deep tuple as a key": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "shared tuples as a storage": b"\x80\x02" + text("a") + b"q\x00h\x00\x86" * 50 + b"\x85Q.",
    "lists": b"\x80\x02" + b"](" * 10_000 + b"e" * 10_000 + b".",
    "a list in itself": b"\x80\x02]q\x00(h\x00h\x00e.",
    "announced storages": state_dict({"fc.weight": view(2**28, (2**14, 2**14), (2**14, 1))}),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", PICKLES)
def test_a_small_pickle_takes_little_memory(name, legacy, tmp_path, capsys):
    write = legacy_of if legacy else zip_of
    error_of(write(PICKLES[name], tmp_path / "a.pth"), capsys)


# Whatever else there may be


NAMES = ["torch.Size", "torch.device", "builtins.set", "collections.OrderedDict", "_codecs.encode"]
NAMES += ["collections.Counter", "collections.defaultdict", "argparse.Namespace", "numpy.dtype"]
NAMES += ["torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.float32"]
NAMES += ["numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar", "os.system"]
LEAVES = [
    b"N",
    b"\x88",
    b")",
    b"]",
    b"}",
    b"\x8f",
    b"K\x07",
    text("storage"),
    text("f4"),
    text("0"),
]
LEAVES += [b"J\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 8 + b"\x00", text("a" * 50_000)]
LEAVES += [b"ctorch\nFloatStorage\n", view(4, (2, 2), (2, 1)), view(4, (2**20, 2**20), (0, 0))]
LEAVES += [b"h\x00", b"h\x01", *(x for x in PICKLES.values() if len(x) < 1000)]


def built(parts):
    """Instructions that make one object of the objects `parts`."""
    one, all_of = parts[0], b"".join(parts)
    return st.one_of(
        st.just(b"(" + all_of + b"t"),
        st.just(b"](" + all_of + b"e"),
        st.just(b"}(" + all_of + b"u"),
        st.just(b"\x8f(" + all_of + b"\x90"),
        st.just(b"(" + all_of + b"tQ"),
        st.just(one + b"2\x86"),
        st.just(all_of + b"b"),
        st.sampled_from([one + b"q\x00", one + b"q\x01", one + b"r\xff\xff\xff\x7f"]),
        st.sampled_from(NAMES).map(lambda name: function(name) + b"(" + all_of + b"tR"),
    )


OBJECTS = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.lists(inner, min_size=1, max_size=6).flatmap(built),
    max_leaves=30,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


def read_or_refused(path):
    """What is in the file, or None; nothing else happens, and in little memory."""
    with memory_below(100 * MEGABYTE):
        try:
            return unwrap(files.load(path))[0]
        except UserError:
            return None


@given(
    body=OBJECTS, wrong=st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=3)), max_size=2)
)
def test_any_pickle_is_read_or_refused(folder, body, wrong):
    for place, inserted in wrong:
        body = body[:place] + inserted + body[place + 1 :]
    read_or_refused(zip_of(b"\x80\x04" + body + b".", folder / "a.pth", [bytes(16)]))
    read_or_refused(
        legacy_of(b"\x80\x04}" + text("a") + body + b"s.", folder / "b.pth", [bytes(16)])
    )


LENGTHS = st.one_of(st.integers(-1, 4), st.sampled_from([6, 24, 2_000_000, 2**31, 2**62]))


@settings(max_examples=300)
@example(write=zip_of, surplus=0, present=1, offset=0, axes=[(1, 2**62)])
@given(
    write=st.sampled_from([zip_of, legacy_of]),
    surplus=st.sampled_from([0, 0, 0, -1, 1, 2**31]),
    present=st.sampled_from([0, 1, 6, 24]),
    offset=st.one_of(st.just(0), LENGTHS),
    axes=st.lists(st.tuples(LENGTHS, LENGTHS), max_size=3),
)
def test_any_view_is_read_or_refused(folder, write, surplus, present, offset, axes):
    size, stride = (tuple(axis[i] for axis in axes) for i in (0, 1))
    numbers = np.arange(present, dtype=np.float32)
    data_pkl = state_dict(
        {"x": view(present + surplus, size, stride, offset), "y": view(4, (2, 2), (2, 1), key="1")}
    )
    path = write(data_pkl, folder / "view.pth", [numbers.tobytes(), bytes(16)])
    actual = read_or_refused(path)
    last = offset + sum((n - 1) * step for n, step in axes)
    fits = min((offset, *size, *stride)) >= 0 and math.prod(size) <= present
    fits = fits and (offset <= present if 0 in size else last < present)
    if not fits or surplus:
        assert actual is None
    elif 0 not in size:
        places = [
            offset + sum(map(math.prod, zip(i, stride, strict=True))) for i in np.ndindex(size)
        ]
        assert actual["x"].ravel().tolist() == numbers[places].tolist()


@given(
    suffix=st.sampled_from([".pth", ".pt", ".safetensors"]),
    wrong=st.lists(st.tuples(st.integers(0, 1500), st.binary(max_size=8)), min_size=1, max_size=3),
)
def test_any_damage_is_read_or_refused(folder, suffix, wrong):
    pytest.importorskip("safetensors", reason="reads a file of safetensors")
    path = folder / f"damaged{suffix}"
    path.unlink(missing_ok=True)
    if suffix == ".pt":
        legacy_of(state_dict({"x.weight": view(4, (2, 2), (2, 1))}), path, [bytes(16)])
    else:
        files.save(path, {"x.weight": np.zeros((2, 2), np.float32)})
    data = path.read_bytes()
    for place, inserted in wrong:
        data = data[: place % len(data)] + inserted + data[place % len(data) + len(inserted) :]
    path.write_bytes(data)
    read_or_refused(path)

"""Files made to exhaust memory, and weights that are no numbers: refused before they do harm."""

import contextlib
import json
import math
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_convert import template, variables, zip_of

from ipwd_jax import convert, torch_files, torch_pickle
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch.names import to_torch, torch_shapes
from ipwd_jax.pytorch.networks import Fit, _patterned, guess

MEGABYTE = 2**20
SHAPES = template()


@contextlib.contextmanager
def memory_below(limit):
    """Fails when the block holds more than `limit` bytes at any time, touched or not."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak / MEGABYTE:.0f} MB"


def error_of(path, capsys, *options, limit=100 * MEGABYTE):
    """What the command line says when it refuses to import `path`, within the memory `limit`."""
    workdir = path.parent / "refused"
    with memory_below(limit), pytest.raises(SystemExit) as end:
        convert.main(["import", str(path), f"--workdir={workdir}", *options])
    assert end.value.code == 2 and not workdir.exists()
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    return message


# Pickles


def legacy_of(data_pkl, path, storages=()):
    """The older format of `torch.save`, with storages of float32."""
    header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    parts = [*(pickle.dumps(x, 2) for x in header), data_pkl]
    parts.append(pickle.dumps([str(i) for i in range(len(storages))], 2))
    parts += [struct.pack("<q", len(storage) // 4) + storage for storage in storages]
    path.write_bytes(b"".join(parts))
    return path


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def function(name):
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode()


def calls(name, count, argument):
    """A list of `count` results of a function of one memoised `argument`."""
    call = function(name) + b"q\x01" + b"h\x01h\x00\x85R" * count
    return b"\x80\x04](" + argument + b"q\x00" + call + b"e."


def view(numel, size, stride, offset=0, key="0"):
    """A tensor of float32 in the storage `key`, which has `numel` numbers."""
    plain = torch_files._plain_pickle
    storage = b"(" + plain("storage") + b"ctorch\nFloatStorage\n"
    storage += plain(key) + plain("cpu") + plain(numel) + b"tQ"
    arguments = b"".join(map(plain, (offset, size, stride, False, None)))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + arguments + b"tR"


def state_dict(views):
    return b"\x80\x02}(" + b"".join(text(name) + x for name, x in views.items()) + b"u."


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


COPY = b"]q\x00(" + b"N" * 50 + b"e" + function("torch.Size") + b"h\x00\x85R"


@pytest.mark.parametrize("more", [b"]" * 100, COPY], ids=["instructions", "copies"])
def test_the_steps_of_a_pickle_are_counted(more, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "_MOST_INSTRUCTIONS", 100)
    path = zip_of(b"\x80\x04](" + more + b"e.", tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"more than 100 steps.*save model\.state_dict"):
        torch_files.load(path)


def test_a_high_memo_index_does_no_harm(tmp_path):
    data_pkl = state_dict({"a": view(6, (2, 3), (3, 1)) + b"r\xff\xff\xff\x7f"})
    path = zip_of(data_pkl, tmp_path / "a.pth", [np.arange(6, dtype=np.float32).tobytes()])
    with memory_below(MEGABYTE):
        assert torch_files.load(path)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


# Views


@pytest.mark.parametrize("write", [zip_of, legacy_of])
def test_a_tensor_that_repeats_its_numbers(write, tmp_path, capsys):
    views = {
        name: view(64, shape, (0,) * len(shape)) for name, shape in torch_shapes(SHAPES).items()
    }
    data_pkl = state_dict(views | {"fc.weight": view(64, (2_000_000, 64), (0, 1))})
    path = write(data_pkl, tmp_path / "a.pth", [bytes(256)])
    assert path.stat().st_size < 10_000
    assert "repeats the 64 numbers that the file has for it" in error_of(path, capsys)
    path = write(state_dict({"fc.weight": view(64, (2_000_000, 64), (0, 1))}), path, [bytes(256)])
    assert "the tensor 'fc.weight' of shape (2000000, 64) repeats" in error_of(path, capsys)


def test_tensors_that_share_their_numbers(tmp_path, capsys):
    shapes = torch_shapes(SHAPES)
    most = max(map(math.prod, shapes.values()))
    strides = {k: [math.prod(x[axis + 1 :]) for axis in range(len(x))] for k, x in shapes.items()}
    views = {name: view(most, shape, tuple(strides[name])) for name, shape in shapes.items()}
    path = zip_of(state_dict(views), tmp_path / "a.pth", [bytes(4 * most)])
    message = error_of(path, capsys, "--network=resnet8")
    taken = 4 * sum(map(math.prod, shapes.values()))
    assert f"share their numbers: they would take {taken:,} bytes" in message
    assert "save a tensor.clone() of each" in message


def test_two_state_dicts_of_the_same_numbers(tmp_path):
    """As of a network and what is the best of it so far; each for itself is no repetition."""
    one = view(4, (2, 2), (2, 1))
    both = {"model": state_dict({"a": one})[2:-1], "best": state_dict({"a": one})[2:-1]}
    path = zip_of(state_dict(both), tmp_path / "a.pth", [bytes(16)])
    assert convert.unwrap(torch_files.load(path))[0]["a"].shape == (2, 2)


def test_the_guess_takes_no_memory_for_what_shapes_claim():
    shapes = torch_shapes(SHAPES) | {"conv1.weight": (16, 10**9, 3, 3)}
    shapes |= {"fc.weight": (10**9, 64), "fc.bias": (10**9,)}
    assert guess(shapes, "resnet8") == Fit("resnet8", 10**9, 10**9)
    with pytest.raises(UserError, match=r"resnet8, 10 classes: .* 2 of another shape"):
        guess(
            torch_shapes(SHAPES) | {"fc.weight": (2**62, 0), "conv1.weight": (2**62, 0, 3, 3)},
            "resnet8",
        )


def test_a_network_is_not_tried_at_any_depth():
    def names(blocks):
        return {f"block1.layer.{i}.conv1.weight": (16, 16, 3, 3) for i in range(blocks)}

    assert _patterned(names(100)) == ["wrn_604_1"]
    assert _patterned(names(100_000)) == []


# Archives


def test_archives_that_announce_more_than_they_have(tmp_path, capsys):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", b"1234")
        archive.filelist[1].file_size = archive.filelist[1].compress_size = 2**31
    assert "parts of 2147483652 bytes in a file of" in error_of(path, capsys)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/byteorder", bytes(200 * MEGABYTE))
    assert "it is compressed" in error_of(path, capsys)


def safetensors_of(path, header, data=b"", length=None):
    header = json.dumps(header).encode()
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header + data)
    return path


@pytest.mark.parametrize(
    ("entries", "length"),
    [
        ([((2,), 0, 8)], 2**40),
        ([((2,), 0, 8)], 90_000_000),
        ([((2_000_000, 64), 0, 8)], None),
        ([((2_000_000, 64), 0, 512_000_000)], None),
        ([((2**62, 2**62), 0, 8)], None),
        ([((2,), 0, 8), ((2,), 0, 8)], None),
        ([((2,), 8, 0)], None),
    ],
)
def test_safetensors_that_announce_more_than_they_have(entries, length, tmp_path, capsys):
    pytest.importorskip("safetensors", reason="reads a file of safetensors")
    header = {
        f"{i}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        for i, (shape, start, end) in enumerate(entries)
    }
    path = safetensors_of(tmp_path / "a.safetensors", header, bytes(8), length)
    assert "no file of safetensors" in error_of(path, capsys)


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
            return convert.unwrap(torch_files.load(path))[0]
        except UserError:
            return None


@settings(deadline=None)
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


@settings(deadline=None, max_examples=300)
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


@settings(deadline=None)
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
        torch_files.save(path, {"x.weight": np.zeros((2, 2), np.float32)})
    data = path.read_bytes()
    for place, inserted in wrong:
        data = data[: place % len(data)] + inserted + data[place % len(data) + len(inserted) :]
    path.write_bytes(data)
    read_or_refused(path)


# Weights that are no numbers


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("value", "dtype"), [("nan", "float32"), ("-inf", "float16"), (1e300, "float64")]
)
def test_weights_that_are_not_finite(value, dtype, suffix, tmp_path, capsys):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="writes a file of safetensors")
    tensors = {k: x.astype(dtype) for k, x in to_torch(variables()).items()}
    tensors["fc.weight"][3, 5] = tensors["layer2.0.bn1.running_var"][0] = float(value)
    torch_files.save(tmp_path / f"a{suffix}", tensors)
    message = error_of(tmp_path / f"a{suffix}", capsys, "--network=resnet8")
    assert "in fc.weight, layer2.0.bn1.running_var. Use a checkpoint from before" in message

"""Images decoded on the host: what is cut out of them, in which order, and what goes wrong."""

import io
import math
import threading
import time
import types

import numpy as np
import pytest
from PIL import Image

from ipwd_jax.data import decode, memory, streaming
from ipwd_jax.errors import UserError

SIZE = 24


def encode(pixels, kind="JPEG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return file.getvalue()


def gradient(height=90, width=120):
    """Red grows to the right, green downwards; blue is a board of squares of 10 pixels."""
    y, x = np.mgrid[:height, :width]
    board = 200 * ((x // 10 + y // 10) % 2)
    red, green = 255 * (x + 0.5) / width, 255 * (y + 0.5) / height
    return np.stack([red, green, board], axis=-1).round().astype(np.uint8)


def noise(count=10, side=40):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


@pytest.fixture
def records():
    encoded = [encode(image, "PNG") for image in noise()]
    labels = np.arange(10, dtype=np.int32) % 2
    return streaming.Records("noise", labels, ("a", "b"), encoded.__getitem__, "0" * 8)


@pytest.fixture(params=["simplejpeg", "cv2", "PIL"])
def decoder(request, monkeypatch):
    """Each decoder in turn."""
    name = request.param
    hidden = {"simplejpeg": (), "cv2": ("simplejpeg",), "PIL": ("simplejpeg", "cv2")}[name]
    found = decode._optional
    monkeypatch.setattr(decode, "_optional", lambda name: None if name in hidden else found(name))
    assert decode.decoder_name().startswith(name)
    return name


def run(records, index, **settings):
    settings = {"seed": 1, "epoch": 2, "size": SIZE, "train": True, "threads": 2, **settings}
    return list(streaming.batches(records, np.asarray(index, np.int32), **settings))


class TestOrder:
    index = np.array([[3, 1, 4], [0, 5, 9], [2, 6, 8], [7, 7, 0]])

    def test_a_view_depends_on_seed_epoch_and_index_alone(self, records):
        whole = run(records, self.index)
        assert [b.shape for b in whole] == [(3, SIZE, SIZE, 3)] * 4 and whole[0].dtype == np.uint8
        for row, batch in zip(self.index, whole, strict=True):
            for sample, image in zip(row, batch, strict=True):
                alone = streaming.decode_train(records.read(sample), (1, 2, sample), SIZE)
                assert np.array_equal(image, alone)
        assert np.array_equal(whole[3][0], whole[3][1])
        for change in ({"seed": 0}, {"epoch": 3}):
            other = run(records, self.index, **change)
            assert not any(map(np.array_equal, np.concatenate(whole), np.concatenate(other)))

    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize(("threads", "prefetch"), [(1, 0), (3, 1), (0, 9)])
    def test_neither_batch_nor_start_nor_threads_matter(self, records, train, threads, prefetch):
        whole = np.concatenate(run(records, self.index, train=train))
        options = {"train": train, "threads": threads, "prefetch": prefetch}
        other = run(records, self.index.reshape(2, 6), **options)
        assert np.array_equal(np.concatenate(other), whole)
        resumed = run(records, self.index[1:], **options)
        assert np.array_equal(np.concatenate(resumed), whole[3:])

    def test_evaluation_gives_every_sample_in_order(self, records):
        (batch,) = run(records, [range(10)], train=False)
        for image, original in zip(batch, noise(), strict=True):
            assert np.array_equal(image, streaming.decode_eval(encode(original, "PNG"), SIZE))

    def test_no_steps(self, records):
        assert run(records, np.empty((0, 3))) == []


def reference_box(height, width, uniform):
    """torchvision's algorithm, with `uniform(low, high)` for its random numbers."""
    area = height * width
    for _ in range(10):
        target = area * uniform(0.08, 1.0)
        ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return h, w
    if width / height < 3 / 4:
        return round(width / (3 / 4)), width
    if width / height > 4 / 3:
        return height, round(height * (4 / 3))
    return height, width


class TestCropBox:
    @pytest.mark.parametrize(
        ("height", "width"), [(375, 500), (80, 31), (20, 300), (300, 9), (1, 1)]
    )
    def test_agrees_with_torchvision_given_the_same_numbers(self, height, width):
        rng = np.random.default_rng(0)
        for _ in range(200):
            draws = rng.random(23).tolist()
            rest = iter(draws)
            wanted = reference_box(height, width, lambda a, b, r=rest: a + (b - a) * next(r))
            top, left, h, w = decode.crop_box(height, width, draws)
            assert (h, w) == wanted
            assert 0 <= top <= height - h and 0 <= left <= width - w

    def test_fallback_is_centred(self):
        assert decode.crop_box(20, 300, [0.999] * 23) == (0, 136, 20, 27)
        assert decode.crop_box(300, 20, [0.999] * 20 + [0.0] * 3) == (136, 0, 27, 20)

    def test_share_ratio_and_place_are_uniform(self):
        boxes = []
        for index in range(3000):
            draws = decode._draw((0, 0, index))
            boxes.append(decode.crop_box(400, 400, draws))
        top, left, h, w = np.array(boxes).T
        # Large areas of extreme ratio do not fit, which takes the mean below (0.08 + 1) / 2.
        assert 0.45 < np.mean(h * w) / 400**2 < 0.54 and (h * w).min() > 0.07 * 400**2
        assert abs(np.log(w / h).mean()) < 0.02
        inside = (h < 380) & (w < 380)
        for start, side in ((top, h), (left, w)):
            assert abs(np.mean((start / (400 - side + 1e-9))[inside]) - 0.5) < 0.03

    def test_draws_of_neighbours_are_independent(self):
        draws = np.array(
            [decode._draw((s, e, i)) for s in (0, 1) for e in (0, 1) for i in range(50)]
        )
        assert len(np.unique(draws)) == draws.size
        assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.05


class TestPixels:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    @pytest.mark.parametrize(
        "side", [(90, 120), (250, 300), (1100, 800)]
    )  # whole, 1/2..1/8 decoded
    def test_a_crop_shows_its_box(self, decoder, kind, side):
        encoded, seen = encode(gradient(*side), kind), set()
        for index in range(12):
            draws = decode._draw((0, 0, index))
            top, left, h, w = decode.crop_box(*side, draws)
            image = streaming.decode_train(encoded, (0, 0, index), SIZE).astype(float)
            red, green = image[..., 0], image[..., 1]
            # A value is a place in the image, up to half a pixel of the reduced resolution.
            columns = (left + (np.arange(SIZE) + 0.5) * w / SIZE) / side[1] * 255
            rows = (top + (np.arange(SIZE) + 0.5) * h / SIZE) / side[0] * 255
            mirrored = draws[-1] < 0.5
            seen.add(mirrored)
            np.testing.assert_allclose(red.mean(0), columns[::-1] if mirrored else columns, atol=5)
            np.testing.assert_allclose(green.mean(1), rows, atol=5)
        assert seen == {True, False}

    def test_decoders_agree(self, decoder):
        for subsampling in (0, 2):
            encoded = encode(gradient(), subsampling=subsampling)
            whole = np.asarray(Image.open(io.BytesIO(encoded)))
            for index in range(10):
                top, left, h, w = decode.crop_box(90, 120, decode._draw((0, 0, index)))
                cut = Image.fromarray(whole[top : top + h, left : left + w])
                wanted = np.asarray(cut.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
                image = streaming.decode_train(encoded, (0, 0, index), SIZE)
                np.testing.assert_allclose(image.mean((0, 1)), wanted.mean((0, 1)), atol=2)

    def test_a_crop_is_averaged_where_it_is_scaled_down(self, decoder):
        """Noise keeps as much of its deviation as Pillow's antialiased resizing leaves it."""
        encoded = encode(noise(1, 400)[0], subsampling=0)
        whole = Image.open(io.BytesIO(encoded))
        boxes = [decode.crop_box(400, 400, decode._draw((0, 0, index))) for index in range(40)]
        large = [index for index, (_, _, h, w) in enumerate(boxes) if min(h, w) > 350]
        for index in large:
            top, left, h, w = boxes[index]
            cut = whole.crop((left, top, left + w, top + h))
            wanted = np.asarray(cut.resize((224, 224), Image.Resampling.BILINEAR))
            image = streaming.decode_train(encoded, (0, 0, index), 224, flip=False)
            assert image.std() < 36 < wanted[..., 0].std() * 1.5
            np.testing.assert_allclose(image.astype(int), wanted, atol=3)
        assert large

    def test_mirrored_only_where_that_is_wanted(self, decoder):
        for encoded in (encode(gradient()), encode(gradient(), "PNG")):
            for index in range(8):
                mirrored = decode._draw((0, 0, index))[-1] < 0.5
                image = streaming.decode_train(encoded, (0, 0, index), SIZE)
                upright = streaming.decode_train(encoded, (0, 0, index), SIZE, flip=False)
                assert np.array_equal(image, upright[:, ::-1] if mirrored else upright)
                assert (np.diff(upright[..., 0].mean(0)) > 0).all()  # red grows to the right

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
    def test_stopping_below_the_crop_changes_no_pixel_of_it(self, decoder, options):
        encoded = encode(noise(1, 80)[0], **options)
        wanted = np.asarray(Image.open(io.BytesIO(encoded)))
        for rows in (1, 15, 16, 17, 47, 48, 63, 79, 80):
            image = decode._open(encoded).decode(1, rows)
            np.testing.assert_allclose(image[:rows].astype(int), wanted[:rows], atol=1)

    @pytest.mark.parametrize("side", [(16, 8), (8, 16), (8, 8)])
    def test_centre_of_an_image_that_needs_no_resizing(self, side):
        pixels = noise(1, 16)[0][: side[0], : side[1]]  # the short side 8 is 256/224 of 7
        top, left = (4 if length == 16 else 0 for length in side)
        cut = pixels[top : top + 7, left : left + 7]
        assert np.array_equal(streaming.decode_eval(encode(pixels, "PNG"), 7), cut)

    @pytest.mark.parametrize("side", [(375, 500), (201, 99), (30, 30), (10, 45)])
    def test_centre_agrees_with_resizing_before_cutting(self, decoder, side):
        encoded = encode(gradient(*side))
        image = Image.open(io.BytesIO(encoded))
        short = 27  # round(24 * 256 / 224)
        width, height = (int(short * length / min(side)) for length in (side[1], side[0]))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
        wanted = np.asarray(image.crop((left, top, left + SIZE, top + SIZE))).astype(int)
        np.testing.assert_allclose(streaming.decode_eval(encoded, SIZE), wanted, atol=2)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
    def test_every_mode_becomes_rgb(self, decoder, kind):
        grey, grey_alpha = Image.new("L", (30, 30), 77), Image.new("LA", (30, 30), (77, 9))
        colour = Image.new("RGB", (30, 30), (10, 200, 90))
        images = {
            "JPEG": [(grey, (77,) * 3), (colour, (10, 200, 90))],
            "PNG": [(grey, (77,) * 3), (colour.convert("RGBA"), (10, 200, 90)),
                    (colour.quantize(4), (10, 200, 90)), (grey_alpha, (77,) * 3)],
            "GIF": [(colour.quantize(4), (10, 200, 90))],
            "WEBP": [(colour, (10, 200, 90))],
        }[kind]  # fmt: skip
        if kind == "JPEG":
            images.append((Image.new("CMYK", (30, 30), (0, 0, 0, 0)), (255,) * 3))
        for image, wanted in images:
            encoded = encode(image, kind)
            for made in (streaming.decode_train(encoded, (0, 0, 0), SIZE),
                         streaming.decode_eval(encoded, SIZE)):  # fmt: skip
                assert made.shape == (SIZE, SIZE, 3)
                assert np.abs(made.astype(int) - wanted).max() <= 6

    def test_a_photograph_is_turned_as_its_exif_says(self, decoder):
        exif = Image.Exif()
        pixels = gradient()[..., [0, 0, 0]]
        upright = streaming.decode_eval(encode(pixels[::-1, ::-1]), SIZE).astype(int)
        for orientation, image in ((1, pixels[::-1, ::-1]), (3, pixels)):
            exif[0x0112] = orientation
            turned = streaming.decode_eval(encode(image, exif=exif), SIZE)
            assert np.abs(turned - upright).mean() < 2

    def test_result_goes_where_it_is_wanted(self, decoder):
        encoded, out = encode(gradient()), np.zeros((2, SIZE, SIZE, 3), np.uint8)
        for index in range(4):  # mirrored and not
            assert streaming.decode_train(encoded, (0, 0, index), SIZE, out[1]) is not None
            assert np.array_equal(out[1], streaming.decode_train(encoded, (0, 0, index), SIZE))
        streaming.decode_eval(encoded, SIZE, out[1])
        assert np.array_equal(out[1], streaming.decode_eval(encoded, SIZE)) and not out[0].any()


class TestDamage:
    whole = encode(noise(1, 60)[0])

    @pytest.mark.parametrize(
        "damaged",
        [whole[: len(whole) // 2], whole[:100], b"", b"hello", b"\xff\xd8\xff", b"\xff\xd8" * 50,
         encode(noise(1)[0], "PNG")[:300], whole[:-2], whole[:30] + bytes(1000)],
    )  # fmt: skip
    def test_damaged_images_are_refused(self, decoder, damaged):
        for make in (lambda: streaming.decode_train(damaged, (0, 0, 0), SIZE),
                     lambda: streaming.decode_eval(damaged, SIZE)):  # fmt: skip
            with pytest.raises(UserError, match="cannot be read as an image"):
                make()

    def test_the_sample_is_named(self, tmp_path, records):
        for name, content in (("1.jpg", self.whole), ("2.jpg", self.whole[:500])):
            (tmp_path / "train/a").mkdir(parents=True, exist_ok=True)
            (tmp_path / "train/a" / name).write_bytes(content)
        files = streaming.folder_records(tmp_path, "train")
        with pytest.raises(UserError, match=r"train/a/2\.jpg cannot be read as an image"):
            run(files, [[0, 1]])
        (tmp_path / "train/a/2.jpg").unlink()
        with pytest.raises(UserError, match=r"No such file.*2\.jpg"):
            run(files, [[0, 1]])

        def broken(index):
            return b"" if index == 3 else records.read(index)

        changed = streaming.Records("noise", records.labels, ("a", "b"), broken, "0" * 8)
        with pytest.raises(UserError, match="noise: sample 3 cannot"):
            run(changed, [[0, 1], [2, 3], [4, 5]])


def workers():
    return [t for t in threading.enumerate() if t.name.startswith("decode")]


class TestThreads:
    def test_closing_ends_the_workers_at_once(self, records):
        def slow(index):
            time.sleep(0.02)
            return records.read(index)

        slowly = streaming.Records("slow", records.labels, ("a", "b"), slow, "0" * 8)
        index = np.zeros((50, 100), np.int32)
        settings = {"seed": 0, "epoch": 0, "size": SIZE, "train": True, "threads": 4}
        loader = streaming.batches(slowly, index, **settings)
        next(loader)
        assert workers()
        started = time.perf_counter()
        loader.close()
        assert time.perf_counter() - started < 1 and not workers()

    def test_errors_and_the_end_leave_no_workers(self, records):
        run(records, [[0, 1]])
        with pytest.raises(IndexError):
            run(records, [[0, 99]])
        assert not workers()

    def test_only_so_many_batches_are_made_ahead(self, records):
        counted = []

        def read(index):
            counted.append(index)
            return records.read(index)

        count = streaming.Records("counted", records.labels, ("a", "b"), read, "0" * 8)
        index = np.zeros((40, 4), np.int32)
        settings = {"seed": 0, "epoch": 0, "size": SIZE, "train": True, "threads": 2}
        loader = streaming.batches(count, index, prefetch=3, **settings)
        for given in (1, 2, 3):
            next(loader)
            deadline = time.monotonic() + 10
            while len(counted) < 4 * (given + 3) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            assert len(counted) == 4 * (given + 3)
        loader.close()

    def test_batches_that_do_not_fit_into_memory(self, records, monkeypatch):
        monkeypatch.setattr(memory, "available", lambda: 5 * 3 * SIZE * SIZE * 3)
        assert run(records, [[1, 2, 3]])
        with pytest.raises(UserError, match=r"20 decoded images of 24x24 .*image_size"):
            run(records, [[1, 2, 3, 4]])


def test_what_is_not_installed_is_done_without(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(decode, "importlib", types.SimpleNamespace(import_module=absent))
    monkeypatch.setattr(decode, "_optional", decode._optional.__wrapped__)
    assert streaming.decoder_name() == "PIL"

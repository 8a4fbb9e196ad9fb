"""What is decoded shows the wanted part of an image, whichever package decodes it."""

import io
import math
import types

import numpy as np
import pytest
from data_helpers import SIZE, encode, noise
from PIL import Image

from ipwd_jax.data import decode
from ipwd_jax.errors import UserError

WHOLE = encode(noise(1, 60)[0])


def gradient(height=90, width=120):
    """Red grows to the right, green downwards; blue is a board of squares of 10 pixels."""
    y, x = np.mgrid[:height, :width]
    board = 200 * ((x // 10 + y // 10) % 2)
    red, green = 255 * (x + 0.5) / width, 255 * (y + 0.5) / height
    return np.stack([red, green, board], axis=-1).round().astype(np.uint8)


@pytest.fixture(params=["simplejpeg", "cv2", "PIL"])
def decoder(request, monkeypatch):
    """Each decoder in turn."""
    name = request.param
    hidden = {"simplejpeg": (), "cv2": ("simplejpeg",), "PIL": ("simplejpeg", "cv2")}[name]
    found = decode._optional
    monkeypatch.setattr(decode, "_optional", lambda name: None if name in hidden else found(name))
    assert decode.decoder_name().startswith(name)
    return name


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
            image = decode.decode_train(encoded, (0, 0, index), SIZE).astype(float)
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
                image = decode.decode_train(encoded, (0, 0, index), SIZE)
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
            image = decode.decode_train(encoded, (0, 0, index), 224, flip=False)
            assert image.std() < 36 < wanted[..., 0].std() * 1.5
            np.testing.assert_allclose(image.astype(int), wanted, atol=3)
        assert large

    def test_mirrored_only_where_that_is_wanted(self, decoder):
        for encoded in (encode(gradient()), encode(gradient(), "PNG")):
            for index in range(8):
                mirrored = decode._draw((0, 0, index))[-1] < 0.5
                image = decode.decode_train(encoded, (0, 0, index), SIZE)
                upright = decode.decode_train(encoded, (0, 0, index), SIZE, flip=False)
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
        assert np.array_equal(decode.decode_eval(encode(pixels, "PNG"), 7), cut)

    @pytest.mark.parametrize("side", [(375, 500), (201, 99), (30, 30), (10, 45)])
    def test_centre_agrees_with_resizing_before_cutting(self, decoder, side):
        encoded = encode(gradient(*side))
        image = Image.open(io.BytesIO(encoded))
        short = 27  # round(24 * 256 / 224)
        width, height = (int(short * length / min(side)) for length in (side[1], side[0]))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
        wanted = np.asarray(image.crop((left, top, left + SIZE, top + SIZE))).astype(int)
        np.testing.assert_allclose(decode.decode_eval(encoded, SIZE), wanted, atol=2)

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
            for made in (decode.decode_train(encoded, (0, 0, 0), SIZE),
                         decode.decode_eval(encoded, SIZE)):  # fmt: skip
                assert made.shape == (SIZE, SIZE, 3)
                assert np.abs(made.astype(int) - wanted).max() <= 6

    def test_a_photograph_is_turned_as_its_exif_says(self, decoder):
        exif = Image.Exif()
        pixels = gradient()[..., [0, 0, 0]]
        upright = decode.decode_eval(encode(pixels[::-1, ::-1]), SIZE).astype(int)
        for orientation, image in ((1, pixels[::-1, ::-1]), (3, pixels)):
            exif[0x0112] = orientation
            turned = decode.decode_eval(encode(image, exif=exif), SIZE)
            assert np.abs(turned - upright).mean() < 2

    def test_orientation_in_xmp_alone(self, decoder):
        pixels = gradient()[..., [0, 0, 0]]
        xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description '
        xmp += b'tiff:Orientation="3"/></rdf:RDF></x:xmpmeta>'
        turned = decode.decode_eval(encode(pixels, xmp=xmp), SIZE).astype(int)
        upright = decode.decode_eval(encode(pixels[::-1, ::-1]), SIZE)
        assert np.abs(turned - upright).mean() < 2

    def test_narrow_images_keep_their_height(self, decoder):
        for height, width in ((40, 5), (3, 2)):
            encoded = encode(noise(1, height)[0][:, :width])
            assert decode._open(encoded).decode(1, height).shape == (height, width, 3)
            assert decode.decode_eval(encoded, SIZE).shape == (SIZE, SIZE, 3)

    def test_result_goes_where_it_is_wanted(self, decoder):
        encoded, out = encode(gradient()), np.zeros((2, SIZE, SIZE, 3), np.uint8)
        for index in range(4):  # mirrored and not
            assert decode.decode_train(encoded, (0, 0, index), SIZE, out[1]) is not None
            assert np.array_equal(out[1], decode.decode_train(encoded, (0, 0, index), SIZE))
        decode.decode_eval(encoded, SIZE, out[1])
        assert np.array_equal(out[1], decode.decode_eval(encoded, SIZE)) and not out[0].any()


@pytest.mark.parametrize(
    "damaged",
    [WHOLE[: len(WHOLE) // 2], WHOLE[:100], b"", b"hello", b"\xff\xd8\xff", b"\xff\xd8" * 50,
     encode(noise(1)[0], "PNG")[:300], WHOLE[:-2], WHOLE[:30] + bytes(1000)],
)  # fmt: skip
def test_damaged_images_are_refused(decoder, damaged):
    for make in (lambda: decode.decode_train(damaged, (0, 0, 0), SIZE),
                 lambda: decode.decode_eval(damaged, SIZE)):  # fmt: skip
        with pytest.raises(UserError, match="cannot be read as an image"):
            make()


def test_what_is_not_installed_is_done_without(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(decode, "importlib", types.SimpleNamespace(import_module=absent))
    monkeypatch.setattr(decode, "_optional", decode._optional.__wrapped__)
    assert decode.decoder_name() == "PIL"

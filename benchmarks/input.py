"""Measure how fast images become batches: decoding on the host, augmentation on the device.

    python benchmarks/input.py [--images 400] [--seconds 3] [--repeats 3]

Writes synthetic JPEGs of 500x375 pixels at quality 90 to a temporary folder. Prints one JSON line
about the machine, and one per arm with its images per second (the median of alternating repeats,
and the slowest and the fastest as `spread`) and its CPU milliseconds per image, which other work on
the machine disturbs less. Every arm that decodes reads the same files and makes the same random
crops of 224x224 pixels.
"""

import argparse
import concurrent.futures
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from PIL import Image

from ipwd_jax.data import augment, decode, streaming
from ipwd_jax.data import records as records_lib

SIZE, BATCH, AHEAD = 224, 64, 4
PACKAGES = ("jax", "numpy", "pillow", "simplejpeg", "opencv-python-headless", "grain")
Decoder = Callable[[bytes, int], np.ndarray]


def synthetic(rng: np.random.Generator) -> Image.Image:
    """Return octaves of smooth noise, mostly grey, with the detail and contrast of a photograph."""
    total = np.zeros((375, 500, 3), np.float32)
    for octave in range(1, 9):
        rows, columns = 375 * 2**octave // 256 + 2, 500 * 2**octave // 256 + 2
        grey = rng.standard_normal((rows, columns, 1)) * 1.2
        noise = (grey + 0.35 * rng.standard_normal((rows, columns, 3))).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel]).resize(
                (500, 375), Image.Resampling.BICUBIC
            )
            total[..., channel] += np.asarray(layer) * 0.84**octave
    return Image.fromarray(np.clip(128 + 45 * total, 0, 255).astype(np.uint8))


def write_images(folder: pathlib.Path, count: int) -> int:
    """Write `count` files to `folder`/train/a; return their total size in bytes."""
    rng, total = np.random.default_rng(0), 0
    (folder / "train" / "a").mkdir(parents=True)
    for i in range(count):
        file = folder / "train" / "a" / f"{i:05d}.jpg"
        synthetic(rng).save(file, quality=90)
        total += file.stat().st_size
    return total


def draw(index: int, height: int, width: int) -> tuple[int, int, int, int, bool]:
    """Return the top, bottom, left and right edge of a crop, and whether it is mirrored."""
    draws = np.random.Generator(np.random.Philox(key=index)).random(23).tolist()
    top, left, rows, columns = decode.crop_box(height, width, draws)
    return top, top + rows, left, left + columns, draws[-1] < 0.5


def by_pillow(encoded: bytes, index: int) -> np.ndarray:
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    top, bottom, left, right, mirrored = draw(index, image.height, image.width)
    image = image.crop((left, top, right, bottom)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image)


def by_cv2(encoded: bytes, index: int) -> np.ndarray:
    import cv2

    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    image = cut(image, index)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def by_simplejpeg(encoded: bytes, index: int) -> np.ndarray:
    import simplejpeg

    return cut(simplejpeg.decode_jpeg(encoded), index)


def cut(image: np.ndarray, index: int) -> np.ndarray:
    import cv2

    top, bottom, left, right, mirrored = draw(index, *image.shape[:2])
    image = cv2.resize(image[top:bottom, left:right], (SIZE, SIZE))
    return cv2.flip(image, 1) if mirrored else image


def ours(encoded: bytes, index: int) -> np.ndarray:
    return decode.decode_train(encoded, (0, 0, index), SIZE)


def pooled(decoder: Decoder, records: records_lib.Records, threads: int) -> Iterator[int]:
    """Yield the sizes of batches that a plain, always busy thread pool decodes."""

    def part(indices: list[int], out: np.ndarray) -> None:
        for index, image in zip(indices, out, strict=True):
            image[:] = decoder(records.read(index), index)

    def submit(step: int) -> list[concurrent.futures.Future]:
        rows = [(step * BATCH + i) % len(records.labels) for i in range(BATCH)]
        batch = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)
        return [pool.submit(part, rows[i : i + 8], batch[i : i + 8]) for i in range(0, BATCH, 8)]

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pending = [submit(step) for step in range(AHEAD)]
        try:
            for step in itertools.count(AHEAD):
                pending.append(submit(step))
                for task in pending.pop(0):
                    task.result()
                yield BATCH
        finally:
            pool.shutdown(cancel_futures=True)


def streamed(records: records_lib.Records, threads: int) -> Iterator[int]:
    """Yield the sizes of batches that this package streams."""
    index = np.arange(10_000 * BATCH, dtype=np.int32).reshape(-1, BATCH) % len(records.labels)
    loader = streaming.batches(
        records, index, seed=0, epoch=0, size=SIZE, train=True, threads=threads, prefetch=AHEAD
    )
    try:
        for batch in loader:
            yield len(batch)
    finally:
        loader.close()


def grained(decoder: Decoder, records: records_lib.Records, threads: int) -> Iterator[int]:
    """Yield the sizes of batches that grain's threads decode."""
    import grain

    indices = grain.MapDataset.range(len(records.labels)).repeat()
    images = indices.map(lambda index: decoder(records.read(int(index)), int(index)))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD * BATCH)
    loader = iter(images.to_iter_dataset(options).batch(BATCH))
    try:
        for batch in loader:
            yield len(batch)
    finally:
        loader.close()


def arms(records: records_lib.Records) -> dict[str, tuple[tuple[str, ...], Callable]]:
    """Return each arm's required modules, and its function from a thread count to batches."""

    def plain(decoder: Decoder) -> Callable:
        return functools.partial(pooled, decoder, records)

    return {
        "PIL": ((), plain(by_pillow)),
        "cv2": (("cv2",), plain(by_cv2)),
        "simplejpeg whole + cv2 resize": (("cv2", "simplejpeg"), plain(by_simplejpeg)),
        "ours": ((), functools.partial(streamed, records)),
        "grain threads, our decoder": (("grain",), functools.partial(grained, ours, records)),
        "grain threads, simplejpeg whole + cv2 resize": (
            ("cv2", "grain", "simplejpeg"),
            functools.partial(grained, by_simplejpeg, records),
        ),
    }


def measure(batches: Iterator[int], seconds: float) -> tuple[float, float]:
    """Return images per second and CPU milliseconds per image, not counting the first batch."""
    next(batches)
    started, cpu, images = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        images += next(batches)
    rate = images / (time.perf_counter() - started)
    cost = 1e3 * (time.process_time() - cpu) / images
    batches.close()
    return rate, cost


def report(arm: str, threads: int, results: list[tuple[float, float]]) -> None:
    rates, costs = zip(*results, strict=True)
    line = {"arm": arm, "threads": threads, "images_per_s": round(statistics.median(rates))}
    line["spread"] = [round(min(rates)), round(max(rates))]
    line["cpu_ms_per_image"] = round(statistics.median(costs), 3)
    print(json.dumps(line), flush=True)


def resident(batch: int) -> Iterator[int]:
    """Yield the sizes of augmented batches of CIFAR-sized images that reside on the device."""
    images = jax.random.bits(jax.random.key(0), (4096, 32, 32, 3), np.uint8)
    mean = std = np.full(3, 0.5, np.float32)

    @jax.jit
    def step(key: jax.Array, index: jax.Array) -> jax.Array:
        views = augment.draw_views(key, 0, index, augment.num_views(4, True))
        return augment.normalize(augment.apply_views(images[index], views, 4, True), mean, std)

    index = np.arange(batch, dtype=np.int32)
    for seed in itertools.count():
        step(jax.random.key(seed), index).block_until_ready()
        yield batch


def missing(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(count: int, seconds: float, repeats: int) -> None:
    cpus = streaming.cpus()
    with tempfile.TemporaryDirectory() as folder:
        total = write_images(pathlib.Path(folder), count)
        about = {"python": platform.python_version(), "cpus": cpus, "machine": platform.machine()}
        about |= {package: version(package) for package in PACKAGES}
        about |= {"decoder": decode.decoder_name(), "kB_per_image": round(total / count / 1e3)}
        about |= {"device": jax.devices()[0].device_kind, "load": round(os.getloadavg()[0], 1)}
        print(json.dumps(about), flush=True)
        records = records_lib.folder_records(folder, "train")
        for threads in sorted({1, cpus}):
            runs = {}
            for arm, (modules, batches) in arms(records).items():
                if lacks := missing(modules):
                    print(json.dumps({"arm": arm, "skipped": f"not installed: {lacks}"}))
                else:
                    runs[arm] = batches, []
            for _, (batches, results) in list(runs.items()) * repeats:
                results.append(measure(batches(threads), seconds))
            for arm, (_, results) in runs.items():
                report(arm, threads, results)
    for batch in (64, 512):
        results = [measure(resident(batch), seconds) for _ in range(repeats)]
        report(f"resident crop + flip + normalise, batch {batch}", cpus, results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    main(arguments.images, arguments.seconds, arguments.repeats)

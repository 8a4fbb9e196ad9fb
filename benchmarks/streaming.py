"""Compare training on streamed JPEG files with decoding alone and with training alone.

    python benchmarks/streaming.py [--pair TEACHER,STUDENT] [--image-size 64] [--files 2000]

Writes synthetic JPEGs of 500x375 pixels to a temporary folder and trains a student of an untrained
teacher on them through `train.run`. Prints one JSON line per arm. `over_bound` is the speed of
streamed training over the most that its two parts allow: the speed of the slower part if a GPU
computes the step, and of one part after the other if both share the cores of the CPU.
"""

import argparse
import csv
import json
import os
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
from input import write_images
from our_arm import untrained_teacher
from step import ON_GPU

from ipwd_jax import config as config_lib
from ipwd_jax import data, models, train
from ipwd_jax.data import records as records_lib
from ipwd_jax.data import streaming


def write_folder(folder: pathlib.Path, files: int) -> None:
    """Write `files` training and 64 test images, which are hard links to at most 400 images."""
    write_images(folder, min(files, 400))
    there = sorted((folder / "train" / "a").iterdir())
    for label in ("a", "b"):
        for split, count in (("train", files // 2), ("val", 32)):
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                os.link(there[i % len(there)], folder / split / label / f"link{i:06d}.jpg")
    for file in there:
        file.unlink()


def decoded(folder: pathlib.Path, options: argparse.Namespace) -> float:
    """Return the images per second of the decoding threads alone."""
    records = records_lib.folder_records(folder, "train")
    steps = len(records.labels) // options.batch
    index = np.arange(steps * options.batch).reshape(steps, options.batch)
    started = time.perf_counter()
    for _ in streaming.batches(
        records, index, seed=0, epoch=0, size=options.image_size, train=True
    ):
        pass
    return index.size / (time.perf_counter() - started)


def trained(
    options: argparse.Namespace, folder: pathlib.Path, dataset: data.Dataset | None
) -> float:
    """Return the median images per second of a run's epochs after the first, which compiles."""
    config = config_lib.default()
    config.data.update({"name": f"folder:{folder / 'images'}", "streaming": dataset is None})
    config.data.image_size = options.image_size
    config.data.crop_padding *= dataset is not None  # streamed images get random resized crops
    config.batch_size, config.epochs = options.batch, options.epochs
    config.precision, config.optimizer.learning_rate = options.precision, 1e-4
    config.teacher.name, config.model.name = options.pair.split(",")
    config.teacher.workdir, config.teacher.view_cache = str(folder / "teacher"), "off"
    config.loss.update({"ce": 0.1, "kd": 0.9})
    run = folder / ("streamed" if dataset is None else "resident")
    train.run(config, run, dataset)
    with (run / "metrics.csv").open() as file:
        speeds = [float(row["images_per_second"]) for row in csv.DictReader(file)]
    return statistics.median(speeds[1:])


def main(options: argparse.Namespace) -> None:
    """Time the three arms one after the other."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_folder(folder / "images", options.files)
        teacher = options.pair.partition(",")[0]
        side, rng = options.image_size, np.random.default_rng(0)
        init = jax.jit(models.create(teacher, 2).init)
        untrained_teacher(folder / "teacher", init(jax.random.key(0), np.zeros((1, side, side, 3))))
        images = rng.integers(0, 256, (options.files, side, side, 3), np.uint8)
        labels = np.arange(options.files) % 2
        noise = data.from_arrays(images, labels, images[:64], labels[:64])
        found = {"decoded, no step": decoded(folder / "images", options)}
        found["step, images in memory"] = trained(options, folder, noise)
        speeds = list(found.values())
        bound = min(speeds) if ON_GPU else 1 / sum(1 / speed for speed in speeds)
        found["streamed"] = trained(options, folder, None)
    for arm, speed in found.items():
        line = {"arm": arm, "images_per_second": round(speed, 1), "pair": options.pair}
        line |= {"image_size": side, "threads": streaming.cpus()}
        line |= {"over_bound": round(speed / bound, 3)} if arm == "streamed" else {}
        print(json.dumps({**line, "device": jax.local_devices()[0].device_kind}), flush=True)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pair = "ResNet34_imagenet,ResNet18_imagenet" if ON_GPU else "resnet20,resnet8"
    parser.add_argument("--pair", default=pair)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=256 if ON_GPU else 64)
    parser.add_argument("--files", type=int, default=20_000 if ON_GPU else 2_000)
    parser.add_argument("--image-size", type=int, default=224 if ON_GPU else 64)
    parser.add_argument("--precision", default="bfloat16" if ON_GPU else "float32")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())

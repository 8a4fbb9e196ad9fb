"""CIFAR-10 and CIFAR-100, read from the official binary archives without TensorFlow.

Krizhevsky, 2009, Learning Multiple Layers of Features from Tiny Images.
"""

import hashlib
import os
import pathlib
import shutil
import sys
import tarfile
import urllib.request
import uuid

import numpy as np
from ml_collections import ConfigDict

from ipwd_jax.data.base import STATISTICS, Dataset, from_arrays
from ipwd_jax.errors import UserError

URL = "https://www.cs.toronto.edu/~kriz"
SHA256 = {
    "cifar10": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar100": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
}
COUNTS = (50_000, 10_000)  # training and test images of either data set
# Folder in the archive, files of the training and of the test split, file of class names, and
# number of label bytes in a record.
_LAYOUT = {
    "cifar10": (
        "cifar-10-batches-bin",
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        ["test_batch.bin"],
        "batches.meta.txt",
        1,
    ),
    "cifar100": ("cifar-100-binary", ["train.bin"], ["test.bin"], "fine_label_names.txt", 2),
}


def cifar(config: ConfigDict, name: str) -> Dataset:
    """Read CIFAR-10, or CIFAR-100 with its 100 fine labels, in the official order and split.

    Args:
        config: `dir` is the folder that holds the archive or its unpacked folder (empty:
            `~/.cache/ipwd_jax`); `download` allows a missing archive to be downloaded.
        name: "cifar10" or "cifar100".

    Raises:
        UserError: the data is missing or damaged, or cannot be downloaded.
    """
    root = pathlib.Path(config.dir or "~/.cache/ipwd_jax").expanduser()
    folder, train, test, names, label_bytes = _LAYOUT[name]
    if root.name == folder:
        root = root.parent
    files = _read(root, name, folder, [*train, *test, names], config.download)

    def split(parts: list[str], count: int) -> tuple[np.ndarray, np.ndarray]:
        # A record consists of its label bytes (of CIFAR-100: coarse, fine) and 3 x 32 x 32 pixels,
        # channel by channel.
        size = label_bytes + 3072
        data = b"".join(files[part] for part in parts)
        if len(data) != count * size:
            raise UserError(
                f"{', '.join(parts)} of {name} in {root} have {len(data)} bytes in total, but "
                f"{count} images of {size} bytes each are needed; unpack the archive again"
            )
        records = np.frombuffer(data, np.uint8).reshape(-1, size)
        images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return images, records[:, label_bytes - 1].astype(np.int32)

    mean, std = STATISTICS[name]
    return from_arrays(
        *split(train, COUNTS[0]),
        *split(test, COUNTS[1]),
        name=name,
        class_names=files[names].decode().split(),
        mean=config.mean or mean,
        std=config.std or std,
    )


def _read(
    root: pathlib.Path, name: str, folder: str, files: list[str], download: bool
) -> dict[str, bytes]:
    archive = root / f"{name.replace('cifar', 'cifar-')}-binary.tar.gz"
    if not archive.exists() and (root / folder).is_dir():
        try:
            return {file: (root / folder / file).read_bytes() for file in files}
        except OSError as error:
            raise UserError(
                f"{root / folder} is an incomplete copy of {name}: {error}. Unpack the archive "
                "again"
            ) from error
    if not archive.exists():
        if not download:
            raise UserError(
                f"{name} is not in {root}. Download it with --config.data.download, put "
                f"{archive.name} from {URL} there, or name its folder with --config.data.dir"
            )
        _fetch(f"{URL}/{archive.name}", archive, SHA256[name])
    elif _sha256(archive) != SHA256[name]:
        raise UserError(
            f"{archive} is damaged or a different file: its SHA-256 is not {SHA256[name]}. "
            "Delete it and download it again with --config.data.download"
        )
    with tarfile.open(archive) as tar:
        return {file: _content(tar, f"{folder}/{file}") for file in files}


def _content(archive: tarfile.TarFile, member: str) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # the checksum of the archive guarantees that it is not a folder
    return file.read()


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(url: str, path: pathlib.Path, sha256: str) -> None:
    """Download under another name, which changes to `path` only once the checksum is right."""
    # Other processes, also on other machines, may download it at the same time.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    by_hand = f"Download {url} by hand to {path}, or use another data source."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as response, partial.open("wb") as file:
            size = f"{int(response.headers.get('Content-Length') or 0) / 1e6:,.0f} MB"
            print(f"Downloading {url} ({size}) to {path}", file=sys.stderr, flush=True)
            shutil.copyfileobj(response, file)
        if _sha256(partial) != sha256:
            raise UserError(
                f"the file received from {url} does not have the SHA-256 {sha256}. {by_hand}"
            )
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path.name} could not be downloaded: {error}. {by_hand}") from error
    finally:
        partial.unlink(missing_ok=True)

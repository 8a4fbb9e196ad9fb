"""CIFAR is read from its official archives, of which the tests make small ones."""

import hashlib
import io
import shutil
import tarfile

import numpy as np
import pytest
from data_helpers import fails, load, same

from ipwd_jax import data
from ipwd_jax.data import cifar


def cifar_files(name):
    """A made-up archive's files, and the arrays that they hold."""
    folder, train, test, names, label_bytes = cifar._LAYOUT[name]
    rng = np.random.default_rng(0)
    files, splits = {}, []
    for parts in (train, test):
        images, labels = [], []
        for part in parts:
            image = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
            label = np.arange(4) % 2
            coarse = np.full((4, label_bytes - 1), 19)
            pixels = image.transpose(0, 3, 1, 2).reshape(4, -1)
            record = np.concatenate([coarse, label[:, None], pixels], axis=1).astype(np.uint8)
            files[f"{folder}/{part}"] = record.tobytes()
            images.append(image)
            labels.append(label)
        splits += [np.concatenate(images), np.concatenate(labels)]
    files[f"{folder}/{names}"] = b"apple\npear\n\n"
    return files, data.from_arrays(*splits)


@pytest.fixture(params=["cifar10", "cifar100"])
def archive(request, tmp_path, monkeypatch):
    """A made-up official archive on a "server", its arrays, and an empty local folder."""
    name = request.param
    files, expected = cifar_files(name)
    server = tmp_path / "server"
    server.mkdir()
    path = server / f"{name.replace('cifar', 'cifar-')}-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for file, content in files.items():
            info = tarfile.TarInfo(file)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(cifar, "URL", server.as_uri())
    counts = len(expected.train.labels), len(expected.test.labels)
    monkeypatch.setattr(cifar, "COUNTS", counts)
    monkeypatch.setitem(cifar.SHA256, name, hashlib.sha256(path.read_bytes()).hexdigest())
    return name, path, expected, tmp_path / "local"


def test_archive_is_fetched_once_and_read(archive, capsys):
    name, path, expected, local = archive
    fails([f"{name} is not in", "--config.data.download", path.name], name, dir=str(local))
    dataset = load(name, dir=str(local), download=True)
    assert f" ({path.stat().st_size / 1e6:,.0f} MB) to {local}" in capsys.readouterr().err
    assert same(dataset, expected) and dataset.class_names == ("apple", "pear")
    np.testing.assert_allclose(dataset.mean, cifar.STATISTICS[name][0])
    np.testing.assert_allclose(
        load(name, dir=str(local), mean=(0.1, 0.2, 0.3)).mean, (0.1, 0.2, 0.3)
    )
    path.unlink()
    assert same(load(name, dir=str(local)), expected)


def test_unpacked_folder_is_read(archive):
    name, path, expected, local = archive
    with tarfile.open(path) as tar:
        tar.extractall(local, filter="data")
    assert same(load(name, dir=str(local)), expected)
    assert same(load(name, dir=str(local / cifar._LAYOUT[name][0])), expected)
    cut = next(local.glob("*/*test*.bin"))
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])  # two whole records
    fails([cut.name, "4 images", "are needed"], name, dir=str(local))
    next(local.glob("*/*test*.bin")).unlink()
    fails(["incomplete copy", "test"], name, dir=str(local))


def test_wrong_bytes_are_refused_and_leave_nothing(archive):
    name, path, _, local = archive
    path.write_bytes(path.read_bytes()[:-7])
    fails(["SHA-256", "by hand"], name, dir=str(local), download=True)
    assert list(local.iterdir()) == []
    shutil.copy(path, local)
    fails(["damaged", "Delete it"], name, dir=str(local))


def test_no_server(archive):
    name, path, _, local = archive
    path.unlink()
    fails(["could not be downloaded", "by hand"], name, dir=str(local), download=True)
    assert list(local.iterdir()) == []

"""Batches are streamed in the wanted order, by threads that end with them."""

import threading
import time

import numpy as np
import pytest
from data_helpers import SIZE, encode, noise, run

from ipwd_jax.data import decode, memory, streaming
from ipwd_jax.data import records as records_lib
from ipwd_jax.errors import UserError


@pytest.fixture
def records():
    encoded = [encode(image, "PNG") for image in noise()]
    labels = np.arange(10, dtype=np.int32) % 2
    return records_lib.Records("noise", labels, ("a", "b"), encoded.__getitem__, "0" * 8)


class TestOrder:
    index = np.array([[3, 1, 4], [0, 5, 9], [2, 6, 8], [7, 7, 0]])

    def test_a_view_depends_on_seed_epoch_and_index_alone(self, records):
        whole = run(records, self.index)
        assert [b.shape for b in whole] == [(3, SIZE, SIZE, 3)] * 4 and whole[0].dtype == np.uint8
        for row, batch in zip(self.index, whole, strict=True):
            for sample, image in zip(row, batch, strict=True):
                alone = decode.decode_train(records.read(sample), (1, 2, sample), SIZE)
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
            assert np.array_equal(image, decode.decode_eval(encode(original, "PNG"), SIZE))

    def test_no_steps(self, records):
        assert run(records, np.empty((0, 3))) == []


def test_the_sample_is_named(tmp_path, records):
    whole = encode(noise(1, 60)[0])
    for name, content in (("1.jpg", whole), ("2.jpg", whole[:500])):
        (tmp_path / "train/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train/a" / name).write_bytes(content)
    files = records_lib.folder_records(tmp_path, "train")
    with pytest.raises(UserError, match=r"train/a/2\.jpg cannot be read as an image"):
        run(files, [[0, 1]])
    (tmp_path / "train/a/2.jpg").unlink()
    with pytest.raises(UserError, match=r"No such file.*2\.jpg"):
        run(files, [[0, 1]])

    def broken(index):
        return b"" if index == 3 else records.read(index)

    changed = records_lib.Records("noise", records.labels, ("a", "b"), broken, "0" * 8)
    with pytest.raises(UserError, match="noise: sample 3 cannot"):
        run(changed, [[0, 1], [2, 3], [4, 5]])


def workers():
    return [t for t in threading.enumerate() if t.name.startswith("decode")]


class TestThreads:
    def test_closing_ends_the_workers_at_once(self, records):
        def slow(index):
            time.sleep(0.02)
            return records.read(index)

        slowly = records_lib.Records("slow", records.labels, ("a", "b"), slow, "0" * 8)
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

        count = records_lib.Records("counted", records.labels, ("a", "b"), read, "0" * 8)
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

import numpy as np
import pytest

from ipwd_jax import kept


def computed(calls):
    calls.append(1)
    return {"a": np.arange(1000, dtype=np.float32), "b": np.ones((2, 3))}


def test_arrays_are_computed_once(tmp_path):
    calls = []
    for _ in range(2):
        found = kept.arrays(tmp_path / "folder" / "some.npz", lambda: computed(calls))
        assert found.keys() == {"a", "b"}
        for name, array in computed([]).items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
    assert len(calls) == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "no archive"])
def test_a_damaged_file_is_computed_again(damage, tmp_path, capsys):
    file, calls = tmp_path / "some.npz", []
    kept.arrays(file, lambda: computed(calls))
    data = file.read_bytes()
    middle = len(data) // 3
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    contents = {"empty": b"", "cut": data[:middle], "flipped": flipped, "no archive": b"text" * 99}
    file.write_bytes(contents[damage])
    for _ in range(2):
        np.testing.assert_array_equal(
            kept.arrays(file, lambda: computed(calls))["a"], computed([])["a"]
        )
    assert len(calls) == 2
    assert f"warning: {file} is damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["some.npz"]

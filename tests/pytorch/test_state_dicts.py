"""The tensors of a network are found among all that a training script saved."""

import numpy as np
import pytest
from pytorch_helpers import state_dict, view, zip_of

from ipwd_jax.errors import UserError
from ipwd_jax.pytorch import files
from ipwd_jax.pytorch.state_dicts import unwrap


@pytest.mark.parametrize("key", ["model", "state_dict", "net", "student", "teacher"])
def test_usual_wrappers(key):
    tensors = {"a.weight": np.zeros((2, 2))}
    assert unwrap({key: tensors, "epoch": 3}) == (tensors, {"epoch": 3})


def test_several_state_dicts():
    one, two = {"a.weight": np.zeros((2, 2))}, {"a.weight": np.ones((2, 2))}
    tree = {"student": one, "teacher": two, "ema": two}
    with pytest.raises(UserError, match=r"several state dicts.*--key=NAME`: student, teacher, ema"):
        unwrap(tree)
    assert unwrap(tree, "ema")[0]["a.weight"].all()
    with pytest.raises(UserError, match="no state dict under 'nope'"):
        unwrap(tree, "nope")
    with pytest.raises(UserError, match=r"unusual names only; .*: ema"):
        unwrap({"ema": two})


def test_heads_of_self_supervision_are_left_out(capsys):
    x = np.zeros((2, 2))
    tensors, _ = unwrap({"module.backbone.fc.weight": x, "module.proj_head.0.weight": x})
    assert list(tensors) == ["fc.weight"]
    assert "not part of the classifier, left out: proj_head.0.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_wrapped_networks_are_left_out(prefix):
    tensors, _ = unwrap({f"{prefix}fc.weight": np.zeros((2, 2))})
    assert list(tensors) == ["fc.weight"]


def test_two_tensors_of_one_name_are_refused():
    x = np.zeros((2, 2))
    with pytest.raises(UserError, match=r"'fc\.weight' twice"):
        unwrap({"fc.weight": x, "module.fc.weight": x + 1})


def test_two_state_dicts_of_the_same_numbers(tmp_path):
    """A script may save a network and its best epoch, which is then the same, in one file."""
    one = view(4, (2, 2), (2, 1))
    both = {"model": state_dict({"a": one})[2:-1], "best": state_dict({"a": one})[2:-1]}
    path = zip_of(state_dict(both), tmp_path / "a.pth", [bytes(16)])
    assert unwrap(files.load(path))[0]["a"].shape == (2, 2)

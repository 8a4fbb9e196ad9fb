"""Every setting, with values of all types and ranges, is taken or refused by its name.

A value is given from Python, or on the command line. What a check takes is put together into a run
on tiny images, because some values contradict the data, the networks or the loss terms.
"""

import collections
import contextlib
import functools
import io
import math
import operator
import sys
from pathlib import Path
from unittest import mock

import faults_helpers as helpers
import numpy as np
import pytest
from absl import flags
from helpers import settings, squares
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import data, losses, main, signals, train
from ipwd_jax.errors import UserError

DEFAULTS = config_lib.flat(config_lib.default())
pytestmark = [
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),  # ml_collections
    # A run with such a product in its loss ends as one that has diverged.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
OPTIONS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
NUMBERS = [0, 1, -1, 2, 7, 0.5, 1.0, 2**31, 2**32, 2**63, 10**400, 1e-45, 1e38, 1e308, -0.0]
NUMBERS += [math.nan, math.inf, -math.inf, np.int64(3), np.float32(0.5), np.float64(1e300)]
WORDS = ["", " ", "none", "A", "best", "off", "kd", "ce", "student", "heads/cls", "resnet8"]
WORDS += ["tiny_net", "step", "cosine", "adamw", "float32", "ipwd", "a" * 300, "/", "..", "\0"]
WORDS += ["folder:", "numpy:", "folder:\0", "numpy:a.npz", "digits", "é", "\udcff", "\ud800", "%s"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(-3, 300),
    st.floats(-1.0, 10.0),
    st.sampled_from(WORDS),
    st.text(max_size=8),
)
VALUES = st.one_of(
    SCALARS,
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.lists(SCALARS, max_size=4).map(tuple),
    st.binary(max_size=2),
    st.sampled_from([ConfigDict(), object(), 1j, {1}, np.arange(3), np.zeros(())]),
)


def around(path, file):
    """Return a config in which a setting takes part in the run, so that its value matters."""
    config = settings(data__name=f"numpy:{file}", optimizer__milestones=())
    config.teacher.optimizer.milestones = config.first_stage.optimizer.milestones = ()
    config.terms.crd.negatives, config.terms.fitnet.layer = 4, 1  # as these images have it
    section, _, rest = path.partition(".")
    if section == "terms" and rest:
        term = rest.partition(".")[0]
        config.loss[term] = 1.0
        if losses.TERMS[term].first_stage_params:
            config.first_stage.epochs, config.first_stage.loss[term] = 1, 1.0
    if section == "first_stage":
        config.first_stage.epochs, config.first_stage.loss.ce = 1, 1.0
    return config


def outcome(config, path, value):
    """Return how a config is taken, or else check that the message says what is wrong."""
    try:
        train._checked(config, None)
    except UserError as error:
        message, *_, name = str(error), *path.rsplit(".", 1)
        assert name in message or str(value) in message or repr(value) in message, message
        return "refused"
    return "accepted"


def changed(config, path, value):
    *parents, name = path.split(".")
    with config.ignore_type():
        functools.reduce(operator.getitem, parents, config)[name] = value


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Return an archive of the images that most tests train on."""
    images = squares()
    path = tmp_path_factory.mktemp("data") / "squares.npz"
    np.savez(path, train_images=images.train.images, train_labels=images.train.labels)
    return path


@pytest.fixture(autouse=True)
def nothing_is_downloaded():
    with mock.patch.dict(data.SOURCES):
        for name in ("cifar10", "cifar100"):
            del data.SOURCES[name]
        yield


def from_python(count, file):
    """Return how often values of single settings are accepted and refused."""
    counts = collections.Counter()

    @hypothesis_settings(max_examples=count, **OPTIONS)
    @given(path=st.sampled_from(sorted(DEFAULTS)), value=VALUES)
    def check(path, value):
        config = around(path, file)
        try:
            changed(config, path, value)
        except (OverflowError, TypeError, ValueError):  # raised by ml_collections
            counts["impossible"] += 1
        else:
            counts[outcome(config, path, value)] += 1

    check()
    return counts


def test_any_value_from_python(file):
    counts = from_python(60, file)
    assert counts["accepted"] > 0 and counts["refused"] > 30


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("epochs", 10**400, "config.epochs must be finite"),
        ("batch_size", 2**31, "config.batch_size must fit into 32 bits, found 2147483648"),
        ("terms.wkd_l.decay_from", 2**31, "config.terms.wkd_l.decay_from must fit into 32 bits"),
        ("loss.kd", 1e39, "config.loss.kd must fit into 32 bits, found 1e+39"),
        (
            "data.mean",
            (0.5, -1e39),
            "config.data.mean must be in [0, 1], like the pixels, found",
        ),
        ("teacher.workdir", "a" * 256, "config.teacher.workdir must be shorter, because no file"),
        ("model.pretrained", "x/" + "é" * 128, "config.model.pretrained must be shorter"),
        ("name", "a\0b", "config.name must be text without null and surrogate characters"),
        ("trainable", ("student", "\ud800"), "config.trainable must be text without null and"),
    ],
)
def test_what_no_setting_can_be(path, value, words, file):
    config = around(path, file)
    changed(config, path, value)
    with pytest.raises(UserError) as error:
        train._checked(config, None)
    assert words in str(error.value)


# The command line

CONFIG_FILE = """
import sys
sys.path.insert(0, {folder!r})
import faults_helpers
def get_config():
    return faults_helpers.CHOSEN[-1]
"""
ARGUMENTS = st.one_of(
    SCALARS.map(str),
    st.lists(SCALARS, max_size=3).map(tuple).map(str),
    st.sampled_from(["(", "()", "(1,", "[1]", "{}", "1,2", "'a'", "True", "no", "nan", "1e999"]),
).map(lambda text: text.encode("utf-8", "replace").decode().replace("\0", ""))


@contextlib.contextmanager
def parsed(*arguments):
    """Parse the flags of `ipwd_jax.main` as a new process does, and forget them afterwards."""
    argv = ["main", *arguments]
    try:
        with mock.patch.object(sys, "argv", argv):
            main._parse(argv)
            yield main._CONFIG.value
    finally:
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)


def from_the_command_line(count, config_file, file):
    counts = collections.Counter()

    @hypothesis_settings(max_examples=count, **OPTIONS)
    @given(path=st.sampled_from(sorted(DEFAULTS)), text=ARGUMENTS)
    def check(path, text):
        errors = io.StringIO()
        helpers.CHOSEN.append(around(path, file))
        try:
            with contextlib.redirect_stderr(errors), signals.exit_statuses():
                argument = f"--config.{path}={text}"
                with parsed(f"--config={config_file}", argument) as config:
                    train._checked(config, None)
            counts["accepted"] += 1
        except SystemExit as left:
            message, name = errors.getvalue(), path.rpartition(".")[2]
            assert left.code == 2 and "error: " in message and "Traceback" not in message
            assert name in message or text in message or repr(text) in message, message
            counts["refused"] += 1

    check()
    return counts


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "mine.py"
    path.write_text(CONFIG_FILE.format(folder=str(Path(helpers.__file__).parent)))
    return path


def test_any_value_on_the_command_line(config_file, file):
    counts = from_the_command_line(40, config_file, file)
    assert counts["accepted"] > 0 and counts["refused"] > 15


def test_a_section_on_the_command_line_is_named(config_file, file):
    helpers.CHOSEN.append(around("", file))
    words = r"flag --config\.checkpoint=/: Failed to parse '/' as a ConfigDict"
    with (
        pytest.raises(UserError, match=words),
        parsed(f"--config={config_file}", "--config.checkpoint=/"),
    ):
        pass


@pytest.mark.slow
def test_six_thousand_inputs(config_file, file, capsys):
    """With the files of `test_bad_input.py`, ten thousand."""
    counts = {
        "from Python": from_python(4000, file),
        "on the command line": from_the_command_line(2000, config_file, file),
    }
    with capsys.disabled():
        for name, found in counts.items():
            print(f"\nsettings {name}: {found['accepted']} accepted, {found['refused']} refused")

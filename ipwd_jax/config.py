"""Every setting of a run with its default; `ipwd_jax.validate` says which values it may have.

A file in `configs/` starts from `default()` and changes what differs; the command line changes
single values (`--config.optimizer.learning_rate=0.1`).
"""

import difflib
import json
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ipwd_jax import losses, writers
from ipwd_jax.errors import UserError

SCHEDULES = ("step", "cosine")
# Settings of `config.data` that do not apply to a teacher that is trained for a student.
STUDENTS_ALONE = ("rand_augment", "rand_magnitude", "mixup", "cutmix")
# all: every view of every image, which serves other runs too; drawn: those that the run draws;
# auto: the first of the two that saves a tenth of the answers of this run, or none.
VIEW_CACHES = ("auto", "off", "all", "drawn")


def default() -> ConfigDict:
    """A run that trains resnet8x4 on CIFAR-100 with labels alone; all else is switched off.

    Examples:
        >>> config = ipwd_jax.default_config()
        >>> config.model.name, config.loss.ce, config.loss.kd
        ('resnet8x4', 1.0, 0.0)
    """
    config = ConfigDict()
    config.name = ""  # label of the run; the default work directory is runs/NAME_seedSEED
    config.seeds = ()  # train several runs in one program, each as if alone: NAME_seed0...
    config.share_order = False  # whether all of `seeds` see the images of the first, in its order,
    # and ask the teacher once for all of them; what the terms draw is the same for them, too
    config.seed = 0  # of initialisation, order of the samples, crops and flips

    config.data = _data()
    config.model = ConfigDict({"name": "resnet8x4"})  # the student; see ipwd_jax.models
    config.model.pretrained = ""  # folder of a run, or PyTorch file, whose weights it starts with;
    # if the data has another number of classes, the classifier starts afresh
    config.model.classifier_bias = True  # False: no bias, and a kernel as CAT-KD's authors draw it
    # Normalise by the global batch. False: by each device's rows, but neither in modules of loss
    # terms nor while a teacher is trained.
    config.sync_batch_norm = True

    config.teacher = _teacher()
    config.deterministic = False  # same bits in every run on a GPU too, which costs speed
    config.precision = "float32"  # of convolutions; see ipwd_jax.precision
    config.steps_per_call = 0  # steps of one compiled call; 0: 1 on a CPU, else log_every_steps
    config.epochs = 240
    config.patience = 0  # stop after so many epochs without a new best one; 0: train all epochs.
    # This is decided after epochs that are evaluated.
    config.batch_size = 64  # images of a step over all devices
    config.optimizer = _optimizer()
    config.trainable = ()  # prefixes such as "student/fc" or "student/features" (all but the
    # classifier and what else is behind the last map) of what is trained; empty: everything

    config.loss = ConfigDict({name: 0.0 for name in losses.TERMS})  # weight of each term; 0: off
    config.loss.ce = 1.0
    config.terms = ConfigDict({name: losses.hyper_parameters(name) for name in losses.TERMS})

    config.weighting = _weighting()
    config.first_stage = ConfigDict()  # a stage before the main one, with a fresh optimiser after
    config.first_stage.epochs = 0  # 0: none
    config.first_stage.loss = ConfigDict({name: 0.0 for name in losses.TERMS})
    config.first_stage.optimizer = _optimizer()
    config.first_stage.trainable = ()

    config.eval_every_epochs = 1  # evaluate on the test set; always after the last epoch
    config.eval_batch_size = 500
    config.log_every_steps = 50  # progress line and check for non-finite losses
    config.checkpoint = ConfigDict()
    config.checkpoint.every_seconds = 60.0  # a run that is killed loses at most this much work
    config.checkpoint.keep = 2  # newest checkpoints kept; each also holds the best epoch
    return config


def _data() -> ConfigDict:
    """Where the images come from, and how they are augmented."""
    config = ConfigDict()
    config.name = "cifar100"  # see ipwd_jax.data.SOURCES, or tfds:NAME, folder:PATH, numpy:PATH
    config.dir = ""  # archives or prepared TFDS data; empty: the source's usual place
    config.download = False  # fetch a missing CIFAR archive (checksum verified)
    config.train_split = ""  # empty: "train"
    config.test_split = ""  # empty: "test" or "validation", whichever there is
    config.test_fraction = 0.2  # held out of data that comes without a test split
    config.validation_fraction = 0.0  # share of each class of the training set that is held out, so
    # that the best epoch is chosen on these images; 0: on the test set, as most papers do
    config.long_tail = 0.0  # size of the first class over that of the last, to which the training
    # set is thinned out exponentially; 0: all images
    config.image_size = 0  # pixels a side after resizing; 0: as stored
    config.streaming = False  # decode while training; for what does not fit into memory
    config.threads = 0  # of decoding; 0: all CPUs
    config.mean = ()  # per channel, pixels in 0..1; empty: known or computed
    config.std = ()
    config.crop_padding = 4  # black pixels on each side before a random crop; 0: no crop.
    # Streamed images have random resized crops instead, and need 0.
    config.flip = True  # random horizontal flip
    # Of the student alone; a teacher that is trained for it sees plain crops and flips.
    config.rand_augment = 0  # random distortions of each image (RandAugment); 0: none
    config.rand_magnitude = 9  # their strength, in 0..30
    config.mixup = 0.0  # alpha of MixUp; the teacher answers for the mixed image; 0: off
    config.cutmix = 0.0  # alpha of CutMix; if both are on, each image has one of them; 0: off
    return config


def _teacher() -> ConfigDict:
    """The teacher, how it is asked, and how it is trained if it has to be."""
    config = ConfigDict()
    config.name = ""  # network of the teacher; empty: no teacher
    config.workdir = ""  # its run; empty: DATA_NETWORK_CHECKSUM_seedSEED beside the student's
    config.pretrained = ""  # a trained teacher: its name (python -m ipwd_jax.teachers), or a file
    config.which = "last"  # epoch that teaches: "last" or "best"
    config.train_mode = False  # normalise by the batch, as ReviewKD's and WSLD's scripts do
    config.view_cache = "auto"  # its answers to all views: one of VIEW_CACHES
    config.look_ahead = 0  # steps whose images it sees at once, where it is asked; 0: one
    config.fold = False  # fold BatchNorm into the convolutions: the same up to rounding
    config.seed = 0  # its own, so that all seeds of a student share one teacher
    config.epochs = 240  # this and what follows: how a missing teacher is trained
    config.batch_size = 64
    config.label_smoothing = 0.0
    config.optimizer = _optimizer()
    return config


def _weighting() -> ConfigDict:
    """The weights of the samples."""
    config = ConfigDict()
    config.name = "uniform"  # one of ipwd_jax.losses.WEIGHTINGS
    config.terms = ("kd",)  # per-sample terms that are multiplied
    config.start_epoch = 0  # weights are 1 before this epoch
    config.clip = 0.0  # largest weight before batch_normalize; 0: none
    config.batch_normalize = False  # divide by the mean weight of the global batch
    config.average = 0.0  # decay of a running mean per sample over epochs; 0: none
    # The fields of all weightings, which ipwd_jax.losses.weighting explains.
    config.update(losses.weighting.settings())
    return config


def _optimizer() -> ConfigDict:
    """PyTorch's SGD with the CIFAR recipe of Tian et al., 2020."""
    return ConfigDict(
        {
            "name": "sgd",  # one of ipwd_jax.optim.OPTIMIZERS
            "learning_rate": 0.05,
            "momentum": 0.9,  # of those that have one
            "nesterov": False,
            "b1": placeholder(float),  # of Adam and its like; None: optax's default
            "b2": placeholder(float),
            "eps": placeholder(float),
            "weight_decay": 5e-4,  # on every parameter, biases and BatchNorm included
            "schedule": "step",  # one of SCHEDULES
            "milestones": (150, 180, 210),  # epochs finished before the rate falls ("step")
            "decay": 0.1,  # factor at each milestone
        }
    )


def teacher_and_student(arg: str, teacher: str, student: str) -> list[str]:
    """The two networks that the argument of a config file names, or else those given here."""
    names = arg.split(",") if arg else [teacher, student]
    if len(names) != 2:
        raise UserError(f"this config takes TEACHER,STUDENT after the colon, found {arg!r}")
    return names


def cifar_learning_rate(network: str) -> float:
    """First learning rate on CIFAR by Tian et al., 2020: 0.05, or 0.01 for three light networks.

    These are MobileNetV2, ShuffleV1 and ShuffleV2, of any width (`ShuffleV2_0.5`).
    """
    family = network.partition("_")[0]
    return 0.01 if family in ("MobileNetV2", "ShuffleV1", "ShuffleV2") else 0.05


def teacher_config(config: ConfigDict) -> ConfigDict:
    """The run that trains `config.teacher`: labels only, on the same data.

    What it computes depends on `config.data` and `config.teacher` alone, so that every student of a
    teacher finds the same one.
    """
    teacher = default()
    plain = {key: teacher.data[key] for key in STUDENTS_ALONE}
    teacher.data = config.data.copy_and_resolve_references()
    teacher.data.update(plain)
    teacher.model.name = config.teacher.name
    smoothing = config.teacher.label_smoothing
    teacher.name = config.teacher.name + (f"_smoothing{smoothing:g}" if smoothing else "")
    for key in ("seed", "epochs", "batch_size", "optimizer"):
        teacher[key] = config.teacher[key]
    teacher.terms.ce.label_smoothing = config.teacher.label_smoothing
    for key in ("eval_batch_size", "log_every_steps"):
        teacher[key] = config[key]
    teacher.checkpoint = config.checkpoint
    return teacher


def stages(config: ConfigDict) -> list[ConfigDict]:
    """The stages of a run in order: `name`, `epochs`, `loss`, `optimizer`, `trainable` of each.

    `pretrains` says whether it is a first stage, which trains what terms prepare for the main one.
    `weighted` says whether `config.weighting` multiplies its terms: those of the main one alone, so
    that a first stage is the same whatever the weighting.
    """
    keys = ("epochs", "loss", "optimizer", "trainable")
    main = ConfigDict({"name": "main", **{key: config[key] for key in keys}})
    first = ConfigDict({"name": "first", **{key: config.first_stage[key] for key in keys}})
    weighting = losses.weighting.create(config.weighting)
    main.update({"pretrains": False, "weighted": weighting.weighs})
    first.update({"pretrains": True, "weighted": False})
    return [first, main] if first.epochs else [main]


def plain(config: ConfigDict) -> dict[str, Any]:
    """Return a config as it is when read back from JSON: with lists and Python's own numbers."""
    return writers.plain(config.to_dict())


def filled(config: dict, defaults: dict | None = None) -> dict:
    """Return the `config.json` of an older version with the defaults of settings added since."""
    defaults = json.loads(default().to_json()) if defaults is None else defaults
    missing = {key: value for key, value in defaults.items() if key not in config}
    return missing | {
        key: filled(value, defaults.get(key, {})) if isinstance(value, dict) else value
        for key, value in config.items()
    }


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Lines `key: old value there, new value here` for the values in which two configs differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key, "nothing"), new.get(key, "nothing")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} there, {b!r} here")
    return lines


def flat(config: ConfigDict) -> dict[str, Any]:
    """Path ("optimizer.momentum") -> value of every setting of `config`, and of every section."""
    paths = {}
    for key, value in config.items():
        paths[key] = value
        if isinstance(value, ConfigDict):
            paths |= {f"{key}.{path}": inner for path, inner in flat(value).items()}
    return paths


def unknown_key(path: str, config: ConfigDict) -> UserError:
    """The error for a `path` that is not a setting of `config`, with the nearest that is."""
    known = sorted(flat(config), key=len)
    parent, _, name = path.rpartition(".")
    section = [k for k in known if k.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(name, [_name(k) for k in section], n=1)
    if near:
        hint = f" Did you mean config.{parent}{'.' if parent else ''}{near[0]}?"
    elif parent and section:
        hint = f" config.{parent} has: {', '.join(sorted(map(_name, section)))}."
    elif parent in known:
        of_term = "; a field of a loss term needs an annotation" * parent.startswith("terms.")
        hint = f" config.{parent} has no settings{of_term}."
    else:
        names = difflib.get_close_matches(name, [_name(k) for k in known], n=1)
        found = [k for k in known if _name(k) in names]
        hint = f" Did you mean config.{found[0]}?" if found else ""
    return UserError(f"unknown setting config.{path}.{hint}")


def _name(path: str) -> str:
    return path.rpartition(".")[2]

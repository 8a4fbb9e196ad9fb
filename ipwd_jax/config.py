"""Every setting of a run with its default, and the checks that need no data.

A file in `configs/` starts from `default()` and changes what differs; the command line changes
single values (`--config.optimizer.learning_rate=0.1`).
"""

import difflib

from ml_collections import ConfigDict

from ipwd_jax import losses, models
from ipwd_jax.errors import UserError, unknown_name
from ipwd_jax.precision import PRECISIONS

WEIGHTINGS = ("uniform", "constant", "wsld", "ipwd")
SCHEDULES = ("step", "cosine")
# all: every view of every image; drawn: those that the run draws; auto: the smaller of them.
VIEW_CACHES = ("auto", "off", "all", "drawn")
HEAD_SOURCES = ("backbone", "detached", "network")


def default() -> ConfigDict:
    """A run that trains resnet8x4 on CIFAR-100 with labels alone; all else is switched off."""
    config = ConfigDict()
    config.name = ""  # label of the run; the default work directory is runs/NAME_seedSEED
    config.seeds = ()  # several runs in one program, each as if alone, NAME_seed0, NAME_seed1...
    config.share_order = False  # with seeds: all see the first one's order, crops and flips
    config.seed = 0  # of initialisation, order of the samples, crops and flips

    config.data = ConfigDict()
    config.data.name = (
        "cifar100"  # see ipwd_jax.data.SOURCES, or tfds:NAME, folder:PATH, numpy:PATH
    )
    config.data.dir = ""  # archives or prepared TFDS data; empty: the source's usual place
    config.data.download = False  # fetch a missing CIFAR archive (checksum verified)
    config.data.train_split = ""  # empty: "train"
    config.data.test_split = ""  # empty: "test", or "validation" where there is no test split
    config.data.test_fraction = 0.2  # held out of data that comes without a test split
    config.data.image_size = 0  # pixels a side after resizing; 0: as stored
    config.data.streaming = False  # decode while training; for what does not fit into memory
    config.data.threads = 0  # of decoding; 0: all CPUs
    config.data.mean = ()  # per channel, pixels in 0..1; empty: known or computed
    config.data.std = ()
    config.data.crop_padding = 4  # black pixels on each side before a random crop; 0: no crop
    config.data.flip = True  # random horizontal flip

    config.model = ConfigDict({"name": "resnet8x4"})  # the student; see ipwd_jax.models
    config.sync_batch_norm = True  # statistics of the global batch; False: of each device's rows

    config.teacher = ConfigDict()
    config.teacher.name = ""  # network of the teacher; empty: no teacher
    config.teacher.workdir = ""  # run that trained it; empty: runs/DATA_NAME_seedSEED beside ours
    config.teacher.which = "last"  # epoch that teaches: "last" or "best"
    config.teacher.train_mode = False  # normalise by the batch, as ReviewKD's and WSLD's scripts do
    config.teacher.view_cache = "auto"  # its answers to all views: one of VIEW_CACHES
    config.teacher.look_ahead = 0  # steps whose images it sees at once, where it is asked; 0: one
    config.teacher.fold = False  # fold BatchNorm into the convolutions: the same up to rounding
    config.teacher.seed = 0  # its own, so that all seeds of a student share one teacher
    config.teacher.epochs = 240  # these settings count when the teacher is missing
    config.teacher.batch_size = 64
    config.teacher.label_smoothing = 0.0
    config.teacher.optimizer = _optimizer()

    config.precision = "float32"  # of convolutions; see ipwd_jax.precision
    config.steps_per_call = 0  # steps of one compiled call; 0: 1 on a CPU, else log_every_steps
    config.epochs = 240
    config.batch_size = 64  # images of a step over all devices
    config.optimizer = _optimizer()
    config.trainable = ()  # prefixes such as "student/fc" or "student/features" (all but the
    # classifier and what else is behind the last map) of what is trained; empty: everything

    config.loss = ConfigDict({name: 0.0 for name in losses.TERMS})  # weight of each term; 0: off
    config.loss.ce = 1.0
    config.terms = ConfigDict({name: losses.hyper_parameters(name) for name in losses.TERMS})

    config.weighting = ConfigDict()
    config.weighting.name = "uniform"  # one of WEIGHTINGS
    config.weighting.terms = ("kd",)  # per-sample terms that are multiplied
    config.weighting.start_epoch = 0  # weights are 1 before this epoch
    config.weighting.constant = 1.0  # the weight of "constant"
    config.weighting.kd_source = "student"  # of "ipwd": whose logits H_kd is of; or "head"
    config.weighting.ratio = "A"  # of "ipwd": A is 1 + H_kd / H_cls, B is 1 + H_cls / H_kd
    config.weighting.standardize = True  # of "ipwd": z-score the logits of both heads first
    config.weighting.clip = 0.0  # largest weight; 0: none
    config.weighting.batch_normalize = False  # divide by the mean weight of the global batch
    config.weighting.average = 0.0  # decay of a running mean per sample over epochs; 0: none

    config.first_stage = ConfigDict()  # a stage before the main one, with a fresh optimiser after
    config.first_stage.epochs = 0  # 0: none
    config.first_stage.loss = ConfigDict({name: 0.0 for name in losses.TERMS})
    config.first_stage.optimizer = _optimizer()
    config.first_stage.trainable = ()

    config.eval_every_epochs = 1  # test-set evaluation; the last epoch always has one
    config.eval_batch_size = 500
    config.log_every_steps = 50  # progress line and check for non-finite losses
    config.checkpoint = ConfigDict()
    config.checkpoint.every_seconds = 60.0  # at most this much work is lost to a kill
    config.checkpoint.keep = 2  # newest checkpoints kept; each also holds the best epoch
    return config


def _optimizer() -> ConfigDict:
    """PyTorch's SGD with the CIFAR recipe of Tian et al., 2020."""
    return ConfigDict(
        {
            "learning_rate": 0.05,
            "momentum": 0.9,
            "nesterov": False,
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
    """First learning rate on CIFAR by Tian et al., 2020: 0.05, or 0.01 for three light networks."""
    return 0.01 if network in ("MobileNetV2", "ShuffleV1", "ShuffleV2") else 0.05


def teacher_config(config: ConfigDict) -> ConfigDict:
    """The run that trains `config.teacher`: labels only, on the same data.

    A function of `config.data` and `config.teacher` alone, so that every student of a teacher
    finds the same one.
    """
    teacher = default()
    teacher.data = config.data
    teacher.model.name = config.teacher.name
    data_name = config.data.name.rpartition("/")[2].replace(":", "_")  # without a path
    smoothing = config.teacher.label_smoothing
    suffix = f"_smoothing{smoothing:g}" if smoothing else ""
    teacher.name = f"{data_name}_{config.teacher.name}{suffix}"
    for key in ("seed", "epochs", "batch_size", "optimizer"):
        teacher[key] = config.teacher[key]
    teacher.terms.ce.label_smoothing = config.teacher.label_smoothing
    for key in ("sync_batch_norm", "eval_every_epochs", "eval_batch_size", "log_every_steps"):
        teacher[key] = config[key]
    teacher.checkpoint = config.checkpoint
    return teacher


def stages(config: ConfigDict) -> list[ConfigDict]:
    """The stages of a run in order: `name`, `epochs`, `loss`, `optimizer`, `trainable` of each."""
    keys = ("epochs", "loss", "optimizer", "trainable")
    main = ConfigDict({"name": "main", **{key: config[key] for key in keys}})
    first = ConfigDict({"name": "first", **{key: config.first_stage[key] for key in keys}})
    return [first, main] if first.epochs else [main]


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


def has_key(config: ConfigDict, path: str) -> bool:
    """Whether `path` ("optimizer.momentum") is a setting of `config`."""
    return path in set(_flat(config))


def unknown_key(path: str, config: ConfigDict) -> UserError:
    """The error for a `path` that is not a setting of `config`, with the nearest that is."""
    known = sorted(_flat(config), key=len)
    parent, _, name = path.rpartition(".")
    section = [k for k in known if k.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(name, [_name(k) for k in section], n=1)
    if near:
        hint = f" Did you mean config.{parent}{'.' if parent else ''}{near[0]}?"
    elif parent and section:
        hint = f" config.{parent} has: {', '.join(sorted(map(_name, section)))}."
    else:
        names = difflib.get_close_matches(name, [_name(k) for k in known], n=1)
        found = [k for k in known if _name(k) in names]
        hint = f" Did you mean config.{found[0]}?" if found else ""
    return UserError(f"unknown setting config.{path}.{hint}")


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _flat(config: ConfigDict, prefix: str = ""):
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ConfigDict):
            yield from _flat(value, f"{prefix}{key}.")


def validate(config: ConfigDict) -> None:
    """Raises `UserError` for everything about a config that is wrong whatever the data is."""
    reference = default()
    known = set(_flat(reference))
    for path in _flat(config):
        if path not in known and path.rpartition(".")[0] in known | {""}:
            parent, _, name = path.rpartition(".")
            if parent in ("loss", "first_stage.loss", "terms"):
                raise unknown_name("loss term", name, losses.TERMS)
            raise unknown_key(path, reference)
    for path in known - set(_flat(config)):
        if path.partition(".")[0] not in ("loss", "terms", "first_stage"):
            raise UserError(f"config.{path} is missing; start from ipwd_jax.config.default()")

    models.create(config.model.name, classes=1)
    if config.teacher.name:
        models.create(config.teacher.name, classes=1)
    _positive(config, "epochs", "batch_size", "eval_every_epochs", "eval_batch_size")
    _positive(config, "log_every_steps", "checkpoint.keep")
    _positive(config.teacher, "epochs", "batch_size", prefix="teacher.")
    _not_negative(config, "data.threads")
    _not_negative(config, "seed", "teacher.seed", "data.crop_padding", "data.image_size")
    _not_negative(config, "first_stage.epochs", "checkpoint.every_seconds", "weighting.clip")
    _not_negative(config, "weighting.start_epoch", "weighting.constant")
    if config.teacher.view_cache not in VIEW_CACHES:
        raise unknown_name("config.teacher.view_cache", config.teacher.view_cache, VIEW_CACHES)
    if len(set(config.seeds)) != len(config.seeds):
        raise UserError(f"config.seeds has a seed twice: {tuple(config.seeds)}")
    if config.share_order and len(config.seeds) < 2:
        raise UserError("config.share_order needs several config.seeds")
    if config.precision not in PRECISIONS:
        raise unknown_name("config.precision", config.precision, PRECISIONS)
    _not_negative(config, "steps_per_call", "teacher.look_ahead")
    if config.teacher.train_mode and (config.teacher.fold or config.teacher.look_ahead):
        raise UserError(
            "config.teacher.train_mode excludes fold and look_ahead, which need answers that do "
            "not depend on the batch; leave it out"
        )
    source = config.terms.cls.source
    if source not in HEAD_SOURCES:
        raise unknown_name("config.terms.cls.source", source, HEAD_SOURCES)
    if config.terms.kd_head.source not in HEAD_SOURCES[:2]:
        source = config.terms.kd_head.source
        raise unknown_name("config.terms.kd_head.source", source, HEAD_SOURCES[:2])
    if config.teacher.which not in ("last", "best"):
        raise unknown_name("config.teacher.which", config.teacher.which, ("last", "best"))
    for prefix in ("", "teacher.", "first_stage."):
        _validate_optimizer(f"{prefix}optimizer", _get(config, f"{prefix}optimizer"))
    for stage in stages(config):
        _validate_loss(config, stage)
    _validate_weighting(config)


def _get(config: ConfigDict, path: str):
    for key in path.split("."):
        config = config[key]
    return config


def _positive(config: ConfigDict, *paths: str, prefix: str = "") -> None:
    for path in paths:
        if _get(config, path) < 1:
            raise UserError(f"config.{prefix}{path} must be at least 1, found {_get(config, path)}")


def _not_negative(config: ConfigDict, *paths: str) -> None:
    for path in paths:
        if _get(config, path) < 0:
            raise UserError(f"config.{path} must not be negative, found {_get(config, path)}")


def _validate_optimizer(path: str, optimizer: ConfigDict) -> None:
    if optimizer.schedule not in SCHEDULES:
        raise unknown_name("learning-rate schedule", optimizer.schedule, SCHEDULES)
    if optimizer.learning_rate <= 0:
        raise UserError(
            f"config.{path}.learning_rate must be positive, found {optimizer.learning_rate}"
        )
    if not 0 <= optimizer.momentum < 1:
        raise UserError(f"config.{path}.momentum must be in [0, 1), found {optimizer.momentum}")
    if list(optimizer.milestones) != sorted(set(optimizer.milestones)):
        raise UserError(f"config.{path}.milestones must rise, found {tuple(optimizer.milestones)}")


def _validate_loss(config: ConfigDict, stage: ConfigDict) -> None:
    where = "config.loss" if stage.name == "main" else "config.first_stage.loss"
    active = [name for name, weight in stage.loss.items() if weight]
    if not active:
        raise UserError(f"{where} has no term with a weight; set for example --{where}.ce=1")
    for name in active:
        if losses.TERMS[name].teacher_taps and not config.teacher.name:
            raise UserError(
                f"{where}.{name} needs a teacher; set --config.teacher.name to a network"
            )


def _validate_weighting(config: ConfigDict) -> None:
    weighting = config.weighting
    if weighting.name not in WEIGHTINGS:
        raise unknown_name("weighting", weighting.name, WEIGHTINGS)
    if weighting.ratio not in ("A", "B"):
        raise unknown_name("config.weighting.ratio", weighting.ratio, ("A", "B"))
    if not 0 <= weighting.average < 1:
        raise UserError(f"config.weighting.average must be in [0, 1), found {weighting.average}")
    if weighting.kd_source not in ("student", "head"):
        raise unknown_name("config.weighting.kd_source", weighting.kd_source, ("student", "head"))
    for name in weighting.terms:
        if name not in losses.TERMS:
            raise unknown_name("loss term in config.weighting.terms", name, losses.TERMS)
        if not losses.TERMS[name].per_sample and weighting.name != "uniform":
            raise UserError(
                f"config.weighting.terms names {name}, which compares samples with each other and "
                "has no loss of a single sample to weigh; name others, or set "
                "--config.weighting.name=uniform"
            )
    if weighting.name == "uniform":
        return
    if not any(config.loss.get(name, 0) for name in weighting.terms):
        raise UserError(
            f"config.weighting.name={weighting.name} weighs {tuple(weighting.terms)}, none of "
            "which has a weight in config.loss; name the terms with --config.weighting.terms"
        )
    if weighting.name == "ipwd" and not config.loss.get("cls", 0):
        raise UserError(
            "config.weighting.name=ipwd compares with the label-only head, which nothing trains; "
            "set --config.loss.cls=1"
        )
    if (
        weighting.name == "ipwd"
        and weighting.kd_source == "head"
        and not config.loss.get("kd_head", 0)
    ):
        raise UserError(
            "config.weighting.kd_source=head compares the distilled head, which nothing trains; "
            "set for example --config.loss.kd_head=0.9"
        )
    if weighting.name == "wsld" and not config.teacher.name:
        raise UserError("config.weighting.name=wsld needs a teacher; set --config.teacher.name")

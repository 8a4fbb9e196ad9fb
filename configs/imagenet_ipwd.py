"""IPWD and its baselines on ImageNet, with the settings of WSLD, which the paper follows.

    python -m ipwd_jax.main --config=configs/imagenet_ipwd.py --config.data.dir=/data/tfds
    python -m ipwd_jax.main \
        --config=configs/imagenet_ipwd.py:kd,ResNet34_imagenet,ResNet18_imagenet \
        --config.data.name=folder:/data/imagenet --config.teacher.workdir=runs/resnet34

A run has 100 epochs, batches of 256 images, and SGD with Nesterov momentum, a weight decay of 1e-4
and a learning rate of 0.1 that is divided by ten after epochs 30, 60 and 90. The loss is CE + 2.5
T^2 soft cross-entropy at temperature T = 2 (Zhou et al., 2021). Their script also has a 101st epoch
and a teacher that normalises by the statistics of the batch. The 72.65 % of the paper is for
ResNet-50 -> MobileNetV1. Threads of the host decode, crop and mirror the images while the device
computes. The teachers are torchvision's, with weights of version 1:
`python -m ipwd_jax.convert import resnet50-0676ba61.pth`.

`at`, `crd`, `dkd` and `reviewkd` have the settings of mdistiller: no Nesterov momentum, and for AT
and DKD batches of 512 images and a learning rate of 0.2. There are two differences: CRD's negatives
are drawn without replacement, and ReviewKD fuses MobileNetV1's maps in 256 channels, as in
mdistiller's config file and the authors' code, whereas mdistiller's program uses 512.
"""

from ipwd_jax.config import default
from ipwd_jax.errors import UserError, unknown_name

LOSSES = {
    "ce": {"ce": 1.0},
    "kd": {"ce": 1.0, "kd": 2.5},
    "wsld": {"ce": 1.0, "kd": 2.5},
    "ipwd": {"ce": 1.0, "kd": 2.5, "cls": 1.0},
    "at": {"ce": 1.0, "at": 1000.0},
    "crd": {"ce": 1.0, "crd": 0.8},
    "dkd": {"ce": 1.0, "dkd": 1.0},
    "reviewkd": {"ce": 1.0, "reviewkd": 1.0},
}
# Batch size and initial learning rate in mdistiller, whose SGD has no Nesterov momentum.
MDISTILLER = {"at": (512, 0.2), "dkd": (512, 0.2), "crd": (256, 0.1), "reviewkd": (256, 0.1)}


def get_config(arg: str = "ipwd,ResNet50_imagenet,MobileNetV1"):
    """Run a method on a pair of networks.

    Args:
        arg: `METHOD,TEACHER,STUDENT`.
    """
    parts = arg.split(",")
    if len(parts) != 3:
        raise UserError(
            f"this config takes METHOD,TEACHER,STUDENT after the colon, found {arg!r}; methods: "
            + ", ".join(LOSSES)
        )
    method, teacher, student = parts
    if method not in LOSSES:
        raise unknown_name("method", method, LOSSES)
    config = default()
    config.name = f"imagenet_{method}_{teacher}_{student}"
    config.data.update({"name": "tfds:imagenet2012", "streaming": True, "image_size": 224})
    config.data.crop_padding = 0  # streamed images get random resized crops
    config.model.name = student
    config.teacher.name = "" if method == "ce" else teacher
    config.epochs = config.teacher.epochs = 100
    config.batch_size = config.teacher.batch_size = 256
    for optimizer in (config.optimizer, config.teacher.optimizer):
        optimizer.update(
            {
                "learning_rate": 0.1,
                "nesterov": True,
                "weight_decay": 1e-4,
                "milestones": (30, 60, 90),
            }
        )
    if method in MDISTILLER:
        config.batch_size, config.optimizer.learning_rate = MDISTILLER[method]
        config.optimizer.nesterov = False
    config.loss.update(LOSSES[method])
    if config.loss.kd:
        config.terms.kd.update({"temperature": 2.0, "cross_entropy": True})
    if method in ("wsld", "ipwd"):
        config.weighting.name = method
    if method == "dkd":
        beta = 0.5 if student.startswith("ResNet18") else 2.0
        config.terms.dkd.update({"temperature": 1.0, "warmup": 1, "beta": beta})
    if method == "reviewkd":
        light = student == "MobileNetV1"
        config.loss.reviewkd = 8.0 if light else 1.0
        config.terms.reviewkd.update(
            {"warmup": 1, "student_preact": True, "mid_channels": 256 if light else 512}
        )
    return config

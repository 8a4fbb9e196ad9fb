"""One-stage self-distillation on CIFAR-100: the teacher is the network itself.

    python -m ipwd_jax.main --config=configs/cifar_self.py:pskd_ipwd,PreActResNet18
    python -m ipwd_jax.main --config=configs/cifar_self.py:label_smoothing,DenseNet121

A run has 300 epochs, batches of 128 images, and SGD with Nesterov momentum and a learning rate of
0.1 that is divided by ten after epochs 150 and 225, as in PS-KD (Kim et al., 2021), which reports
an error of 20.82 % for PreAct ResNet-18, and of 24.18 % without distillation. IPWD's weights start
late, as its paper recommends. The paper does not give the epoch; here they start when the learning
rate first falls.

USKD (Yang et al., 2023) has its authors' loss weights for CIFAR-100 and the recipe of PS-KD, so
that the two can be compared. Its authors train for 200 epochs with other milestones and do not
report these networks.
"""

from ipwd_jax.config import default
from ipwd_jax.errors import UserError, unknown_name

METHODS = ("ce", "label_smoothing", "pskd", "pskd_ipwd", "uskd")
NETWORKS = ("PreActResNet18", "ResNet101", "DenseNet121", "ResNeXt29_8x64d")


def get_config(arg: str = "pskd_ipwd,PreActResNet18"):
    """Run a method on one network.

    Args:
        arg: `METHOD,NETWORK`; the network need not be one of `NETWORKS`.
    """
    parts = arg.split(",")
    if len(parts) != 2:
        raise UserError(
            f"this config takes METHOD,NETWORK after the colon, found {arg!r}; methods: "
            + ", ".join(METHODS)
        )
    method, network = parts
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    config = default()
    config.name = f"cifar100_self_{method}_{network}"
    config.data.mean, config.data.std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    config.model.name = network
    config.epochs, config.batch_size = 300, 128
    config.optimizer.update({"learning_rate": 0.1, "nesterov": True, "milestones": (150, 225)})
    if method == "label_smoothing":
        config.terms.ce.label_smoothing = 0.1
    if method.startswith("pskd"):
        config.loss.update({"ce": 0.0, "pskd": 1.0})
    if method == "uskd":
        config.loss.uskd = 1.0
    if method == "pskd_ipwd":
        config.loss.cls = 1.0
        config.weighting.update({"name": "ipwd", "terms": ("pskd",), "start_epoch": 150})
    return config

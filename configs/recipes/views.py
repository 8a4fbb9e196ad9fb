"""Methods of configs/cifar_baselines.py that the paper does not compare with: of two views.

    python -m ipwd_jax.main --config=configs/cifar_baselines.py:mlkd,resnet32x4,resnet8x4
    python -m ipwd_jax.main --config=configs/cifar_baselines.py:crld_ipwd,wrn_40_2,wrn_16_2

Every step runs both networks twice, and the cross-entropy is the sum of both views'. MLKD has its
authors' epochs and learning rates, and mlkd_ls, which standardises the logits, those of Sun et al.,
2024; in all of these runs, the rate is divided by ten after epochs 150, 180 and 210. CRLD has the
epochs and learning rates of configs/cifar_baselines.py; its settings are those of the copy in the
code of DeepKD, because the authors' code is not available.
"""

# Weights of the loss terms.
LOSSES = {
    "mlkd": {"ce": 0.1, "mlkd": 0.9},
    "mlkd_ls": {"ce": 0.1, "mlkd": 9.0},
    "crld": {"ce": 1.0, "crld": 1.0},
}
# Terms that can be weighted, as TERM_ipwd and TERM_constant.
WEIGHED = ("crld",)

# The pairs for which the authors of MLKD do not train for 240 epochs.
MLKD_EPOCHS = {
    ("vgg13", "MobileNetV2"): 480,
    ("ResNet50", "MobileNetV2"): 480,
    ("wrn_40_2", "ShuffleV1"): 480,
    ("resnet32x4", "ShuffleV1"): 960,
    ("resnet32x4", "ShuffleV2"): 960,
}
# The pairs for which the weight with standardised logits is 6, from the names of the authors' logs.
MLKD_LS_SIX = (("vgg13", "vgg8"), ("vgg13", "MobileNetV2"), ("resnet32x4", "ShuffleV2"))


def _mlkd(config, pair):
    config.epochs = MLKD_EPOCHS.get(pair, 240)
    config.optimizer.learning_rate = min(config.optimizer.learning_rate, 0.025)


def _mlkd_ls(config, pair):
    _mlkd(config, pair)
    config.epochs = max(config.epochs, 480)
    if pair == ("vgg13", "vgg8"):
        config.optimizer.learning_rate = 0.01
    config.loss.mlkd = 6.0 if pair in MLKD_LS_SIX else 9.0
    config.terms.mlkd.update({"temperature": 2.0, "standardize": True})


SETTINGS = {"mlkd": _mlkd, "mlkd_ls": _mlkd_ls}

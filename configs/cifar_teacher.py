"""Train a CIFAR-100 teacher, which the other CIFAR configs find beside their own folders.

    python -m ipwd_jax.main --config=configs/cifar_teacher.py:resnet32x4 --config.data.download

The recipe is that of Tian et al., 2020, whose teachers reach these accuracies in the last epoch:
resnet32x4 79.42 %, resnet110 74.31 %, resnet56 72.34 % and wrn_40_2 75.61 %.
"""

from ipwd_jax.config import cifar_learning_rate, default, teacher_config


def get_config(arg: str = "resnet32x4"):
    """Train one network on labels only.

    Args:
        arg: the name of the network.
    """
    config = default()
    config.teacher.name = arg
    config.teacher.optimizer.learning_rate = cifar_learning_rate(arg)
    teacher = teacher_config(config)
    teacher.name = f"cifar100_{arg}"
    return teacher

"""IPWD on CIFAR-100 with the settings of the paper (those of Tian et al., 2020).

    python -m ipwd_jax.main --config=configs/cifar_ipwd.py --config.data.download
    python -m ipwd_jax.main --config=configs/cifar_ipwd.py:resnet110,resnet32 --config.seed=1

A run has 240 epochs, batches of 64 images, and SGD with a learning rate of 0.05 (0.01 for
MobileNetV2, ShuffleV1 and ShuffleV2) that is divided by ten after epochs 150, 180 and 210. The loss
is 0.1 CE + 0.9 KD at temperature 4, plus the CE of the label-only head. The paper reports 76.03 %
for resnet32x4 -> resnet8x4 and 73.91 % for resnet110 -> resnet32, but does not say whether these
numbers are of the last or the best epoch.
"""

from ipwd_jax.config import cifar_learning_rate, default, teacher_and_student


def get_config(arg: str = ""):
    """Distil resnet32x4 into resnet8x4.

    Args:
        arg: `TEACHER,STUDENT`, which replaces these two networks.
    """
    config = default()
    teacher, student = teacher_and_student(arg, "resnet32x4", "resnet8x4")
    config.name = f"cifar100_ipwd_{teacher}_{student}"
    config.model.name = student
    config.teacher.name = teacher
    config.optimizer.learning_rate = cifar_learning_rate(student)
    config.teacher.optimizer.learning_rate = cifar_learning_rate(teacher)
    config.loss.update({"ce": 0.1, "kd": 0.9, "cls": 1.0})
    config.weighting.name = "ipwd"
    return config

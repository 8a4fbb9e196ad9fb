"""IPWD on 1,797 real handwritten digits (8x8 pixels): a complete run in minutes on a CPU.

    python -m ipwd_jax.main --config=configs/digits_ipwd.py

Nothing is downloaded, because the images come with scikit-learn.
"""

from ipwd_jax.config import default, teacher_and_student


def get_config(arg: str = ""):
    """Train resnet20, then distil it into resnet8.

    Args:
        arg: `TEACHER,STUDENT`, which replaces resnet20 and resnet8.
    """
    config = default()
    teacher, student = teacher_and_student(arg, "resnet20", "resnet8")
    config.name = f"digits_ipwd_{teacher}_{student}"
    config.data.name = "digits"
    config.data.crop_padding = 1
    config.data.flip = False  # a mirrored digit is a different character
    config.model.name = student
    config.teacher.name = teacher
    config.epochs = config.teacher.epochs = 30
    for optimizer in (config.optimizer, config.teacher.optimizer):
        optimizer.milestones = (15, 22, 27)
    config.loss.update({"ce": 0.1, "kd": 0.9, "cls": 1.0})
    config.weighting.name = "ipwd"
    return config

"""List the trained teachers that come with the package: `python -m ipwd_jax.teachers`."""

import argparse

from ipwd_jax import signals, teachers


def main() -> None:
    """Print name, data and accuracy of each teacher."""
    print(f"{'name':<28}{'network':<14}{'data':<12}{'epochs':>7}{'top1 %':>8}")
    for name in teachers.names():
        found = teachers.about(name)
        last = found["last"]
        print(
            f"{name:<28}{found['network']:<14}{found['data']:<12}{last['epoch']:>7}"
            f"{last['top1']:>8.2f}"
        )


if __name__ == "__main__":
    with signals.exit_statuses(resumes=False):
        argparse.ArgumentParser(
            prog="python -m ipwd_jax.teachers", description=__doc__
        ).parse_args()
        main()

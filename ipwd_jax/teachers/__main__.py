"""List the trained teachers that come with the package: `python -m ipwd_jax.teachers`."""

from ipwd_jax import teachers


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
    main()

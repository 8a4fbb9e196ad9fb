"""Search the learning rate and the weight of KD on the digits with Optuna (`pip install optuna`).

    python examples/optuna_search.py

A quarter of the training images is held out to choose by, so the test images stay unseen. All
trials share one teacher. The same command goes on where it was stopped: finished trials are read.
"""

import pathlib

import optuna

import ipwd_jax
from ipwd_jax import data

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "digits_ipwd.py"


def search(out="runs/optuna", trials=20, networks="resnet20,resnet8", **changes):
    """Train one student per trial in the folder `out`; returns Optuna's study."""
    config = ipwd_jax.load_config(f"{CONFIG}:{networks}", **changes)
    train = data.load(config.data).train
    held_out = ipwd_jax.from_arrays(train.images, train.labels, name="search", test_fraction=0.25)

    def accuracy(trial):
        config.optimizer.learning_rate = trial.suggest_float("learning_rate", 0.005, 0.5, log=True)
        config.loss.kd = trial.suggest_float("kd", 0.1, 10.0, log=True)
        result = ipwd_jax.run(config, pathlib.Path(out) / f"trial{trial.number}", held_out)
        return result["last"]["top1"]

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(accuracy, trials)
    return study


if __name__ == "__main__":
    print(search().best_trial.params)

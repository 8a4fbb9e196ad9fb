"""Knowledge distillation in JAX: IPWD (NeurIPS 2022) and the baselines of its tables.

What a notebook needs; everything else is in the modules:

    import ipwd_jax

    config = ipwd_jax.load_config("configs/digits_ipwd.py", epochs=10)
    result = ipwd_jax.run(config, "runs/mine")
    student = ipwd_jax.load_student("runs/mine")
    student.predict(["three.png", "seven.png"]).names
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.4.0"

# Name -> module. They are imported when they are first used: JAX reads the compiler's flags once,
# and the command line sets some before that.
_EXPORTED = {
    "UserError": "errors",
    "create_model": "api",
    "default_config": "api",
    "evaluate_run": "train",
    "live_plot": "live",
    "from_arrays": "data",
    "load_config": "api",
    "load_run": "runs",
    "load_student": "runs",
    "networks": "api",
    "run": "train",
    "summary": "report",
    "terms": "api",
    "weightings": "api",
    "write_report": "report",
}

if TYPE_CHECKING:
    from ipwd_jax.api import create_model as create_model
    from ipwd_jax.api import default_config as default_config
    from ipwd_jax.api import load_config as load_config
    from ipwd_jax.api import networks as networks
    from ipwd_jax.api import terms as terms
    from ipwd_jax.api import weightings as weightings
    from ipwd_jax.data import from_arrays as from_arrays
    from ipwd_jax.errors import UserError as UserError
    from ipwd_jax.live import live_plot as live_plot
    from ipwd_jax.report import write_report as write_report
    from ipwd_jax.report.summary import summary as summary
    from ipwd_jax.runs import load_run as load_run
    from ipwd_jax.runs import load_student as load_student
    from ipwd_jax.train import evaluate_run as evaluate_run
    from ipwd_jax.train import run as run


def __getattr__(name: str) -> Any:
    if name not in _EXPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ipwd_jax.{_EXPORTED[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTED])

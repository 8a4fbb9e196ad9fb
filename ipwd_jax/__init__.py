"""Knowledge distillation in JAX: IPWD (NeurIPS 2022) and the baselines of its tables."""

__version__ = "0.4.0"

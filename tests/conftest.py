"""Strict arithmetic in every test: what would be promoted or broadcast silently is an error."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

"""Evaluation of a model's answers against people's: NumPy and SciPy only, no jax."""

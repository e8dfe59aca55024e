"""How near a model's answers come to people's: NumPy and SciPy only, never jax."""

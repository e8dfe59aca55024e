"""Training: pure step functions, the optimiser, checkpoints and what is logged."""

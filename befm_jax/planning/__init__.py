"""Plans of runs on hardware that is not here: see `befm_jax.plan`."""

"""Plans of runs on hardware that is not attached: see `befm_jax.plan`."""

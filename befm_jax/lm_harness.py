"""`python -m befm_jax.lm_harness`: a door to `befm_jax.serving.lm_harness`."""

from befm_jax.serving.lm_harness import main

if __name__ == "__main__":
    main()

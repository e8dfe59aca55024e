"""`python -m befm_jax.lm_harness`: runs `befm_jax.serving.lm_harness`."""

import sys

if __name__ == "__main__":
    try:
        from befm_jax.serving.lm_harness import main
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        sys.exit(f"error: {error}")
    main()

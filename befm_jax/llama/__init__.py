"""Llama in Flax: the architecture, its weights on disk and its tokenizer.

Knows nothing of adapters, data or training: every matrix product goes through `linear.dot`, and
every attention through the strategy that the caller passes in.
"""

from typing import Any

__all__ = ["load", "save"]


def __getattr__(name: str) -> Any:
    """`load` and `save` of `llama.hf`, imported on first use: a config alone needs no JAX."""
    if name in __all__:
        from befm_jax.llama import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

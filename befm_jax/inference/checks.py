"""Errors for a model that can't answer: of numbers that are not finite, of tokens it lacks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from befm_jax.errors import UserError


class NonFiniteError(UserError):
    """A model whose results are NaN or infinite; the message names the weights that are."""


def non_finite(weights: Any) -> NonFiniteError:
    """The error for results that are not finite, of a model with these weights.

    Weights are only looked through when results are not finite: reading results costs nothing.
    """
    finite = jax.jit(lambda array: jnp.all(jnp.isfinite(array)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not finite(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return NonFiniteError(
                f"the model's numbers are not finite: {name} holds NaN or infinities"
            )
    return NonFiniteError(
        "the model's numbers are not finite, though its weights are: they overflow in the dtype of "
        "activations; try float32"
    )


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raises UserError where a model of `vocab_size` tokens has no embedding for an id."""
    largest = int(ids.max())
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer has token id {largest}; the model has embeddings for ids below "
            f"{vocab_size} (vocab_size in config.json)"
        )

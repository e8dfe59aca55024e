"""Attention over token forests, and the softmax product that every strategy shares."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attend(
    query: Float[Array, "B T H h"],
    key: Float[Array, "B S K h"],
    value: Float[Array, "B S K h"],
    visible: Bool[Array, "B T S"],
) -> Float[Array, "B T H h"]:
    """Grouped-query attention; softmax in float32, result in the dtype of `query`.

    Query heads of a group are laid behind each other as rows of one product, so keys and values
    are never repeated.  Every query must see at least one key.
    """
    batch, queries, heads, width = query.shape
    groups = heads // key.shape[2]
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    grouped = query.reshape(batch, queries, -1, groups, width).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum(
        "bkgth,bskh->bkgts",
        grouped * width**-0.5,
        key,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scores = jnp.where(visible[:, None, None, :, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    mixed = jnp.einsum("bkgts,bskh->bkgth", weights, value, precision=precision)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, width)


def visible_in_forest(end: Int[Array, "B N"]) -> Bool[Array, "B N N"]:
    """Slot `i` sees slot `j` exactly when `j <= i <= end[j]`: itself and its ancestors."""
    slot = jnp.arange(end.shape[1], dtype=end.dtype)
    query, key = slot[None, :, None], slot[None, None, :]
    return (key <= query) & (query <= end[:, None, :])


class ForestAttention(flax.struct.PyTreeNode):
    """Attention within the rows of a forest; carries no state from call to call.

    An attention strategy is called in every layer as `strategy(query, key, value, state)`, with
    rotated queries and keys, and returns the mixed values and the layer's new state.
    """

    end: Int[Array, "B N"]

    def __call__(
        self,
        query: Float[Array, "B N H h"],
        key: Float[Array, "B N K h"],
        value: Float[Array, "B N K h"],
        state: Any = None,
    ) -> tuple[Float[Array, "B N H h"], Any]:
        """Mixed values, and `state` as it came."""
        return attend(query, key, value, visible_in_forest(self.end)), state

"""Attention from its definition: every pair of slots, masked.  What kernels are held against."""

import jax
import jax.numpy as jnp


def visible(end):
    """`[B, N, N]`: slot `i` sees slot `j` exactly when `j <= i <= end[j]`."""
    slot = jnp.arange(end.shape[1])
    query, key = slot[None, :, None], slot[None, None, :]
    return (key <= query) & (query <= end[:, None, :])


def plain_attention(query, key, value, end):
    """Keys and values repeated for every query head, softmax over all slots, float32."""
    groups = query.shape[2] // key.shape[2]
    query, key, value = (array.astype(jnp.float32) for array in (query, key, value))
    key, value = (jnp.repeat(array, groups, axis=2) for array in (key, value))
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bihd,bjhd->bhij", query, key, precision=highest)
    scores = jnp.where(visible(end)[:, None], scores / query.shape[-1] ** 0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bhij,bjhd->bihd", weights, value, precision=highest)

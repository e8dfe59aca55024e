"""Attention from its definition: every pair of slots, masked.  What kernels are held against."""

import jax
import jax.numpy as jnp


def plain_attention(query, key, value, end):
    """Mixed values, and the logarithm of each query's softmax sum `[B, H, N]`.

    Slot `i` sees slot `j` exactly when `j <= i <= end[j]`; keys and values are repeated for every
    query head.  In the dtype of what is given.
    """
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(array, groups, axis=2) for array in (key, value))
    slot = jnp.arange(query.shape[1])
    before = slot[None, None, :] <= slot[None, :, None]
    visible = before & (slot[None, :, None] <= end[:, None, :])
    scores = jnp.einsum("bihd,bjhd->bhij", query, key, precision="highest")
    scores = jnp.where(visible[:, None], scores * query.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum("bhij,bjhd->bihd", weights, value, precision="highest")
    return mixed, jax.nn.logsumexp(scores, axis=-1)

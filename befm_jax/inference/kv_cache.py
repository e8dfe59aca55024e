"""Keys and values kept between tokens: a prefix stored once, a suffix for every participant."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from befm_jax.llama.attention import forest_attention


class KeysValues(NamedTuple):
    """Rotated keys and values, `[(L,) B, S, K, h]` each."""

    keys: Float[Array, "B S K h"]
    values: Float[Array, "B S K h"]


class Cache(NamedTuple):
    """What a population remembers: the shared `prefix` (batch 1) and everyone's `suffix`."""

    prefix: KeysValues
    suffix: KeysValues


class Prefill(flax.struct.PyTreeNode):
    """Causal attention over one padded prompt; its state is the prompt's keys and values.

    Padding stands behind the prompt, where no real token sees it.
    """

    def __call__(
        self,
        query: Float[Array, "1 P H h"],
        key: Float[Array, "1 P K h"],
        value: Float[Array, "1 P K h"],
        state: Any = None,
    ) -> tuple[Float[Array, "1 P H h"], KeysValues]:
        """Mixed values, and what later tokens will look back on."""
        del state
        end = jnp.full(query.shape[:2], query.shape[1] - 1)
        return forest_attention(query, key, value, end), KeysValues(key, value)


class Decode(flax.struct.PyTreeNode):
    """One new token for each of `B` participants who share a prefix.

    The prefix's keys and values stand in memory once: all participants' queries meet them in one
    product, as if they were more queries of one row.  Each participant's own suffix follows, and
    one softmax runs over both.

    `prefix_length`: how much of the padded prefix is real.  `written`: how many suffix tokens
    were written before this one.
    """

    prefix_length: Int[Array, ""]
    written: Int[Array, ""]

    def __call__(
        self,
        query: Float[Array, "B 1 H h"],
        key: Float[Array, "B 1 K h"],
        value: Float[Array, "B 1 K h"],
        state: Cache,
    ) -> tuple[Float[Array, "B 1 H h"], KeysValues]:
        """Mixed values, and the suffix with this token written; the prefix stays where it is."""
        at = (0, self.written, 0, 0)
        suffix = KeysValues(
            jax.lax.dynamic_update_slice(state.suffix.keys, key, at),
            jax.lax.dynamic_update_slice(state.suffix.values, value, at),
        )
        participants, _, heads, width = query.shape
        groups = heads // key.shape[2]
        precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
        grouped = (query * width**-0.5).reshape(participants, -1, groups, width)

        def scores(layout: str, keys: Array) -> Array:
            return jnp.einsum(
                layout, grouped, keys, precision=precision, preferred_element_type=jnp.float32
            )

        on_prefix = scores("bkgh,skh->bkgs", state.prefix.keys[0])
        on_suffix = scores("bkgh,btkh->bkgt", suffix.keys)
        prefix_slots, suffix_slots = on_prefix.shape[-1], on_suffix.shape[-1]
        real = jnp.concatenate(
            [
                jnp.arange(prefix_slots) < self.prefix_length,
                jnp.arange(suffix_slots) <= self.written,
            ]
        )
        both = jnp.concatenate([on_prefix, on_suffix], axis=-1)
        both = jnp.where(real[None, None, None, :], both, -jnp.inf)
        weights = jax.nn.softmax(both, axis=-1).astype(query.dtype)
        mixed = jnp.einsum(
            "bkgs,skh->bkgh",
            weights[..., :prefix_slots],
            state.prefix.values[0],
            precision=precision,
        ) + jnp.einsum(
            "bkgt,btkh->bkgh", weights[..., prefix_slots:], suffix.values, precision=precision
        )
        return mixed.reshape(participants, 1, heads, width), suffix

"""The programs of sampling: a forest of prompts, first tokens, and the decoding loop.

Shapes are those of buckets, so that few programs are compiled: `G` prompts, `N` participants and
the `P` who share a prompt are powers of two, a prefix is padded to `score.bucket`, and the room
for answers grows in steps.  What a call asks for beyond that, how many tokens and when to stop,
is no part of a program.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from befm_jax.data.forest import Forest
from befm_jax.inference import kv_cache
from befm_jax.inference.kv_cache import Cache, Decode, KeysValues, Prefill, Rows
from befm_jax.llama.attention import ForestAttention
from befm_jax.llama.model import (
    Apart,
    Llama,
    Params,
    apart,
    hidden_states,
    hidden_states_apart,
    vocabulary_logits,
)

# One token a row from its logits, by its key.
Draw = Callable[[Float[Array, "N V"], Array], Int[Array, " N"]]


class Prompts(NamedTuple):
    """A forest of prompts, computed.

    `hidden` [B, S, D]: final hidden states; `keys_values`: rotated keys and values, stacked over
    layers, [L, B, S, K, h] each.
    """

    hidden: Float[Array, "B S D"]
    keys_values: tuple[Array, Array]


class Asked(NamedTuple):
    """Who answers what in a batch.

    `prefix`: keys and values of the `G` prompts, a layer each; `lengths` [G]: their tokens;
    `rows`: which row answers which prompt; `keys` [N]: everyone's own random key.
    """

    prefix: tuple[KeysValues, ...]
    lengths: Int[Array, " G"]
    rows: Rows
    keys: Array


class Answers(NamedTuple):
    """Where `N` answers stand: what the decoding loop carries, and what it goes on from.

    `written`: tokens drawn so far, the same for all; `done` [N]; `tokens` [N, T]: the first
    `written` of them, stop tokens behind an end; `suffix`: a layer each, the keys and values of
    all tokens but the last.
    """

    written: Int32[Array, ""]
    done: Bool[Array, " N"]
    tokens: Int32[Array, "N T"]
    suffix: tuple[KeysValues, ...]


def weights_for_decoding(params: Params) -> Params | Apart:
    """The parameters as `go_on` reads them fastest: layers apart, where there is room for a copy.

    A layer sliced from stacked parameters is copied before its product reads it, for every token
    anew (in XLA's programs for CPU and GPU).  Half of what is free on the device has to hold the
    copy; without it, decoding a few participants takes two to three times longer.
    """
    leaves = jax.tree.leaves(params["layers"])
    shards = [leaf.addressable_shards[0] for leaf in leaves if isinstance(leaf, jax.Array)]
    memory = shards[0].device.memory_stats() if shards else None
    if memory:
        free = memory["bytes_limit"] - memory["bytes_in_use"]
        if sum(shard.data.nbytes for shard in shards) > free / 2:
            return params
    found: Apart = jax.jit(apart)(params)
    return found


@lru_cache(maxsize=8)
def prefill(model: Llama) -> Callable[[Params, Forest], Prompts]:
    """The program `(params, forest) -> prompts`."""

    def program(params: Params, forest: Forest) -> Prompts:
        attention = Prefill(ForestAttention(jnp.asarray(forest.end)))
        return Prompts(*hidden_states(model, params, forest.tokens, forest.depth, attention))

    return jax.jit(program)


@partial(jax.jit, static_argnames="int8")
def prefixes(
    keys_values: tuple[Array, Array], paths: Int[Array, "G S"], *, int8: bool
) -> tuple[KeysValues, ...]:
    """Everyone's prompt in one piece: the slots of a forest along each prompt's path.

    `paths` count slots through all rows of the forest.
    """

    def along(array: Array) -> Array:
        return array.reshape(-1, *array.shape[2:])[paths]

    layers = zip(*keys_values, strict=True)
    return tuple(kv_cache.stored(along(key), along(value), int8=int8) for key, value in layers)


@jax.jit
def everyones_keys(seeds: Array, numbers: Int[Array, " N"]) -> Array:
    """A random key [N] for each participant, from the data of their request's and their number."""
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(seeds), numbers)


@partial(jax.jit, static_argnames="slots")
def with_room(answers: Answers, slots: int) -> Answers:
    """The same answers with room for so many tokens."""
    more = slots - answers.tokens.shape[1]
    suffix = tuple(kv_cache.longer(layer, slots) for layer in answers.suffix)
    tokens = jnp.pad(answers.tokens, ((0, 0), (0, more)))
    return answers._replace(tokens=tokens, suffix=suffix)


@jax.jit
def taken(kept: tuple[Any, ...], rows: Int[Array, " M"]) -> tuple[Any, ...]:
    """Some rows, or prompts, of caches: a batch that goes on with fewer of them."""
    found: tuple[Any, ...] = jax.tree.map(lambda array: array[rows], kept)
    return found


class Programs(NamedTuple):
    """`begin(params, hidden, ends, keys, prompt, real, slots) -> answers`: the first tokens, drawn
    behind slot `ends` [G] of a forest's hidden states, with room for `slots` tokens.

    `go_on(weights, asked, answers, limit, few) -> answers`: until `limit` tokens are drawn, or no
    more than `few` rows are unfinished.  It consumes the answers that it is given.
    """

    begin: Callable[..., Answers]
    go_on: Callable[..., Answers]


def programs(model: Llama, draw: Draw, stop_ids: tuple[int, ...], *, int8: bool) -> Programs:
    """The programs that draw answers from a model."""
    stops = np.asarray(stop_ids, np.int32)
    config = model.config

    def drawn(logits: Array, keys: Array, written: Array | int) -> Array:
        return draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, written))

    def begin(
        params: Params,
        hidden: Float[Array, "B S D"],
        ends: Int[Array, " G"],
        keys: Array,
        prompt: Int[Array, " N"],
        real: Bool[Array, " N"],
        slots: int,
    ) -> Answers:
        people = prompt.shape[0]
        logits = vocabulary_logits(model, params, hidden.reshape(-1, hidden.shape[-1])[ends])
        first = drawn(logits[prompt], keys, 0)
        tokens = jnp.zeros((people, slots), jnp.int32).at[:, 0].set(first)
        room = kv_cache.room(
            (people, config.num_key_value_heads, config.head_dim, slots), model.dtype, int8=int8
        )
        done = jnp.isin(first, stops) | ~real
        return Answers(jnp.int32(1), done, tokens, (room,) * config.num_hidden_layers)

    def go_on(
        weights: Params | Apart, asked: Asked, answers: Answers, limit: Array, few: Array
    ) -> Answers:
        def unfinished(answers: Answers) -> Array:
            return (answers.written < limit) & (jnp.sum(~answers.done) > few)

        def advance(answers: Answers) -> Answers:
            # Slices in the loop take the room of one layer, before it that of all.
            parts = weights if isinstance(weights, Apart) else apart(weights)
            written, done, tokens, suffix = answers
            last = jax.lax.dynamic_slice_in_dim(tokens, written - 1, 1, axis=1)
            positions = (asked.lengths[asked.rows.prompt] + written - 1)[:, None]
            attention = Decode(asked.rows, asked.lengths, written - 1)
            caches = [Cache(*layer) for layer in zip(asked.prefix, suffix, strict=True)]
            hidden, suffix = hidden_states_apart(model, parts, last, positions, attention, caches)
            logits = vocabulary_logits(model, parts.shared, hidden[:, 0])
            token = jnp.where(done, stops[0], drawn(logits, asked.keys, written))
            tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, written))
            return Answers(written + 1, done | jnp.isin(token, stops), tokens, suffix)

        final: Answers = jax.lax.while_loop(unfinished, advance, answers)
        return final

    return Programs(
        jax.jit(begin, static_argnames="slots"), jax.jit(go_on, donate_argnames="answers")
    )

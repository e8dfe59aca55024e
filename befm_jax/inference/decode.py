"""The jitted programs of sampling: prefill of a forest of prompts, first tokens, decoding loop.

Shapes are bucketed, so that few programs are compiled: `G` prompts, `N` participants and the `P`
per prompt are powers of two (over several devices, per block of rows), a prefix is padded to
`score.bucket`, and the capacity for answers grows in steps.  The number of tokens to draw and when
to stop are arguments.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int, Int32

from befm_jax.data.forest import Forest
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed import transfer
from befm_jax.inference import kv_cache
from befm_jax.inference.kv_cache import Cache, Decode, KeysValues, Prefill, Rows
from befm_jax.inference.next_token import NOT_FINITE
from befm_jax.llama import linear
from befm_jax.llama.attention import ForestAttention
from befm_jax.llama.linear import ShardingRules, placed
from befm_jax.llama.log_probs import vocabulary_head
from befm_jax.llama.model import (
    Llama,
    Params,
    Unstacked,
    hidden_states,
    hidden_states_unstacked,
    unstack,
    vocabulary_logits,
)

# One token a row from its logits, by its key.
Draw = Callable[[Float[Array, "N V"], Array], Int[Array, " N"]]


class Prompts(NamedTuple):
    """The result of a prefill of a forest of prompts.

    `hidden` [B, S, D]: final hidden states; `keys_values`: rotated keys and values, stacked over
    layers, [L, B, S, K, h] each.
    """

    hidden: Float[Array, "B S D"]
    keys_values: tuple[Array, Array]


class DecodeInputs(NamedTuple):
    """The constant inputs of the decoding loop for a batch.

    `prefix`: keys and values of the `G` prompts, one per layer; `lengths` [G]: their tokens;
    `rows`: which row answers which prompt; `keys` [N]: each participant's random key.
    """

    prefix: tuple[KeysValues, ...]
    lengths: Int[Array, " G"] | Int[np.ndarray, " G"]
    rows: Rows
    keys: Array


class DecodeState(NamedTuple):
    """The carry of the decoding loop over `N` answers.

    `written`: tokens drawn so far, the same for all rows; `done` [N]; `tokens` [N, T]: the first
    `written` are drawn, stop tokens follow an end; `suffix`: one per layer, the keys and values of
    all drawn tokens but the last.
    """

    written: Int32[Array, ""]
    done: Bool[Array, " N"]
    tokens: Int32[Array, "N T"]
    suffix: tuple[KeysValues, ...]


def placements(layout: ShardingRules | None) -> tuple[DecodeInputs, DecodeState]:
    """The shardings of a batch: one for all arrays of a field.

    Caches are sharded; the rest, a few numbers per row, is replicated.
    """
    replicated: Any = linear.sharding(layout)
    prefix: Any = linear.sharding(layout, *kv_cache.OF_PROMPTS)
    suffix: Any = linear.sharding(layout, *kv_cache.OF_PEOPLE)
    return (
        DecodeInputs(prefix, replicated, replicated, replicated),
        DecodeState(replicated, replicated, replicated, suffix),
    )


def weights_for_decoding(model: Llama, params: Params) -> tuple[Llama, Params | Unstacked]:
    """The model and its parameters in the form that `go_on` reads fastest, if memory allows a copy.

    Layers are unstacked: XLA on CPU and GPU copies a layer sliced from stacked parameters before
    its product, for every token, and decoding a few participants takes two to three times longer.
    Over several devices they are resharded to `meshes.sampling_mesh`, which the returned model's
    layout has too: under `fsdp` every token would gather all weights.  The copy must fit in half of
    the free memory of every device.
    """
    if model.layout is None:
        decoder, placed = model, jax.tree.map(_sharding_of, params)
    else:
        mesh = meshes.sampling_mesh(model.config, model.layout.mesh)
        decoder = replace(model, layout=meshes.Layout(mesh))
        placed = meshes.shardings(params, mesh)
    if not _fits_twice(params["layers"], placed["layers"]):
        return model, params
    weights: Unstacked = jax.jit(
        unstack, out_shardings=placed_unstacked(model.config.num_hidden_layers, placed)
    )(params)
    return decoder, weights


def placed_unstacked(layers: int, placed: Params) -> Unstacked:
    """The shardings of unstacked parameters, given those of stacked ones."""

    def of_a_layer(sharding: Any) -> Any:
        if not isinstance(sharding, NamedSharding):
            return sharding
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

    shared = {name: leaf for name, leaf in placed.items() if name != "layers"}
    return Unstacked(shared, (jax.tree.map(of_a_layer, placed["layers"]),) * layers)


def _sharding_of(leaf: Any) -> Sharding:
    if isinstance(leaf, jax.Array):
        return leaf.sharding
    return SingleDeviceSharding(jax.local_devices()[0])


def _fits_twice(arrays: Any, placed: Any) -> bool:
    """Whether two copies of arrays fit in the free memory of the devices of every process."""
    needed, devices = 0, set()
    for leaf, sharding in zip(jax.tree.leaves(arrays), jax.tree.leaves(placed), strict=True):
        needed += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        devices |= sharding.addressable_devices
    memory = [stats for stats in (device.memory_stats() for device in devices) if stats]
    free = [stats["bytes_limit"] - stats["bytes_in_use"] for stats in memory]
    # CPU devices have no memory stats, and share the machine's memory.
    least = min(free) if free else _free_of_machine() // len(devices)
    return transfer.all_agree(2 * needed <= least)


def _free_of_machine() -> int:
    """Linux's estimate of available memory in bytes; unlimited on other systems."""
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return sys.maxsize
    available = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return 1024 * int(available[1]) if available else sys.maxsize


@lru_cache(maxsize=8)
def prefill(model: Llama) -> Callable[[Params, Forest], Prompts]:
    """The program `(params, forest) -> prompts`."""
    layout = model.layout

    def program(params: Params, forest: Forest) -> Prompts:
        attention = Prefill(ForestAttention(jnp.asarray(forest.end), layout))
        return Prompts(*hidden_states(model, params, forest.tokens, forest.depth, attention))

    hidden: Any = linear.sharding(layout, "rows", "slots", "features")
    keys_values: Any = linear.sharding(layout, "layers", "rows", "slots", "each_head")
    return jax.jit(
        program,
        out_shardings=Prompts(hidden, keys_values),
        compiler_options=linear.compiler_options(layout),
    )


class Programs(NamedTuple):
    """The jitted programs of a batch.

    `keys(seeds, numbers) -> keys`: a random key [N] for each participant, from their request's key
    data and their number.

    `prefixes(keys_values, paths) -> prefix`: the cache of each prompt, gathered from the slots of a
    forest along its path [G, S]; slots are indices into the forest's flattened rows.

    `begin(shared, hidden, ends, keys, prompt, real, slots) -> state`: the first tokens, drawn after
    the flat slots `ends` of a forest's hidden states (one per prompt, padded to a multiple of the
    devices), with capacity for `slots` tokens.

    `go_on(weights, asked, state, over, limit, few) -> state`: decodes until `limit` tokens are
    drawn, or no more than `few` rows of any block are unfinished; marks the rows `over` [N] as done
    first.  Donates `state`.

    `with_capacity(state, slots) -> state`: grows the capacity to `slots` tokens.

    `fewer(keys, state, rows) -> keys, state`: compacts a batch to some rows [M, P] of each block,
    counted within it, none of them done; `of_prompts(prefix, prompts) -> prefix`: the cache of
    some prompts.
    """

    keys: Callable[..., Array]
    prefixes: Callable[..., tuple[KeysValues, ...]]
    begin: Callable[..., DecodeState]
    go_on: Callable[..., DecodeState]
    with_capacity: Callable[..., DecodeState]
    fewer: Callable[..., tuple[Array, DecodeState]]
    of_prompts: Callable[..., tuple[KeysValues, ...]]


def programs(model: Llama, draw: Draw, stop_ids: tuple[int, ...], *, int8: bool) -> Programs:
    """The programs that draw answers from a model; `int8` quantises the caches.

    A row that draws `NOT_FINITE` is done, as one that draws a stop id.
    """
    stops = np.asarray((*stop_ids, NOT_FINITE), np.int32)
    config, layout = model.config, model.layout
    of_asked, of_state = placements(layout)

    def participant_keys(seeds: Array, numbers: Int[Array, " N"]) -> Array:
        return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(seeds), numbers)

    def prefixes(
        keys_values: tuple[Array, Array], paths: Int[Array, "G S"]
    ) -> tuple[KeysValues, ...]:
        def along(array: Array) -> Array:
            return array.reshape(-1, *array.shape[2:])[paths]

        layers = zip(*keys_values, strict=True)
        return tuple(kv_cache.stored(along(key), along(value), int8=int8) for key, value in layers)

    def drawn(logits: Array, keys: Array, written: Array | int) -> Array:
        # Each device gets the full logits of its share of rows, an all-to-all rather than a gather.
        logits = placed(layout, logits, "rows_to_draw", None)
        token = draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, written))
        return placed(layout, token, None)

    def begin(
        shared: Params,
        hidden: Float[Array, "B S D"],
        ends: Int[Array, " E"],
        keys: Array,
        prompt: Int[Array, " N"],
        real: Bool[Array, " N"],
        slots: int,
    ) -> DecodeState:
        people = prompt.shape[0]
        last = hidden.reshape(-1, hidden.shape[-1])[ends]
        logits = vocabulary_logits(model, vocabulary_head(model, shared), last)
        first = drawn(logits[prompt], keys, 0)
        tokens = jnp.zeros((people, slots), jnp.int32).at[:, 0].set(first)
        empty = kv_cache.capacity(
            (people, config.num_key_value_heads, config.head_dim, slots), model.dtype, int8=int8
        )
        done = jnp.isin(first, stops) | ~real
        return DecodeState(jnp.int32(1), done, tokens, (empty,) * config.num_hidden_layers)

    def go_on(
        weights: Params | Unstacked,
        asked: DecodeInputs,
        state: DecodeState,
        over: Bool[Array, " N"],
        limit: Array,
        few: Array,
    ) -> DecodeState:
        head = vocabulary_head(model, weights.shared if isinstance(weights, Unstacked) else weights)
        blocks, lengths = asked.rows.of_prompt.shape[0], jnp.asarray(asked.lengths)

        def unfinished(state: DecodeState) -> Array:
            per_block = jnp.sum(~state.done.reshape(blocks, -1), axis=1)
            return (state.written < limit) & (jnp.max(per_block) > few)

        def advance(state: DecodeState) -> DecodeState:
            # Unstacking within the loop needs memory for one layer at a time, outside it for all.
            parts = weights if isinstance(weights, Unstacked) else unstack(weights)
            written, done, tokens, suffix = state
            last = jax.lax.dynamic_slice_in_dim(tokens, written - 1, 1, axis=1)
            positions = (lengths[asked.rows.prompt] + written - 1)[:, None]
            attention = Decode(asked.rows, lengths, written - 1, layout)
            caches = [Cache(*layer) for layer in zip(asked.prefix, suffix, strict=True)]
            hidden, suffix = hidden_states_unstacked(
                model, parts, last, positions, attention, caches
            )
            logits = vocabulary_logits(model, head, hidden[:, 0])
            token = jnp.where(done, stops[0], drawn(logits, asked.keys, written))
            tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, written))
            return DecodeState(written + 1, done | jnp.isin(token, stops), tokens, suffix)

        state = state._replace(done=state.done | over)
        final: DecodeState = jax.lax.while_loop(unfinished, advance, state)
        return final

    def with_capacity(state: DecodeState, slots: int) -> DecodeState:
        more = slots - state.tokens.shape[1]
        suffix = tuple(kv_cache.longer(layer, slots) for layer in state.suffix)
        tokens = jnp.pad(state.tokens, ((0, 0), (0, more)))
        return state._replace(tokens=tokens, suffix=suffix)

    def fewer(
        keys: Array, state: DecodeState, rows: Int[Array, "M P"]
    ) -> tuple[Array, DecodeState]:
        blocks = rows.shape[0]
        first = jnp.arange(blocks)[:, None] * (keys.shape[0] // blocks)
        flat_rows = (first + rows).reshape(-1)

        def take_in_block(suffix: tuple[KeysValues, ...], rows: Int[Array, "1 P"]) -> Any:
            return jax.tree.map(lambda array: array[rows[0]], suffix)

        take: Any = take_in_block
        if layout is not None:
            # Every participant's cache stays on its devices.
            people = kv_cache.OF_PEOPLE
            take = layout.on_each_device(take_in_block, (people, ("rows",)), people)
        tokens, suffix = state.tokens[flat_rows], take(state.suffix, rows)
        done = jnp.zeros(len(tokens), bool)
        return keys[flat_rows], DecodeState(state.written, done, tokens, suffix)

    def of_prompts(
        prefix: tuple[KeysValues, ...], prompts: Int[Array, " M"]
    ) -> tuple[KeysValues, ...]:
        selected: tuple[KeysValues, ...] = jax.tree.map(lambda array: array[prompts], prefix)
        return selected

    return Programs(
        keys=jax.jit(participant_keys, out_shardings=of_asked.keys),
        prefixes=jax.jit(prefixes, out_shardings=of_asked.prefix),
        begin=jax.jit(begin, static_argnames="slots", out_shardings=of_state),
        go_on=jax.jit(go_on, donate_argnames="state", out_shardings=of_state),
        with_capacity=jax.jit(with_capacity, static_argnames="slots", out_shardings=of_state),
        fewer=jax.jit(fewer, out_shardings=(of_asked.keys, of_state)),
        of_prompts=jax.jit(of_prompts, out_shardings=of_asked.prefix),
    )

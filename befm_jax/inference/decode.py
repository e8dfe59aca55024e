"""The programs of sampling: a forest of prompts, first tokens, and the decoding loop.

Shapes are those of buckets, so that few programs are compiled: `G` prompts, `N` participants and
the `P` who share a prompt are powers of two (over several devices, of each of their blocks of
rows), a prefix is padded to `score.bucket`, and the room for answers grows in steps.  What a call
asks for beyond that, how many tokens and when to stop, is no part of a program.
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
    lengths: Int[Array, " G"] | Int[np.ndarray, " G"]
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


def placements(layout: ShardingRules | None) -> tuple[Asked, Answers]:
    """The sharding of what stands in a batch: one for every array of a part.

    Caches are cut; the rest, a few numbers a row, every device and so every process has whole.
    """
    whole: Any = linear.sharding(layout)
    prefix: Any = linear.sharding(layout, *kv_cache.OF_PROMPTS)
    suffix: Any = linear.sharding(layout, *kv_cache.OF_PEOPLE)
    return Asked(prefix, whole, whole, whole), Answers(whole, whole, whole, suffix)


def weights_for_decoding(model: Llama, params: Params) -> tuple[Llama, Params | Unstacked]:
    """The model and its parameters as `go_on` reads them fastest, where there is room for a copy.

    Layers stand apart: a layer sliced from stacked parameters is copied before its product reads
    it, for every token anew (in XLA's programs for CPU and GPU), and decoding a few participants
    takes two to three times longer.  Over several devices they are cut for sampling, however they
    are cut otherwise (`meshes.sampling_mesh`), and the model says so: under `fsdp` every token
    would gather all of them.  Half of what is free on a device has to hold the copy.
    """
    if model.layout is None:
        fastest, placed = model, jax.tree.map(_standing, params)
    else:
        mesh = meshes.sampling_mesh(model.config, model.layout.mesh)
        fastest = replace(model, layout=meshes.Layout(mesh))
        placed = meshes.shardings(params, mesh)
    if not _fits_twice(params["layers"], placed["layers"]):
        return model, params
    weights: Unstacked = jax.jit(
        unstack, out_shardings=placed_unstacked(model.config.num_hidden_layers, placed)
    )(params)
    return fastest, weights


def placed_unstacked(layers: int, placed: Params) -> Unstacked:
    """Where parameters stand that are taken apart: each layer as the stack is, which is uncut."""

    def of_a_layer(sharding: Any) -> Any:
        if not isinstance(sharding, NamedSharding):
            return sharding
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

    shared = {name: leaf for name, leaf in placed.items() if name != "layers"}
    return Unstacked(shared, (jax.tree.map(of_a_layer, placed["layers"]),) * layers)


def _standing(leaf: Any) -> Sharding:
    if isinstance(leaf, jax.Array):
        return leaf.sharding
    return SingleDeviceSharding(jax.local_devices()[0])


def _fits_twice(arrays: Any, placed: Any) -> bool:
    """Whether two copies of arrays would fit in what is free, on the devices of every process."""
    needed, devices = 0, set()
    for leaf, sharding in zip(jax.tree.leaves(arrays), jax.tree.leaves(placed), strict=True):
        needed += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        devices |= sharding.addressable_devices
    memory = [stats for stats in (device.memory_stats() for device in devices) if stats]
    free = [stats["bytes_limit"] - stats["bytes_in_use"] for stats in memory]
    # The devices of a CPU, which say nothing, share what the machine has.
    least = min(free) if free else _free_of_machine() // len(devices)
    return transfer.all_agree(2 * needed <= least)


def _free_of_machine() -> int:
    """Bytes that Linux says a program could still have; anywhere else there is no limit."""
    try:
        said = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return sys.maxsize
    found = re.search(r"^MemAvailable:\s+(\d+) kB", said, re.MULTILINE)
    return 1024 * int(found[1]) if found else sys.maxsize


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
    """The programs of a batch, from its beginning to its end.

    `keys(seeds, numbers) -> keys`: a random key [N] for each participant, from the data of their
    request's and their number.

    `prefixes(keys_values, paths) -> prefix`: everyone's prompt in one piece, the slots of a forest
    along each prompt's path [G, S], which counts them through all rows of the forest.

    `begin(shared, hidden, ends, keys, prompt, real, slots) -> answers`: the first tokens, drawn
    behind slot `ends` of a forest's hidden states (one for each of the `G` prompts, or more, as
    many as devices share evenly), with room for `slots` tokens.

    `go_on(weights, asked, answers, over, limit, few) -> answers`: until `limit` tokens are drawn,
    or no more than `few` rows of any block are unfinished; rows that are `over` [N] are done,
    whatever the answers say.  It consumes the answers that it is given.

    `with_capacity(answers, slots) -> answers`: the same with room for so many tokens.

    `fewer(keys, answers, rows) -> keys, answers`: a batch that goes on with some rows [M, P] of
    each block, counted within it, none of them done; `of_prompts(prefix, prompts) -> prefix`:
    with some of its prompts.
    """

    keys: Callable[..., Array]
    prefixes: Callable[..., tuple[KeysValues, ...]]
    begin: Callable[..., Answers]
    go_on: Callable[..., Answers]
    with_capacity: Callable[..., Answers]
    fewer: Callable[..., tuple[Array, Answers]]
    of_prompts: Callable[..., tuple[KeysValues, ...]]


def programs(model: Llama, draw: Draw, stop_ids: tuple[int, ...], *, int8: bool) -> Programs:
    """The programs that draw answers from a model."""
    stops = np.asarray(stop_ids, np.int32)
    config, layout = model.config, model.layout
    of_asked, of_answers = placements(layout)

    def everyones_keys(seeds: Array, numbers: Int[Array, " N"]) -> Array:
        return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(seeds), numbers)

    def prefixes(
        keys_values: tuple[Array, Array], paths: Int[Array, "G S"]
    ) -> tuple[KeysValues, ...]:
        def along(array: Array) -> Array:
            return array.reshape(-1, *array.shape[2:])[paths]

        layers = zip(*keys_values, strict=True)
        return tuple(kv_cache.stored(along(key), along(value), int8=int8) for key, value in layers)

    def drawn(logits: Array, keys: Array, written: Array | int) -> Array:
        # Of a few rows every device gets all logits: fewer go about than if each had those of all.
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
    ) -> Answers:
        people = prompt.shape[0]
        last = hidden.reshape(-1, hidden.shape[-1])[ends]
        logits = vocabulary_logits(model, vocabulary_head(model, shared), last)
        first = drawn(logits[prompt], keys, 0)
        tokens = jnp.zeros((people, slots), jnp.int32).at[:, 0].set(first)
        room = kv_cache.capacity(
            (people, config.num_key_value_heads, config.head_dim, slots), model.dtype, int8=int8
        )
        done = jnp.isin(first, stops) | ~real
        return Answers(jnp.int32(1), done, tokens, (room,) * config.num_hidden_layers)

    def go_on(
        weights: Params | Unstacked,
        asked: Asked,
        answers: Answers,
        over: Bool[Array, " N"],
        limit: Array,
        few: Array,
    ) -> Answers:
        head = vocabulary_head(model, weights.shared if isinstance(weights, Unstacked) else weights)
        blocks, lengths = asked.rows.lanes.shape[0], jnp.asarray(asked.lengths)

        def unfinished(answers: Answers) -> Array:
            of_blocks = jnp.sum(~answers.done.reshape(blocks, -1), axis=1)
            return (answers.written < limit) & (jnp.max(of_blocks) > few)

        def advance(answers: Answers) -> Answers:
            # Slices in the loop take the room of one layer, before it that of all.
            parts = weights if isinstance(weights, Unstacked) else unstack(weights)
            written, done, tokens, suffix = answers
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
            return Answers(written + 1, done | jnp.isin(token, stops), tokens, suffix)

        answers = answers._replace(done=answers.done | over)
        final: Answers = jax.lax.while_loop(unfinished, advance, answers)
        return final

    def with_capacity(answers: Answers, slots: int) -> Answers:
        more = slots - answers.tokens.shape[1]
        suffix = tuple(kv_cache.longer(layer, slots) for layer in answers.suffix)
        tokens = jnp.pad(answers.tokens, ((0, 0), (0, more)))
        return answers._replace(tokens=tokens, suffix=suffix)

    def fewer(keys: Array, answers: Answers, rows: Int[Array, "M P"]) -> tuple[Array, Answers]:
        blocks = rows.shape[0]
        first = jnp.arange(blocks)[:, None] * (keys.shape[0] // blocks)
        through_all = (first + rows).reshape(-1)

        def of_a_block(suffix: tuple[KeysValues, ...], rows: Int[Array, "1 P"]) -> Any:
            return jax.tree.map(lambda array: array[rows[0]], suffix)

        take: Any = of_a_block
        if layout is not None:
            # Everyone's cache stays on the devices where it is.
            people = kv_cache.OF_PEOPLE
            take = layout.on_each_device(of_a_block, (people, ("rows",)), people)
        tokens, suffix = answers.tokens[through_all], take(answers.suffix, rows)
        done = jnp.zeros(len(tokens), bool)
        return keys[through_all], Answers(answers.written, done, tokens, suffix)

    def of_prompts(
        prefix: tuple[KeysValues, ...], prompts: Int[Array, " M"]
    ) -> tuple[KeysValues, ...]:
        found: tuple[KeysValues, ...] = jax.tree.map(lambda array: array[prompts], prefix)
        return found

    return Programs(
        keys=jax.jit(everyones_keys, out_shardings=of_asked.keys),
        prefixes=jax.jit(prefixes, out_shardings=of_asked.prefix),
        begin=jax.jit(begin, static_argnames="slots", out_shardings=of_answers),
        go_on=jax.jit(go_on, donate_argnames="answers", out_shardings=of_answers),
        with_capacity=jax.jit(with_capacity, static_argnames="slots", out_shardings=of_answers),
        fewer=jax.jit(fewer, out_shardings=(of_asked.keys, of_answers)),
        of_prompts=jax.jit(of_prompts, out_shardings=of_asked.prefix),
    )

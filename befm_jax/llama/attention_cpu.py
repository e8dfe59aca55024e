"""Forest attention in blocks, for CPUs: XLA's own products, and no block that nobody can see.

A row's queries are taken block by block; each goes through the blocks of keys that any of its
slots can see, with a running softmax (Dao et al., arXiv 2205.14135).  In a tree that is wide most
pairs of blocks see nothing of each other, and cost nothing.  The backward pass takes the same walk
and computes the weights again from the logarithm of their sums.

What limits it: one core.  XLA gives the products of small blocks no second one (process time is 1.1
times the wall's, of large products 1.95 times on two cores).  Where a CPU is one virtual device for
every core, rows are computed side by side.  Larger blocks waste more products on what is masked.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from befm_jax.llama import blocks

# Slots a block: with more, trees skip too little.  Against blocks of 128 seven games in rows of 640
# and 1,024 slots take 0.7 of the time, packed texts 0.8 to 0.95, one text of 1,024 slots as long,
# and one of 2,048, in which most blocks are wholly seen, 1.2 times as long.
BLOCK = 64
# Stands for minus infinity, without its NaNs where a query sees nothing of a block.
_UNSEEN = -1e30


def forward(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int[Array, "B N"],
) -> tuple[Float[Array, "B N H h"], Float[Array, "B H N"]]:
    """Mixed values in the dtype of `query`, and the logarithm of each query's softmax sum."""
    slots, groups = query.shape[1], query.shape[2] // key.shape[2]

    def one_row(row: tuple[Any, ...]) -> tuple[Array, Array]:
        queries, keys, values, ends, walk = row

        def one_block(at: tuple[Array, Array]) -> tuple[Array, Array]:
            number, block = at

            def meet(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                highest, total, mixed = carry
                other = walk.keys[number, step]
                scores = _scores(block, keys[other], _visible(number, other, ends), groups)
                risen = jnp.maximum(highest, scores.max(-1))
                weights = jnp.exp(scores - risen[..., None])
                faded = jnp.exp(highest - risen)
                update = _product("kts,ksh->kth", weights.astype(query.dtype), values[other])
                return (
                    risen,
                    total * faded + weights.sum(-1),
                    mixed * faded[..., None] + update,
                )

            start = (
                jnp.full(block.shape[:2], _UNSEEN, jnp.float32),
                jnp.zeros(block.shape[:2], jnp.float32),
                jnp.zeros(block.shape, jnp.float32),
            )
            highest, total, mixed = jax.lax.fori_loop(0, walk.needed[number], meet, start)
            return (mixed / total[..., None]).astype(query.dtype), highest + jnp.log(total)

        mixed, sums = jax.lax.map(one_block, (jnp.arange(len(queries)), queries))
        return mixed, sums

    mixed, sums = jax.lax.map(one_row, _cut(query, key, value, end))
    return (
        _heads(mixed, groups, slots),
        _heads(sums[..., None], groups, slots)[..., 0].transpose(0, 2, 1),
    )


def backward(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int[Array, "B N"],
    mixed: Float[Array, "B N H h"],
    log_sum_exp: Float[Array, "B H N"],
    gradient: Float[Array, "B N H h"],
) -> tuple[Float[Array, "B N H h"], Float[Array, "B N K h"], Float[Array, "B N K h"]]:
    """Gradients of `query`, `key` and `value`, given that of `mixed`."""
    slots, heads, width = query.shape[1:]
    groups = heads // key.shape[2]
    # What a change of any weight of a query costs by the others' having to make room for it.
    shared = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)
    statistics = jnp.stack([log_sum_exp.transpose(0, 2, 1), shared], axis=-1)

    def one_row(row: tuple[Any, ...]) -> tuple[Array, Array, Array]:
        queries, keys, values, ends, walk, gradients, stats = row

        def one_block(carry: tuple[Array, Array], at: tuple[Array, ...]) -> tuple[Any, Array]:
            number, block, slope, stat = at

            def meet(step: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                d_block, d_keys, d_values = carry
                other = walk.keys[number, step]
                scores = _scores(block, keys[other], _visible(number, other, ends), groups)
                weights = jnp.exp(scores - stat[..., 0, None])
                d_value = _product("kts,kth->ksh", weights.astype(query.dtype), slope)
                d_weights = _product("kth,ksh->kts", slope, values[other])
                d_scores = (weights * (d_weights - stat[..., 1, None])).astype(query.dtype)
                return (
                    d_block + _product("kts,ksh->kth", d_scores, keys[other]),
                    d_keys.at[other].add(_product("kts,kth->ksh", d_scores, block)),
                    d_values.at[other].add(d_value),
                )

            start = (jnp.zeros(block.shape, jnp.float32), *carry)
            d_block, d_keys, d_values = jax.lax.fori_loop(0, walk.needed[number], meet, start)
            return (d_keys, d_values), d_block

        nothing = jnp.zeros(keys.shape, jnp.float32)
        (d_keys, d_values), d_queries = jax.lax.scan(
            one_block,
            (nothing, nothing),
            (jnp.arange(len(queries)), queries, gradients, stats),
        )
        return d_queries, d_keys, d_values

    rows = (*_cut(query, key, value, end), _blocks(gradient, groups), _blocks(statistics, groups))
    d_queries, d_keys, d_values = jax.lax.map(one_row, rows)
    return (
        (_heads(d_queries, groups, slots) * width**-0.5).astype(query.dtype),
        _heads(d_keys, 1, slots).astype(key.dtype),
        _heads(d_values, 1, slots).astype(value.dtype),
    )


def _visible(number: Array, other: Array, ends: Int[Array, "blocks block"]) -> Bool[Array, "t s"]:
    """Who of a block of queries sees whom of a block of keys: `key <= query <= end[key]`."""
    size = ends.shape[1]
    queries = (number * size + jnp.arange(size))[:, None]
    keys = (other * size + jnp.arange(size))[None, :]
    return (keys <= queries) & (queries <= ends[other][None, :])


def _scores(
    block: Float[Array, "K gt h"],
    keys: Float[Array, "K s h"],
    visible: Bool[Array, "t s"],
    groups: int,
) -> Float[Array, "K gt s"]:
    """What a block of queries makes of a block of keys; `_UNSEEN` where it may not look."""
    scores = _product("kth,ksh->kts", block, keys)
    apart = scores.reshape(len(scores), groups, *visible.shape)
    return jnp.where(visible[None, None], apart, _UNSEEN).reshape(scores.shape)


def _product(layout: str, left: Array, right: Array) -> Float[Array, "K a b"]:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.einsum(layout, left, right, precision=precision, preferred_element_type=jnp.float32)


def _cut(
    query: Array, key: Array, value: Array, end: Array
) -> tuple[Array, Array, Array, Int[Array, "B blocks block"], blocks.KeyLists]:
    """Queries (scaled), keys, values and ends in blocks, and which blocks meet which."""
    groups = query.shape[2] // key.shape[2]
    size, padded = _sizes(end.shape[1])
    ends = blocks.pad_end(end, padded)
    walk = blocks.whole_first(blocks.pairs(ends, size, size))
    scaled = query * query.shape[-1] ** -0.5
    return (
        _blocks(scaled, groups),
        _blocks(key, 1),
        _blocks(value, 1),
        ends.reshape(len(end), -1, size),
        walk,
    )


def _sizes(slots: int) -> tuple[int, int]:
    """Slots a block, and slots a row once it is whole blocks."""
    size = min(BLOCK, slots)
    return size, -(-slots // size) * size


def _blocks(heads: Float[Array, "B N Kg c"], groups: int) -> Float[Array, "B blocks K gt c"]:
    """Heads of a group behind each other, as rows of one product."""
    rows, slots, count, width = heads.shape
    size, padded = _sizes(slots)
    heads = jnp.pad(heads, ((0, 0), (0, padded - slots), (0, 0), (0, 0)))
    apart = heads.reshape(rows, -1, size, count // groups, groups, width)
    return apart.transpose(0, 1, 3, 4, 2, 5).reshape(
        rows, -1, count // groups, groups * size, width
    )


def _heads(blocks: Float[Array, "B blocks K gt c"], groups: int, slots: int) -> Array:
    """The way back from `_blocks`: `[B, N, K * groups, c]` without the padding."""
    rows, number, count, together, width = blocks.shape
    apart = blocks.reshape(rows, number, count, groups, together // groups, width)
    joined = apart.transpose(0, 1, 4, 2, 3, 5).reshape(rows, -1, count * groups, width)
    return joined[:, :slots]

"""Block-sparse forest attention for CPUs, built on XLA's matrix products.

Each query block loops over the key blocks that any of its slots attends to, with an online softmax
(Dao et al., arXiv 2205.14135).  In a wide tree most pairs of blocks are fully masked and are
skipped.  The backward pass runs the same loop and recomputes the weights from the log-sum-exp.

The bottleneck is one core: XLA does not parallelise the products of small blocks (process time is
1.1 times wall time; 1.95 times for large products on two cores).  With one virtual device per core,
rows run in parallel.  Larger blocks waste more work on masked entries.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from befm_jax.llama import blocks

# Slots per block: larger blocks skip too little of a tree.  Relative to blocks of 128, seven games
# in rows of 640 and 1,024 slots take 0.7 times as long, packed texts 0.8 to 0.95 times, one text of
# 1,024 slots the same, and one of 2,048, in which most blocks are fully visible, 1.2 times.
BLOCK = 64
# A finite stand-in for minus infinity: no NaN where a query's block is fully masked.
_MASKED = -1e30


def forward(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int[Array, "B N"],
) -> tuple[Float[Array, "B N H h"], Float[Array, "B H N"]]:
    """Attention output in the dtype of `query`, and each query's log-sum-exp in float32."""
    slots, groups = query.shape[1], query.shape[2] // key.shape[2]

    def one_row(row: tuple[Any, ...]) -> tuple[Array, Array]:
        queries, keys, values, ends, lists = row

        def one_block(args: tuple[Array, Array]) -> tuple[Array, Array]:
            number, block = args

            def add_keys(
                step: Array, carry: tuple[Array, Array, Array]
            ) -> tuple[Array, Array, Array]:
                row_max, row_sum, output = carry
                other = lists.keys[number, step]
                scores = _scores(block, keys[other], _visible(number, other, ends), groups)
                new_max = jnp.maximum(row_max, scores.max(-1))
                weights = jnp.exp(scores - new_max[..., None])
                rescale = jnp.exp(row_max - new_max)
                update = _product("kts,ksh->kth", weights.astype(query.dtype), values[other])
                return (
                    new_max,
                    row_sum * rescale + weights.sum(-1),
                    output * rescale[..., None] + update,
                )

            init = (
                jnp.full(block.shape[:2], _MASKED, jnp.float32),
                jnp.zeros(block.shape[:2], jnp.float32),
                jnp.zeros(block.shape, jnp.float32),
            )
            row_max, row_sum, output = jax.lax.fori_loop(0, lists.needed[number], add_keys, init)
            return (output / row_sum[..., None]).astype(query.dtype), row_max + jnp.log(row_sum)

        output, log_sum_exp = jax.lax.map(one_block, (jnp.arange(len(queries)), queries))
        return output, log_sum_exp

    output, log_sum_exp = jax.lax.map(one_row, _to_blocks(query, key, value, end))
    return (
        _to_heads(output, groups, slots),
        _to_heads(log_sum_exp[..., None], groups, slots)[..., 0].transpose(0, 2, 1),
    )


def backward(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int[Array, "B N"],
    output: Float[Array, "B N H h"],
    log_sum_exp: Float[Array, "B H N"],
    gradient: Float[Array, "B N H h"],
) -> tuple[Float[Array, "B N H h"], Float[Array, "B N K h"], Float[Array, "B N K h"]]:
    """Gradients of `query`, `key` and `value`, given the gradient of `output`."""
    slots, heads, width = query.shape[1:]
    groups = heads // key.shape[2]
    # The part of a score's gradient that comes through the softmax's denominator.
    delta = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), axis=-1)
    statistics = jnp.stack([log_sum_exp.transpose(0, 2, 1), delta], axis=-1)

    def one_row(row: tuple[Any, ...]) -> tuple[Array, Array, Array]:
        queries, keys, values, ends, lists, gradients, stats = row

        def one_block(carry: tuple[Array, Array], args: tuple[Array, ...]) -> tuple[Any, Array]:
            number, block, d_output, stat = args

            def add_keys(step: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                d_block, d_keys, d_values = carry
                other = lists.keys[number, step]
                scores = _scores(block, keys[other], _visible(number, other, ends), groups)
                weights = jnp.exp(scores - stat[..., 0, None])
                d_value = _product("kts,kth->ksh", weights.astype(query.dtype), d_output)
                d_weights = _product("kth,ksh->kts", d_output, values[other])
                d_scores = (weights * (d_weights - stat[..., 1, None])).astype(query.dtype)
                return (
                    d_block + _product("kts,ksh->kth", d_scores, keys[other]),
                    d_keys.at[other].add(_product("kts,kth->ksh", d_scores, block)),
                    d_values.at[other].add(d_value),
                )

            init = (jnp.zeros(block.shape, jnp.float32), *carry)
            d_block, d_keys, d_values = jax.lax.fori_loop(0, lists.needed[number], add_keys, init)
            return (d_keys, d_values), d_block

        zeros = jnp.zeros(keys.shape, jnp.float32)
        (d_keys, d_values), d_queries = jax.lax.scan(
            one_block,
            (zeros, zeros),
            (jnp.arange(len(queries)), queries, gradients, stats),
        )
        return d_queries, d_keys, d_values

    d_queries, d_keys, d_values = jax.lax.map(
        one_row,
        (
            *_to_blocks(query, key, value, end),
            _blocks(gradient, groups),
            _blocks(statistics, groups),
        ),
    )
    return (
        (_to_heads(d_queries, groups, slots) * width**-0.5).astype(query.dtype),
        _to_heads(d_keys, 1, slots).astype(key.dtype),
        _to_heads(d_values, 1, slots).astype(value.dtype),
    )


def _visible(number: Array, other: Array, ends: Int[Array, "blocks block"]) -> Bool[Array, "t s"]:
    """The mask of a query block over a key block: `key <= query <= end[key]`."""
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
    """Attention scores of a query block over a key block; `_MASKED` where not visible."""
    scores = _product("kth,ksh->kts", block, keys)
    by_group = scores.reshape(len(scores), groups, *visible.shape)
    return jnp.where(visible[None, None], by_group, _MASKED).reshape(scores.shape)


def _product(spec: str, left: Array, right: Array) -> Float[Array, "K a b"]:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.einsum(spec, left, right, precision=precision, preferred_element_type=jnp.float32)


def _to_blocks(
    query: Array, key: Array, value: Array, end: Array
) -> tuple[Array, Array, Array, Int[Array, "B blocks block"], blocks.KeyLists]:
    """Queries (scaled), keys, values and ends in blocks, and each query block's key blocks."""
    groups = query.shape[2] // key.shape[2]
    size, padded = _sizes(end.shape[1])
    ends = blocks.pad_end(end, padded)
    lists = blocks.unmasked_first(blocks.pairs(ends, size, size))
    scaled = query * query.shape[-1] ** -0.5
    return (
        _blocks(scaled, groups),
        _blocks(key, 1),
        _blocks(value, 1),
        ends.reshape(len(end), -1, size),
        lists,
    )


def _sizes(slots: int) -> tuple[int, int]:
    """Slots per block, and slots per row after padding to a multiple of that."""
    size = min(BLOCK, slots)
    return size, -(-slots // size) * size


def _blocks(heads: Float[Array, "B N Kg c"], groups: int) -> Float[Array, "B blocks K gt c"]:
    """Rows in blocks; the heads of a group are concatenated along one axis, for one product."""
    rows, slots, count, width = heads.shape
    size, padded = _sizes(slots)
    heads = jnp.pad(heads, ((0, 0), (0, padded - slots), (0, 0), (0, 0)))
    split = heads.reshape(rows, -1, size, count // groups, groups, width)
    return split.transpose(0, 1, 3, 4, 2, 5).reshape(
        rows, -1, count // groups, groups * size, width
    )


def _to_heads(blocks: Float[Array, "B blocks K gt c"], groups: int, slots: int) -> Array:
    """The inverse of `_blocks`: `[B, N, K * groups, c]` without the padding."""
    rows, number, count, grouped, width = blocks.shape
    split = blocks.reshape(rows, number, count, groups, grouped // groups, width)
    joined = split.transpose(0, 1, 4, 2, 3, 5).reshape(rows, -1, count * groups, width)
    return joined[:, :slots]

"""Which blocks of an attention matrix a forest needs: what flash kernels skip by.

Slot `i` sees slot `j` exactly when `j <= i <= end[j]`.  Cut into blocks of consecutive slots, key
block `J` is needed by query block `I` exactly when it starts at or before the last query and one
of its keys is still open at the first one; it is wholly visible when it ends at or before the
first query and all of its keys are open to the last one.  Both follow from the greatest and the
least `end` of a key block, so that nothing here is larger than blocks times blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

FIRST, LAST, WHOLE = 1, 2, 4


class Pairs(NamedTuple):
    """Pairs of a query block and a key block, `[B, I, J]`.

    `needed`: some query of `I` sees some key of `J`; `whole`: every query sees every key.
    """

    needed: Bool[Array, "B I J"]
    whole: Bool[Array, "B I J"]


class Work(NamedTuple):
    """The needed pairs of all rows as one list, in the order in which a kernel walks it.

    Ordered by row, then by outer block, then by inner block, so that an outer block's steps stand
    behind each other.  `row`, `outer`, `inner` [S] int32; `marks` [S] int32, a sum of `FIRST` (the
    outer block's first step), `LAST` (its last) and `WHOLE` (every query sees every key).  Steps
    from `count` (int32 scalar) on are filling, and repeat the first.
    """

    row: Int32[Array, " S"]
    outer: Int32[Array, " S"]
    inner: Int32[Array, " S"]
    marks: Int32[Array, " S"]
    count: Int32[Array, ""]


def pad_end(end: Int32[Array, "B N"], slots: int) -> Int32[Array, "B M"]:
    """`end` for rows of `slots` slots: those added see themselves alone, and nobody else does."""
    rows, have = end.shape
    added = jnp.arange(have, slots, dtype=end.dtype)
    return jnp.concatenate([end, jnp.broadcast_to(added, (rows, slots - have))], axis=1)


def pairs(end: Int32[Array, "B N"], query_block: int, key_block: int) -> Pairs:
    """Which pairs of blocks are needed, and which are wholly visible.

    Raises:
        ValueError: `N` is not a multiple of both block sizes (`pad_end` makes it one).
    """
    rows, slots = end.shape
    if slots % query_block or slots % key_block:
        raise ValueError(
            f"{slots} slots don't divide into blocks of {query_block} queries and {key_block} keys"
        )
    by_block = end.reshape(rows, slots // key_block, key_block)
    greatest = by_block.max(axis=2)[:, None, :]
    least = by_block.min(axis=2)[:, None, :]
    query_start = jnp.arange(0, slots, query_block, dtype=end.dtype)[None, :, None]
    key_start = jnp.arange(0, slots, key_block, dtype=end.dtype)[None, None, :]
    query_last, key_last = query_start + query_block - 1, key_start + key_block - 1
    return Pairs(
        needed=(key_start <= query_last) & (greatest >= query_start),
        whole=(key_last <= query_start) & (least >= query_last),
    )


def most_pairs(rows: int, slots: int, query_block: int, key_block: int) -> int:
    """How many pairs are needed at most: those of plain causal rows."""
    blocks = range(query_block, slots + query_block, query_block)
    return rows * sum(math.ceil(min(last, slots) / key_block) for last in blocks)


def by_query(found: Pairs, steps: int) -> Work:
    """Query blocks one after another, each with the key blocks that it needs, ascending.

    `steps` is the length of the lists: `most_pairs`, known when the program is built.
    """
    return _listed(found.needed, found.whole, steps)


def by_key(found: Pairs, steps: int) -> Work:
    """Key blocks one after another, each with the query blocks that need it, ascending."""
    return _listed(found.needed.swapaxes(1, 2), found.whole.swapaxes(1, 2), steps)


def _listed(needed: Bool[Array, "B O I"], whole: Bool[Array, "B O I"], steps: int) -> Work:
    _, outer_blocks, inner_blocks = needed.shape
    flat = needed.reshape(-1)
    (at,) = jnp.nonzero(flat, size=steps, fill_value=jnp.argmax(flat))
    at = at.astype(jnp.int32)
    count = jnp.sum(flat, dtype=jnp.int32)
    outer_of = at // inner_blocks
    step = jnp.arange(steps, dtype=jnp.int32)
    changes = outer_of[1:] != outer_of[:-1]
    first = jnp.concatenate([jnp.ones(1, bool), changes])
    last = jnp.concatenate([changes, jnp.ones(1, bool)]) | (step == count - 1)
    marks = FIRST * first + LAST * last + WHOLE * whole.reshape(-1)[at]
    return Work(
        row=outer_of // outer_blocks,
        outer=outer_of % outer_blocks,
        inner=at % inner_blocks,
        marks=marks.astype(jnp.int32),
        count=count,
    )

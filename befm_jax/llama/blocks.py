"""Which blocks of an attention matrix a forest needs: what flash kernels skip by.

Slot `i` sees slot `j` exactly when `j <= i <= end[j]`.  Cut into blocks of consecutive slots, key
block `J` is needed by query block `I` exactly when it starts at or before the last query and one
of its keys is still open at the first one; it is wholly visible when it ends at or before the
first query and all of its keys are open to the last one.  Both follow from the greatest and the
least `end` of a key block, so that nothing here is larger than blocks times blocks.
"""

from __future__ import annotations

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

    Ordered by row, then by query block, then by key block, so that a query block's steps stand
    behind each other.  `row`, `query`, `key` [S] int32; `marks` [S] int32, a sum of `FIRST` (the
    query block's first step), `LAST` (its last) and `WHOLE` (every query sees every key).  `steps`
    (int32 scalar): how many there are; what follows is filling, and repeats the first.
    """

    row: Int32[Array, " S"]
    query: Int32[Array, " S"]
    key: Int32[Array, " S"]
    marks: Int32[Array, " S"]
    steps: Int32[Array, ""]


class KeyLists(NamedTuple):
    """For every query block the numbers of the key blocks that it needs, those without mask first.

    `keys` [B, I, J] int32: wholly visible key blocks, then those visible in part, then the rest,
    ascending in each; `whole` [B, I] int32: how many come first; `needed` [B, I] int32: how many
    before the rest.
    """

    keys: Int32[Array, "B I J"]
    whole: Int32[Array, "B I"]
    needed: Int32[Array, "B I"]


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


def by_query(found: Pairs, most: int) -> Work:
    """Query blocks one after another, each with the key blocks that it needs, ascending.

    `most` is the length of the lists, known when the program is built: at least as many as are
    needed, which are at most those of plain causal rows.
    """
    _, query_blocks, key_blocks = found.needed.shape
    needed = found.needed.reshape(-1)
    (at,) = jnp.nonzero(needed, size=most, fill_value=jnp.argmax(needed))
    at = at.astype(jnp.int32)
    steps = jnp.sum(needed, dtype=jnp.int32)
    of = at // key_blocks
    changes = of[1:] != of[:-1]
    first = jnp.concatenate([jnp.ones(1, bool), changes])
    last = jnp.concatenate([changes, jnp.ones(1, bool)])
    last |= jnp.arange(most, dtype=jnp.int32) == steps - 1
    marks = FIRST * first + LAST * last + WHOLE * found.whole.reshape(-1)[at]
    return Work(
        row=of // query_blocks,
        query=of % query_blocks,
        key=at % key_blocks,
        marks=marks.astype(jnp.int32),
        steps=steps,
    )


def whole_first(found: Pairs) -> KeyLists:
    """A list for each query block, for kernels whose programs walk one query block each."""
    count = found.needed.shape[2]
    rank = jnp.where(found.whole, 0, jnp.where(found.needed, 1, 2))
    # One sort of numbers that hold both the rank and the block is cheaper than sorting pairs.
    block = jnp.arange(count, dtype=jnp.int32)[None, None, :]
    return KeyLists(
        keys=jnp.sort(rank * count + block, axis=2) % count,
        whole=jnp.sum(found.whole, axis=2, dtype=jnp.int32),
        needed=jnp.sum(found.needed, axis=2, dtype=jnp.int32),
    )

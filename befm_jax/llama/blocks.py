"""Block sparsity of a forest's attention mask, by which flash kernels skip blocks.

Slot `i` sees slot `j` exactly when `j <= i <= end[j]`.  In blocks of consecutive slots, key block
`J` is needed by query block `I` exactly when it starts at or before the last query and one of its
keys has an `end` at or after the first one; it is fully visible when it ends at or before the first
query and every key's `end` is at or after the last one.  Both follow from the largest and the
smallest `end` of a key block, so that no array here is larger than blocks times blocks.
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
    """The needed pairs of all rows as one list, in the order of a kernel's grid.

    Sorted by row, then by query block, then by key block, so that the steps of a query block are
    consecutive.  `row`, `query`, `key` [S] int32; `marks` [S] int32, a sum of `FIRST` (the query
    block's first step), `LAST` (its last) and `WHOLE` (every query sees every key).  `steps` (int32
    scalar): the number of valid entries; the rest is padding that repeats the first.
    """

    row: Int32[Array, " S"]
    query: Int32[Array, " S"]
    key: Int32[Array, " S"]
    marks: Int32[Array, " S"]
    steps: Int32[Array, ""]


class KeyLists(NamedTuple):
    """For every query block the indices of the key blocks that it needs, fully visible ones first.

    `keys` [B, I, J] int32: fully visible key blocks, then partly visible ones, then the rest,
    ascending in each; `whole` [B, I] int32: the number of fully visible ones; `needed` [B, I]
    int32: the number of visible ones, fully or partly.
    """

    keys: Int32[Array, "B I J"]
    whole: Int32[Array, "B I"]
    needed: Int32[Array, "B I"]


def pad_end(end: Int32[Array, "B N"], slots: int) -> Int32[Array, "B M"]:
    """`end` padded to `slots` slots; a padding slot is visible to itself alone."""
    rows, have = end.shape
    added = jnp.arange(have, slots, dtype=end.dtype)
    return jnp.concatenate([end, jnp.broadcast_to(added, (rows, slots - have))], axis=1)


def pairs(end: Int32[Array, "B N"], query_block: int, key_block: int) -> Pairs:
    """Which pairs of blocks are needed, and which are fully visible.

    Raises:
        ValueError: `N` is not a multiple of both block sizes (`pad_end` makes it one).
    """
    rows, slots = end.shape
    if slots % query_block or slots % key_block:
        raise ValueError(
            f"{slots} slots don't divide into blocks of {query_block} queries and {key_block} keys"
        )
    by_block = end.reshape(rows, slots // key_block, key_block)
    max_end = by_block.max(axis=2)[:, None, :]
    min_end = by_block.min(axis=2)[:, None, :]
    query_start = jnp.arange(0, slots, query_block, dtype=end.dtype)[None, :, None]
    key_start = jnp.arange(0, slots, key_block, dtype=end.dtype)[None, None, :]
    query_last, key_last = query_start + query_block - 1, key_start + key_block - 1
    return Pairs(
        needed=(key_start <= query_last) & (max_end >= query_start),
        whole=(key_last <= query_start) & (min_end >= query_last),
    )


def by_query(block_pairs: Pairs, most: int) -> Work:
    """The needed pairs as one list: query blocks in order, each with its key blocks ascending.

    `most` is the static length of the lists, at least the number of needed pairs; plain causal rows
    need the most.
    """
    _, query_blocks, key_blocks = block_pairs.needed.shape
    needed = block_pairs.needed.reshape(-1)
    (at,) = jnp.nonzero(needed, size=most, fill_value=jnp.argmax(needed))
    at = at.astype(jnp.int32)
    steps = jnp.sum(needed, dtype=jnp.int32)
    flat_query = at // key_blocks
    changes = flat_query[1:] != flat_query[:-1]
    first = jnp.concatenate([jnp.ones(1, bool), changes])
    last = jnp.concatenate([changes, jnp.ones(1, bool)])
    last |= jnp.arange(most, dtype=jnp.int32) == steps - 1
    marks = FIRST * first + LAST * last + WHOLE * block_pairs.whole.reshape(-1)[at]
    return Work(
        row=flat_query // query_blocks,
        query=flat_query % query_blocks,
        key=at % key_blocks,
        marks=marks.astype(jnp.int32),
        steps=steps,
    )


def unmasked_first(block_pairs: Pairs) -> KeyLists:
    """One list per query block, for kernels whose programs process one query block each."""
    count = block_pairs.needed.shape[2]
    rank = jnp.where(block_pairs.whole, 0, jnp.where(block_pairs.needed, 1, 2))
    # Sorting one integer that encodes rank and block is cheaper than sorting pairs.
    block = jnp.arange(count, dtype=jnp.int32)[None, None, :]
    return KeyLists(
        keys=jnp.sort(rank * count + block, axis=2) % count,
        whole=jnp.sum(block_pairs.whole, axis=2, dtype=jnp.int32),
        needed=jnp.sum(block_pairs.needed, axis=2, dtype=jnp.int32),
    )

"""Forest attention on NVIDIA GPUs: three Pallas kernels, compiled by Triton.

Slot `i` sees slot `j` exactly when `j <= i <= end[j]`.  All kernels are flash attention (Dao, 2023,
arXiv:2307.08691): scores live in registers only, softmax figures and sums in float32.

- A query tile holds the same slots of several query heads of one group, so that heads share the
  keys and values that a program reads, and a tile of 128 rows spans few slots: less of a block
  that is visible in part goes to waste.
- `forward` and the gradient of the queries walk, for each query block, the list of key blocks that
  it needs (`blocks.whole_first`): first those without a mask, then those with one.
- The gradients of keys and values walk, for each key block, the query blocks between its first
  slot and its greatest `end`: column intervals make that one run, and what every key of the block
  is visible to a run within it.  Heads of a group are added up by the product itself: no atomics,
  and the same result every time.

What limits them: the tensor cores wait for the softmax, since Triton's two warp groups work in
step, and a program's registers and shared memory leave room for one program on a multiprocessor.
The tuning data that comes with tokamax 0.0.12 for an H100 (bfloat16, 32 plain causal rows of 4,096,
32 query heads and 8 key-value heads 128 wide, forward) say what that costs: 11.6 ms with this
compiler at its best (38 % of the peak), 7.2 with a warp-specialised Mosaic kernel, 6.8 with cuDNN;
backward without tuning 41 with this compiler and 61 with Mosaic.  Neither of the faster ones takes
column intervals.  float32 runs on the plain cores, as tensor cores would round it to tf32.

Tiles (`_TILES`) were chosen from those figures and from what the compiler says of an H100: no
register is spilled, and tiles are asked for two turns before they are used.  The kernels here have
not been timed on a GPU.  A program takes up to 225 KB of shared memory of an H100 (which has 227)
and 161 of an A100 (163, where the compiler keeps one tile less); cards with less can't run them.

The compiler can't cut these kernels over devices by itself: call them within `jax.shard_map`, rows
over any mesh axes and heads over one that divides the key-value heads; they need no communication.
Rows that are not a multiple of 128 slots long are copied to be padded.

jax deprecates this compiler from 0.11 on (it warns once a program) in favour of its Mosaic one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int32

from befm_jax.llama import blocks
from befm_jax.llama.config import WIDEST_HEAD

_LOG2_E = math.log2(math.e)
# Finite, so that a row which has met no visible key yet yields no NaN: what it has added up by then
# is multiplied by zero at its first visible key, and every slot sees at least itself.  A power of
# two, so that its product with the scale is exact: compilers merge that product into the following
# subtraction or not, and the difference of an unseen score to itself must be zero either way.
_UNSEEN = -(2.0**100)
# The least rows, columns and depth of a product in Triton.
_LEAST = 16


class _Tile(NamedTuple):
    """How one kernel is cut.

    `rows`: (query head, slot) pairs of a query tile; `keys`: slots of a key tile; `warps` of 32
    threads a program; `stages`: turns of the loop whose tiles are on their way at a time.
    """

    rows: int
    keys: int
    warps: int
    stages: int


class _Tiles(NamedTuple):
    forward: _Tile
    d_query: _Tile
    d_key: _Tile


# By head width (the next that is not narrower) and dtype.  In bfloat16 the tile that stays has 128
# rows: of fewer, tensor cores would consume tiles faster than the L2 cache delivers them.  With
# three stages a tile is asked for a whole turn before it is used; with two, only as long before as
# the turn's last product takes, which is too short.
_TILES = {
    (64, "bfloat16"): _Tiles(
        forward=_Tile(rows=128, keys=64, warps=4, stages=3),
        d_query=_Tile(rows=128, keys=64, warps=8, stages=3),
        d_key=_Tile(rows=64, keys=128, warps=8, stages=3),
    ),
    (128, "bfloat16"): _Tiles(
        forward=_Tile(rows=128, keys=128, warps=8, stages=3),
        d_query=_Tile(rows=128, keys=64, warps=8, stages=3),
        d_key=_Tile(rows=64, keys=128, warps=8, stages=3),
    ),
    (64, "float32"): _Tiles(
        forward=_Tile(rows=32, keys=32, warps=8, stages=2),
        d_query=_Tile(rows=32, keys=32, warps=8, stages=2),
        d_key=_Tile(rows=32, keys=32, warps=8, stages=2),
    ),
    (128, "float32"): _Tiles(
        forward=_Tile(rows=32, keys=16, warps=8, stages=2),
        d_query=_Tile(rows=32, keys=32, warps=8, stages=2),
        d_key=_Tile(rows=32, keys=16, warps=8, stages=2),
    ),
}


class _Cut(NamedTuple):
    """One kernel's tile fitted to a problem.

    A query tile is `heads` query heads of one group by `slots` slots, and a group has `parts` such
    tiles for the same slots.
    """

    heads: int
    parts: int
    slots: int
    keys: int
    params: plgpu.CompilerParams

    @property
    def rows(self) -> int:
        return self.heads * self.slots

    @property
    def step(self) -> int:
        """Rows of a forest are padded to a multiple of this; both are powers of two."""
        return max(self.slots, self.keys)


class _Figures(NamedTuple):
    """What both gradient kernels read, padded: see `backward`."""

    end: Array
    query: Array
    key: Array
    value: Array
    gradient: Array
    log_sum_exp: Array
    through: Array


def forward(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int32[Array, "B N"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H h"], Float32[Array, "B H N"]]:
    """Attention within the rows of a forest; scores are divided by the root of the head width.

    Returns the mixed values in the dtype of `query`, and for every query head and slot the natural
    logarithm of the sum of its exponentiated scores, which `backward` wants.  `interpret` runs the
    kernels on any device, slowly, to check them.

    Raises:
        ValueError: heads wider than 128, query heads that do not divide by key-value heads, or
            arrays that are not all bfloat16 or all float32.
    """
    batch, slots, heads, width = query.shape
    cut = _cut(_tiles(query, key, value).forward, query, key)
    end, query, key, value = _padded(cut, end, query, key, value)
    padded = query.shape[1]
    lists = blocks.whole_first(blocks.pairs(end, cut.slots, cut.keys))
    specs = _QuerySpecs(cut, query)
    mixed, log_sum_exp = pl.pallas_call(
        functools.partial(_forward_kernel, cut=cut, scale=width**-0.5),
        grid=specs.grid,
        in_specs=[*specs.lists(lists), specs.end, specs.query, specs.key, specs.key],
        out_specs=[specs.query, specs.figure],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
        ],
        compiler_params=cut.params,
        interpret=interpret,
        name="forest_attention_forward",
    )(*lists, end, query, key, value)
    return mixed[:, :slots, :, :width], log_sum_exp[:, :, :slots]


def backward(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int32[Array, "B N"],
    mixed: Float[Array, "B N H h"],
    log_sum_exp: Float32[Array, "B H N"],
    gradient: Float[Array, "B N H h"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H h"], Float[Array, "B N K h"], Float[Array, "B N K h"]]:
    """Gradients of `query`, `key` and `value`, each in its dtype.

    `mixed` and `log_sum_exp` are what `forward` returned, `gradient` is that of `mixed`.  Softmax
    weights are computed again from `log_sum_exp`.

    Raises:
        ValueError: as `forward`.
    """
    slots, width = query.shape[1], query.shape[3]
    tiles = _tiles(query, key, value)
    # The part of a score's gradient that comes through the softmax's denominator.
    through = jnp.sum(mixed.astype(jnp.float32) * gradient.astype(jnp.float32), axis=3)
    rest = (log_sum_exp, through.swapaxes(1, 2))

    def figures(cut: _Cut) -> _Figures:
        arrays = _padded(cut, end, query, key, value, gradient.astype(query.dtype))
        more = ((0, 0), (0, 0), (0, arrays[0].shape[1] - slots))
        return _Figures(*arrays, *(jnp.pad(figure, more) for figure in rest))

    cut = _cut(tiles.d_query, query, key)
    d_query = _d_query(cut, figures(cut), width**-0.5, interpret)
    cut = _cut(tiles.d_key, query, key)
    d_key, d_value = _d_key(cut, figures(cut), width**-0.5, interpret)
    return (
        d_query[:, :slots, :, :width],
        d_key[:, :slots, :, :width],
        d_value[:, :slots, :, :width],
    )


def _d_query(cut: _Cut, figures: _Figures, scale: float, interpret: bool) -> Array:
    query = figures.query
    lists = blocks.whole_first(blocks.pairs(figures.end, cut.slots, cut.keys))
    specs = _QuerySpecs(cut, query)
    return pl.pallas_call(
        functools.partial(_d_query_kernel, cut=cut, scale=scale),
        grid=specs.grid,
        in_specs=[
            *specs.lists(lists),
            specs.end,
            specs.query,
            specs.key,
            specs.key,
            specs.query,
            specs.figure,
            specs.figure,
        ],
        out_specs=specs.query,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=cut.params,
        interpret=interpret,
        name="forest_attention_d_query",
    )(*lists, *figures)


def _d_key(cut: _Cut, figures: _Figures, scale: float, interpret: bool) -> tuple[Array, Array]:
    batch, slots, key_heads, width = figures.key.shape
    groups = figures.query.shape[2] // key_heads
    group = pl.BlockSpec((None, slots, groups, width), lambda head, row, block: (row, 0, head, 0))
    figure = pl.BlockSpec((None, groups, slots), lambda head, row, block: (row, head, 0))
    key = pl.BlockSpec(
        (None, cut.keys, None, width), lambda head, row, block: (row, block, head, 0)
    )
    d_key, d_value = pl.pallas_call(
        functools.partial(_d_key_kernel, cut=cut, scale=scale),
        # The first keys are seen by the most queries: the longest programs start first.
        grid=(key_heads, batch, slots // cut.keys),
        in_specs=[
            pl.BlockSpec((None, cut.keys), lambda head, row, block: (row, block)),
            group,
            key,
            key,
            group,
            figure,
            figure,
        ],
        out_specs=[key, key],
        out_shape=[
            jax.ShapeDtypeStruct(figures.key.shape, figures.key.dtype),
            jax.ShapeDtypeStruct(figures.value.shape, figures.value.dtype),
        ],
        compiler_params=cut.params,
        interpret=interpret,
        name="forest_attention_d_key",
    )(*figures)
    return d_key, d_value


# In the kernels every argument is a reference to a block in device memory, and what is read from
# it, and computed with, a tile in registers or shared memory.


def _forward_kernel(
    keys_ref: Any,
    whole_ref: Any,
    needed_ref: Any,
    end_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    mixed_ref: Any,
    log_sum_exp_ref: Any,
    *,
    cut: _Cut,
    scale: float,
) -> None:
    block = _query_block()
    head, at = _rows(cut)
    slot = block * cut.slots + at
    query = query_ref[at, head, :]
    base2 = scale * _LOG2_E

    def turn(key_block: Any, carry: Any, *, masked: bool) -> Any:
        total, top, mass = carry
        start = key_block * cut.keys
        here = pl.ds(start, cut.keys)
        scores = _dot(query, key_ref[here, :], 1, 1)
        if masked:
            key_slot = (start + jnp.arange(cut.keys, dtype=jnp.int32))[None, :]
            visible = _visible(slot[:, None], key_slot, end_ref[here][None, :])
            scores = jnp.where(visible, scores, _UNSEEN)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1) * base2)
        # Scaled here and not before: scaling and subtracting are then one instruction.
        weights = jnp.exp2(scores * base2 - new_top[:, None])
        fade = jnp.exp2(top - new_top)
        mass = mass * fade + jnp.sum(weights, axis=1)
        value = value_ref[here, :]
        total = total * fade[:, None] + _dot(weights.astype(value.dtype), value, 1, 0)
        return total, new_top, mass

    nothing = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full((cut.rows,), -jnp.inf, jnp.float32),
        jnp.zeros((cut.rows,), jnp.float32),
    )
    total, top, mass = _walk(keys_ref, whole_ref[block], needed_ref[block], turn, nothing)
    mixed_ref[at, head, :] = (total / mass[:, None]).astype(mixed_ref.dtype)
    log_sum_exp_ref[head, at] = (top + jnp.log2(mass)) / _LOG2_E


def _d_query_kernel(
    keys_ref: Any,
    whole_ref: Any,
    needed_ref: Any,
    end_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    gradient_ref: Any,
    log_sum_exp_ref: Any,
    through_ref: Any,
    d_query_ref: Any,
    *,
    cut: _Cut,
    scale: float,
) -> None:
    block = _query_block()
    head, at = _rows(cut)
    slot = block * cut.slots + at
    query, gradient = query_ref[at, head, :], gradient_ref[at, head, :]
    log_sum_exp = (log_sum_exp_ref[head, at] * _LOG2_E)[:, None]
    through = through_ref[head, at][:, None]

    def turn(key_block: Any, d_query: Any, *, masked: bool) -> Any:
        start = key_block * cut.keys
        here = pl.ds(start, cut.keys)
        key = key_ref[here, :]
        weights = jnp.exp2(_dot(query, key, 1, 1) * (scale * _LOG2_E) - log_sum_exp)
        if masked:
            key_slot = (start + jnp.arange(cut.keys, dtype=jnp.int32))[None, :]
            visible = _visible(slot[:, None], key_slot, end_ref[here][None, :])
            weights = jnp.where(visible, weights, 0.0)
        d_scores = weights * (_dot(gradient, value_ref[here, :], 1, 1) - through)
        return d_query + _dot(d_scores.astype(key.dtype), key, 1, 0)

    nothing = jnp.zeros(query.shape, jnp.float32)
    d_query = _walk(keys_ref, whole_ref[block], needed_ref[block], turn, nothing)
    d_query_ref[at, head, :] = (d_query * scale).astype(d_query_ref.dtype)


def _d_key_kernel(
    end_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    gradient_ref: Any,
    log_sum_exp_ref: Any,
    through_ref: Any,
    d_key_ref: Any,
    d_value_ref: Any,
    *,
    cut: _Cut,
    scale: float,
) -> None:
    start = pl.program_id(2) * cut.keys
    key_slot = (start + jnp.arange(cut.keys, dtype=jnp.int32))[:, None]
    end = end_ref[:]
    key, value = key_ref[:, :], value_ref[:, :]
    head_of_row, at = _rows(cut)

    # Query blocks from `first` to `stop` see some of these keys, and those from `whole_first` to
    # `whole_stop` all of them.
    first = lax.div(start, cut.slots)
    stop = lax.div(jnp.max(end), cut.slots) + 1
    whole_first = jnp.minimum(lax.div(start + cut.keys + cut.slots - 2, cut.slots), stop)
    whole_stop = jnp.clip(lax.div(jnp.min(end) + 1, cut.slots), whole_first, stop)
    whole = whole_stop - whole_first

    def turn(number: Any, carry: Any, *, masked: bool) -> Any:
        d_key, d_value = carry
        block = lax.div(number, cut.parts)
        if masked:
            # The blocks before the wholly visible ones, then those behind them.
            block = first + block - whole
            block = jnp.where(block < whole_first, block, block + whole)
        else:
            block = whole_first + block
        slot = block * cut.slots + at
        head = lax.rem(number, cut.parts) * cut.heads + head_of_row
        query, gradient = query_ref[slot, head, :], gradient_ref[slot, head, :]
        log_sum_exp = (log_sum_exp_ref[head, slot] * _LOG2_E)[None, :]
        weights = jnp.exp2(_dot(key, query, 1, 1) * (scale * _LOG2_E) - log_sum_exp)
        if masked:
            visible = _visible(slot[None, :], key_slot, end[:, None])
            weights = jnp.where(visible, weights, 0.0)
        d_value = d_value + _dot(weights.astype(gradient.dtype), gradient, 1, 0)
        d_weights = _dot(value, gradient, 1, 1)
        d_scores = weights * (d_weights - through_ref[head, slot][None, :])
        d_key = d_key + _dot(d_scores.astype(query.dtype), query, 1, 0)
        return d_key, d_value

    nothing = jnp.zeros(key.shape, jnp.float32)
    d_key, d_value = _loops(turn, whole * cut.parts, (stop - first) * cut.parts, (nothing, nothing))
    d_key_ref[:, :] = (d_key * scale).astype(d_key_ref.dtype)
    d_value_ref[:, :] = d_value.astype(d_value_ref.dtype)


def _loops(turn: Callable[..., Any], whole: Any, needed: Any, carry: Any) -> Any:
    """Turns 0 to `whole` without a mask, then to `needed` with one.

    Two loops, since a condition inside a loop would keep Triton from reading ahead.
    """
    carry = lax.fori_loop(0, whole, functools.partial(turn, masked=False), carry)
    return lax.fori_loop(whole, needed, functools.partial(turn, masked=True), carry)


def _walk(keys_ref: Any, whole: Any, needed: Any, turn: Callable[..., Any], carry: Any) -> Any:
    """Turns over the listed key blocks, those without a mask first.

    A turn reads the number of the block after its own: Triton would otherwise take the reading of
    the number for the first of the stages, and have one less for the tiles.
    """
    last = keys_ref.shape[0] - 1

    def step(number: Any, state: Any, *, masked: bool) -> Any:
        key_block, carry = state
        after = keys_ref[jnp.minimum(number + 1, last)]
        return after, turn(key_block, carry, masked=masked)

    return _loops(step, whole, needed, (keys_ref[0], carry))[1]


def _visible(query_slot: Any, key_slot: Any, end: Any) -> Any:
    return (key_slot <= query_slot) & (query_slot <= end)


def _dot(left: Any, right: Any, left_axis: int, right_axis: int) -> Any:
    """A product over one axis of each, added up in float32; float32 is not rounded to tf32."""
    return lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _query_block() -> Any:
    """The last queries see the most keys: the longest programs start first."""
    return pl.num_programs(2) - 1 - pl.program_id(2)


def _rows(cut: _Cut) -> tuple[Any, Any]:
    """Head and slot, within the tile, of each of its rows."""
    row = jnp.arange(cut.rows, dtype=jnp.int32)
    return lax.div(row, cut.slots), lax.rem(row, cut.slots)


class _QuerySpecs:
    """What a program of the kernels that walk query blocks sees of each array.

    The grid is (query tiles across heads, rows, query blocks from the last to the first).
    """

    def __init__(self, cut: _Cut, query: Array) -> None:
        batch, slots, heads, width = query.shape
        count = slots // cut.slots
        self.grid = (heads // cut.heads, batch, count)
        self.query = pl.BlockSpec(
            (None, cut.slots, cut.heads, width),
            lambda tile, row, block: (row, count - 1 - block, tile, 0),
        )
        self.figure = pl.BlockSpec(
            (None, cut.heads, cut.slots), lambda tile, row, block: (row, tile, count - 1 - block)
        )
        self.key = pl.BlockSpec(
            (None, slots, None, width),
            lambda tile, row, block: (row, 0, lax.div(tile, cut.parts), 0),
        )
        self.end = pl.BlockSpec((None, slots), lambda tile, row, block: (row, 0))

    def lists(self, lists: blocks.KeyLists) -> list[pl.BlockSpec]:
        """A program's own list of key blocks, and all counts of its row."""
        _, count, keys = lists.keys.shape
        own = pl.BlockSpec((None, None, keys), lambda tile, row, block: (row, count - 1 - block, 0))
        counts = pl.BlockSpec((None, count), lambda tile, row, block: (row, 0))
        return [own, counts, counts]


def _tiles(query: Array, key: Array, value: Array) -> _Tiles:
    heads, width = query.shape[2:]
    if width > WIDEST_HEAD:
        raise ValueError(f"heads are at most {WIDEST_HEAD} wide in these kernels, not {width}")
    if heads % key.shape[2]:
        raise ValueError(f"{heads} query heads do not divide by {key.shape[2]} key-value heads")
    dtypes = sorted({str(array.dtype) for array in (query, key, value)})
    if dtypes not in (["bfloat16"], ["float32"]):
        raise ValueError(
            "queries, keys and values must be all bfloat16 or all float32 in these kernels, not "
            f"{' and '.join(dtypes)}"
        )
    return _TILES[64 if width <= 64 else 128, dtypes[0]]


def _cut(tile: _Tile, query: Array, key: Array) -> _Cut:
    groups = query.shape[2] // key.shape[2]
    # A power of two, as every size in Triton, and not so many that a tile has few slots.
    heads = math.gcd(groups, tile.rows // _LEAST)
    return _Cut(
        heads=heads,
        parts=groups // heads,
        slots=tile.rows // heads,
        keys=tile.keys,
        params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    )


def _padded(cut: _Cut, end: Array, *arrays: Array) -> tuple[Array, ...]:
    """Slots added up to whole tiles, each seeing itself alone, and heads widened with zeros."""
    slots, width = arrays[0].shape[1], arrays[0].shape[3]
    more = -slots % cut.step
    wider = max(_LEAST, pl.next_power_of_2(width)) - width
    end = blocks.pad_end(end, slots + more)
    return end, *(jnp.pad(array, ((0, 0), (0, more), (0, 0), (0, wider))) for array in arrays)

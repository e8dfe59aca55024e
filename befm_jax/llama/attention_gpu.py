"""Forest attention on NVIDIA GPUs: three Pallas kernels, compiled by Triton.

Slot `i` sees slot `j` exactly when `j <= i <= end[j]`.  All kernels are flash attention (Dao, 2023,
arXiv:2307.08691): scores live in registers only, softmax statistics and sums in float32.

- A query tile holds the same slots of several query heads of one group, so that heads share the
  keys and values that a program reads, and a tile of 128 rows spans few slots: less of a partly
  visible block is wasted.
- `forward` and the gradient of the queries loop, for each query block, over the list of key blocks
  that it needs (`blocks.unmasked_first`): first those without a mask, then those with one.
- The gradients of keys and values loop, for each key block, over the query blocks between its first
  slot and its largest `end`: a contiguous range, within which the fully visible query blocks are a
  contiguous range too.  The matrix product sums over the heads of a group: no atomics, so that
  results are deterministic.

The bottleneck: tensor cores wait for the softmax, since Triton's two warp groups run in lockstep,
and registers and shared memory fit one program per multiprocessor.  The tuning data of tokamax
0.0.12 for an H100 (bfloat16, 32 plain causal rows of 4,096, 32 query heads and 8 key-value heads of
width 128, forward) show the cost: 11.6 ms with Triton at its best (38 % of peak), 7.2 with a
warp-specialised Mosaic kernel, 6.8 with cuDNN; backward, untuned, 41 with Triton and 61 with
Mosaic.  Neither of the faster ones supports column intervals.  float32 runs on the CUDA cores, as
tensor cores would round it to tf32.

Tile sizes (`_TILES`) were chosen from those figures and from the compiler's report for an H100: no
register spills, and tiles are prefetched two iterations ahead.  The kernels here have not been
timed on a GPU.  A program takes up to 225 KB of shared memory on an H100 (of 227) and 161 on an
A100 (of 163, where the compiler prefetches one tile less); GPUs with less can't run them.

XLA can't partition these kernels: call them within `jax.shard_map`, rows over any mesh axes and
heads over one that divides the key-value heads; they need no communication.  Rows are padded, by a
copy, to a multiple of 128 slots.

jax deprecates the Triton backend from 0.11 on (with one warning per program) in favour of Mosaic.
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
# Finite, so that a row without a visible key so far yields no NaN: its sums are multiplied by zero
# at its first visible key, and every slot sees at least itself.  A power of two, so that its
# product with the scale is exact: compilers may fuse that product into the following subtraction,
# and the difference of a masked score and itself must be zero either way.
_MASKED = -(2.0**100)
# The smallest M, N and K of a Triton dot.
_MIN_DOT = 16


class _Tile(NamedTuple):
    """Tile sizes of one kernel.

    `rows`: (query head, slot) pairs per query tile; `keys`: slots per key tile; `warps` of 32
    threads per program; `stages`: software pipeline stages of the loop.
    """

    rows: int
    keys: int
    warps: int
    stages: int


class _Tiles(NamedTuple):
    forward: _Tile
    d_query: _Tile
    d_key: _Tile


# By head width (rounded up) and dtype.  In bfloat16 the resident tile has 128 rows: with fewer,
# tensor cores would consume tiles faster than the L2 cache delivers them.  With three stages a tile
# is requested a full iteration before its use; with two, only the last product's time before, which
# is too short.
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


class _Tiling(NamedTuple):
    """One kernel's tile sizes for given array shapes.

    A query tile is `heads` query heads of one group by `slots` slots; a group has `parts` such
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


class _GradientInputs(NamedTuple):
    """The padded inputs of both gradient kernels: see `backward`."""

    end: Array
    query: Array
    key: Array
    value: Array
    gradient: Array
    log_sum_exp: Array
    delta: Array


def forward(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int32[Array, "B N"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H h"], Float32[Array, "B H N"]]:
    """Attention within the rows of a forest; scores are divided by the root of the head width.

    Returns the attention output in the dtype of `query`, and the (natural) log-sum-exp of the
    scores of every query head and slot, which `backward` needs.  `interpret` runs the kernels on
    any device, slowly, for tests.

    Raises:
        ValueError: heads wider than 128, query heads not a multiple of key-value heads, or arrays
            that are not all bfloat16 or all float32.
    """
    batch, slots, heads, width = query.shape
    tiling = _tiling(_tiles(query, key, value).forward, query, key)
    end, query, key, value = _padded(tiling, end, query, key, value)
    padded = query.shape[1]
    lists = blocks.unmasked_first(blocks.pairs(end, tiling.slots, tiling.keys))
    specs = _QuerySpecs(tiling, query)
    output, log_sum_exp = pl.pallas_call(
        functools.partial(_forward_kernel, tiling=tiling, scale=width**-0.5),
        grid=specs.grid,
        in_specs=[*specs.lists(lists), specs.end, specs.query, specs.key, specs.key],
        out_specs=[specs.query, specs.row_stat],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
        ],
        compiler_params=tiling.params,
        interpret=interpret,
        name="forest_attention_forward",
    )(*lists, end, query, key, value)
    return output[:, :slots, :, :width], log_sum_exp[:, :, :slots]


def backward(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int32[Array, "B N"],
    output: Float[Array, "B N H h"],
    log_sum_exp: Float32[Array, "B H N"],
    gradient: Float[Array, "B N H h"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H h"], Float[Array, "B N K h"], Float[Array, "B N K h"]]:
    """Gradients of `query`, `key` and `value`, each in its dtype.

    `output` and `log_sum_exp` are the results of `forward`, `gradient` is that of `output`.
    Softmax weights are recomputed from `log_sum_exp`.

    Raises:
        ValueError: as `forward`.
    """
    slots, width = query.shape[1], query.shape[3]
    tiles = _tiles(query, key, value)
    # The part of a score's gradient that comes through the softmax's denominator.
    delta = jnp.sum(output.astype(jnp.float32) * gradient.astype(jnp.float32), axis=3)
    row_stats = (log_sum_exp, delta.swapaxes(1, 2))

    def inputs(tiling: _Tiling) -> _GradientInputs:
        arrays = _padded(tiling, end, query, key, value, gradient.astype(query.dtype))
        padding = ((0, 0), (0, 0), (0, arrays[0].shape[1] - slots))
        return _GradientInputs(*arrays, *(jnp.pad(stat, padding) for stat in row_stats))

    tiling = _tiling(tiles.d_query, query, key)
    d_query = _d_query(tiling, inputs(tiling), width**-0.5, interpret)
    tiling = _tiling(tiles.d_key, query, key)
    d_key, d_value = _d_key(tiling, inputs(tiling), width**-0.5, interpret)
    return (
        d_query[:, :slots, :, :width],
        d_key[:, :slots, :, :width],
        d_value[:, :slots, :, :width],
    )


def _d_query(tiling: _Tiling, inputs: _GradientInputs, scale: float, interpret: bool) -> Array:
    query = inputs.query
    lists = blocks.unmasked_first(blocks.pairs(inputs.end, tiling.slots, tiling.keys))
    specs = _QuerySpecs(tiling, query)
    return pl.pallas_call(
        functools.partial(_d_query_kernel, tiling=tiling, scale=scale),
        grid=specs.grid,
        in_specs=[
            *specs.lists(lists),
            specs.end,
            specs.query,
            specs.key,
            specs.key,
            specs.query,
            specs.row_stat,
            specs.row_stat,
        ],
        out_specs=specs.query,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=tiling.params,
        interpret=interpret,
        name="forest_attention_d_query",
    )(*lists, *inputs)


def _d_key(
    tiling: _Tiling, inputs: _GradientInputs, scale: float, interpret: bool
) -> tuple[Array, Array]:
    batch, slots, key_heads, width = inputs.key.shape
    groups = inputs.query.shape[2] // key_heads
    group = pl.BlockSpec((None, slots, groups, width), lambda head, row, block: (row, 0, head, 0))
    row_stat = pl.BlockSpec((None, groups, slots), lambda head, row, block: (row, head, 0))
    key = pl.BlockSpec(
        (None, tiling.keys, None, width), lambda head, row, block: (row, block, head, 0)
    )
    d_key, d_value = pl.pallas_call(
        functools.partial(_d_key_kernel, tiling=tiling, scale=scale),
        # The first keys are visible to the most queries: the longest programs start first.
        grid=(key_heads, batch, slots // tiling.keys),
        in_specs=[
            pl.BlockSpec((None, tiling.keys), lambda head, row, block: (row, block)),
            group,
            key,
            key,
            group,
            row_stat,
            row_stat,
        ],
        out_specs=[key, key],
        out_shape=[
            jax.ShapeDtypeStruct(inputs.key.shape, inputs.key.dtype),
            jax.ShapeDtypeStruct(inputs.value.shape, inputs.value.dtype),
        ],
        compiler_params=tiling.params,
        interpret=interpret,
        name="forest_attention_d_key",
    )(*inputs)
    return d_key, d_value


# Every `_ref` argument of a kernel refers to a block in device memory; values read from it are
# tiles in registers or shared memory.


def _forward_kernel(
    keys_ref: Any,
    whole_ref: Any,
    needed_ref: Any,
    end_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    output_ref: Any,
    log_sum_exp_ref: Any,
    *,
    tiling: _Tiling,
    scale: float,
) -> None:
    block = _query_block()
    head, at = _rows(tiling)
    slot = block * tiling.slots + at
    query = query_ref[at, head, :]
    base2 = scale * _LOG2_E

    def body(key_block: Any, carry: Any, *, masked: bool) -> Any:
        accumulator, row_max, row_sum = carry
        start = key_block * tiling.keys
        here = pl.ds(start, tiling.keys)
        scores = _dot(query, key_ref[here, :], 1, 1)
        if masked:
            key_slot = (start + jnp.arange(tiling.keys, dtype=jnp.int32))[None, :]
            visible = _visible(slot[:, None], key_slot, end_ref[here][None, :])
            scores = jnp.where(visible, scores, _MASKED)
        new_max = jnp.maximum(row_max, jnp.max(scores, axis=1) * base2)
        # Scaled here and not before: scaling and subtracting are then one instruction.
        weights = jnp.exp2(scores * base2 - new_max[:, None])
        rescale = jnp.exp2(row_max - new_max)
        row_sum = row_sum * rescale + jnp.sum(weights, axis=1)
        value = value_ref[here, :]
        update = _dot(weights.astype(value.dtype), value, 1, 0)
        return accumulator * rescale[:, None] + update, new_max, row_sum

    init = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full((tiling.rows,), -jnp.inf, jnp.float32),
        jnp.zeros((tiling.rows,), jnp.float32),
    )
    accumulator, row_max, row_sum = _walk(keys_ref, whole_ref[block], needed_ref[block], body, init)
    output_ref[at, head, :] = (accumulator / row_sum[:, None]).astype(output_ref.dtype)
    log_sum_exp_ref[head, at] = (row_max + jnp.log2(row_sum)) / _LOG2_E


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
    delta_ref: Any,
    d_query_ref: Any,
    *,
    tiling: _Tiling,
    scale: float,
) -> None:
    block = _query_block()
    head, at = _rows(tiling)
    slot = block * tiling.slots + at
    query, gradient = query_ref[at, head, :], gradient_ref[at, head, :]
    log_sum_exp = (log_sum_exp_ref[head, at] * _LOG2_E)[:, None]
    delta = delta_ref[head, at][:, None]

    def body(key_block: Any, d_query: Any, *, masked: bool) -> Any:
        start = key_block * tiling.keys
        here = pl.ds(start, tiling.keys)
        key = key_ref[here, :]
        weights = jnp.exp2(_dot(query, key, 1, 1) * (scale * _LOG2_E) - log_sum_exp)
        if masked:
            key_slot = (start + jnp.arange(tiling.keys, dtype=jnp.int32))[None, :]
            visible = _visible(slot[:, None], key_slot, end_ref[here][None, :])
            weights = jnp.where(visible, weights, 0.0)
        d_scores = weights * (_dot(gradient, value_ref[here, :], 1, 1) - delta)
        return d_query + _dot(d_scores.astype(key.dtype), key, 1, 0)

    zeros = jnp.zeros(query.shape, jnp.float32)
    d_query = _walk(keys_ref, whole_ref[block], needed_ref[block], body, zeros)
    d_query_ref[at, head, :] = (d_query * scale).astype(d_query_ref.dtype)


def _d_key_kernel(
    end_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    gradient_ref: Any,
    log_sum_exp_ref: Any,
    delta_ref: Any,
    d_key_ref: Any,
    d_value_ref: Any,
    *,
    tiling: _Tiling,
    scale: float,
) -> None:
    start = pl.program_id(2) * tiling.keys
    key_slot = (start + jnp.arange(tiling.keys, dtype=jnp.int32))[:, None]
    end = end_ref[:]
    key, value = key_ref[:, :], value_ref[:, :]
    head_of_row, at = _rows(tiling)

    # Query blocks from `first` to before `stop` see some of these keys, and those from
    # `whole_first` to before `whole_stop` all of them.
    first = lax.div(start, tiling.slots)
    stop = lax.div(jnp.max(end), tiling.slots) + 1
    whole_first = jnp.minimum(lax.div(start + tiling.keys + tiling.slots - 2, tiling.slots), stop)
    whole_stop = jnp.clip(lax.div(jnp.min(end) + 1, tiling.slots), whole_first, stop)
    whole = whole_stop - whole_first

    def body(number: Any, carry: Any, *, masked: bool) -> Any:
        d_key, d_value = carry
        block = lax.div(number, tiling.parts)
        if masked:
            # The blocks before the fully visible ones, then those after them.
            block = first + block - whole
            block = jnp.where(block < whole_first, block, block + whole)
        else:
            block = whole_first + block
        slot = block * tiling.slots + at
        head = lax.rem(number, tiling.parts) * tiling.heads + head_of_row
        query, gradient = query_ref[slot, head, :], gradient_ref[slot, head, :]
        log_sum_exp = (log_sum_exp_ref[head, slot] * _LOG2_E)[None, :]
        weights = jnp.exp2(_dot(key, query, 1, 1) * (scale * _LOG2_E) - log_sum_exp)
        if masked:
            visible = _visible(slot[None, :], key_slot, end[:, None])
            weights = jnp.where(visible, weights, 0.0)
        d_value = d_value + _dot(weights.astype(gradient.dtype), gradient, 1, 0)
        d_weights = _dot(value, gradient, 1, 1)
        d_scores = weights * (d_weights - delta_ref[head, slot][None, :])
        d_key = d_key + _dot(d_scores.astype(query.dtype), query, 1, 0)
        return d_key, d_value

    zeros = jnp.zeros(key.shape, jnp.float32)
    d_key, d_value = _loops(
        body, whole * tiling.parts, (stop - first) * tiling.parts, (zeros, zeros)
    )
    d_key_ref[:, :] = (d_key * scale).astype(d_key_ref.dtype)
    d_value_ref[:, :] = d_value.astype(d_value_ref.dtype)


def _loops(body: Callable[..., Any], whole: Any, needed: Any, carry: Any) -> Any:
    """Iterations 0 to `whole` without a mask, then to `needed` with one.

    Two loops, since a condition inside a loop would keep Triton from prefetching.
    """
    carry = lax.fori_loop(0, whole, functools.partial(body, masked=False), carry)
    return lax.fori_loop(whole, needed, functools.partial(body, masked=True), carry)


def _walk(keys_ref: Any, whole: Any, needed: Any, body: Callable[..., Any], carry: Any) -> Any:
    """Loops over the listed key blocks, fully visible ones first.

    An iteration loads the next block's index: otherwise that load would take up one of Triton's
    pipeline stages, and leave one less for the tiles.
    """
    last = keys_ref.shape[0] - 1

    def step(number: Any, state: Any, *, masked: bool) -> Any:
        key_block, carry = state
        after = keys_ref[jnp.minimum(number + 1, last)]
        return after, body(key_block, carry, masked=masked)

    return _loops(step, whole, needed, (keys_ref[0], carry))[1]


def _visible(query_slot: Any, key_slot: Any, end: Any) -> Any:
    return (key_slot <= query_slot) & (query_slot <= end)


def _dot(left: Any, right: Any, left_axis: int, right_axis: int) -> Any:
    """A product over one axis of each, accumulated in float32; float32 is not rounded to tf32."""
    return lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _query_block() -> Any:
    """The query block of this program; the last see the most keys, so the longest start first."""
    return pl.num_programs(2) - 1 - pl.program_id(2)


def _rows(tiling: _Tiling) -> tuple[Any, Any]:
    """Head and slot, within the tile, of each of its rows."""
    row = jnp.arange(tiling.rows, dtype=jnp.int32)
    return lax.div(row, tiling.slots), lax.rem(row, tiling.slots)


class _QuerySpecs:
    """Grid and block specs of the kernels whose programs process one query block each.

    The grid is (query tiles across heads, rows, query blocks from the last to the first).
    """

    def __init__(self, tiling: _Tiling, query: Array) -> None:
        batch, slots, heads, width = query.shape
        count = slots // tiling.slots
        self.grid = (heads // tiling.heads, batch, count)
        self.query = pl.BlockSpec(
            (None, tiling.slots, tiling.heads, width),
            lambda tile, row, block: (row, count - 1 - block, tile, 0),
        )
        self.row_stat = pl.BlockSpec(
            (None, tiling.heads, tiling.slots),
            lambda tile, row, block: (row, tile, count - 1 - block),
        )
        self.key = pl.BlockSpec(
            (None, slots, None, width),
            lambda tile, row, block: (row, 0, lax.div(tile, tiling.parts), 0),
        )
        self.end = pl.BlockSpec((None, slots), lambda tile, row, block: (row, 0))

    def lists(self, lists: blocks.KeyLists) -> list[pl.BlockSpec]:
        """Specs of a program's own list of key blocks, and of all counts of its row."""
        _, count, keys = lists.keys.shape
        own = pl.BlockSpec((None, None, keys), lambda tile, row, block: (row, count - 1 - block, 0))
        counts = pl.BlockSpec((None, count), lambda tile, row, block: (row, 0))
        return [own, counts, counts]


def _tiles(query: Array, key: Array, value: Array) -> _Tiles:
    heads, width = query.shape[2:]
    if width > WIDEST_HEAD:
        raise ValueError(f"the head width is {width}; it must be at most {WIDEST_HEAD}")
    if heads % key.shape[2]:
        raise ValueError(
            f"there are {heads} query heads; they must be a multiple of the {key.shape[2]} "
            "key-value heads"
        )
    dtypes = sorted({str(array.dtype) for array in (query, key, value)})
    if dtypes not in (["bfloat16"], ["float32"]):
        raise ValueError(
            f"queries, keys and values are {' and '.join(dtypes)}; they must be all bfloat16 or "
            "all float32"
        )
    return _TILES[64 if width <= 64 else 128, dtypes[0]]


def _tiling(tile: _Tile, query: Array, key: Array) -> _Tiling:
    groups = query.shape[2] // key.shape[2]
    # A power of two, as Triton requires of every size, and not so large that a tile has few slots.
    heads = math.gcd(groups, tile.rows // _MIN_DOT)
    return _Tiling(
        heads=heads,
        parts=groups // heads,
        slots=tile.rows // heads,
        keys=tile.keys,
        params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    )


def _padded(tiling: _Tiling, end: Array, *arrays: Array) -> tuple[Array, ...]:
    """Arrays padded to full tiles: slots that see themselves alone, and zeros in the head width."""
    slots, width = arrays[0].shape[1], arrays[0].shape[3]
    more_slots = -slots % tiling.step
    more_width = max(_MIN_DOT, pl.next_power_of_2(width)) - width
    end = blocks.pad_end(end, slots + more_slots)
    padding = ((0, 0), (0, more_slots), (0, 0), (0, more_width))
    return end, *(jnp.pad(array, padding) for array in arrays)

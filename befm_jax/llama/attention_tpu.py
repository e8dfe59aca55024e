"""Block-sparse forest attention on TPU: one Pallas kernel forward, and one backward.

Slot `i` sees slot `j` exactly when `j <= i <= end[j]`.  XLA lists the pairs of blocks that are
needed (`befm_jax.llama.blocks`); the list is prefetched into scalar memory, and the kernels' grid
is `key heads x length of the list`, a dynamic length.  A fully masked block is thus neither fetched
nor stepped over; a fully visible one is computed without the mask.

**A grid step** takes one block of keys and values of one key head, and one block of queries of all
the query heads of its group: keys and values are read once per group, the mask is computed once per
group, and the heads' independent products let the compiler overlap one head's vector work with
another's matrix work.  Scores are in units of log 2: `exp2` takes the scale and the change of base
in one multiplication.  A softmax's sum is kept per lane and reduced once, at the end of a query
block.  Running statistics and accumulators are float32.

**Backward** is one kernel, in the order of the query blocks: five products per step, where separate
kernels for queries and for keys and values would need seven.  The gradients of a row's keys and
values stay in VMEM until the row is done, 16 bytes per slot and channel with double buffering: 16
MiB for 8,192 slots of width 128.  Longer rows are processed in spans of keys, whose gradients of
the queries are summed.

**Bottlenecks.**  Nothing here has been timed on a TPU.  The block sizes were chosen by argument and
by the instruction schedules of the programs compiled for real chips (32 query heads, 8 key heads,
width 128, bfloat16).  With blocks of 512 the matrix unit is busy in 96 % of the bundles of a
forward step on v5e and v5p, and in 98 % backward on v5e; the transcendental unit in 32 and 12 %.
Blocks of 256 cost 1.4 times as much for the same area (matrix unit 64 %: softmax bookkeeping and
pipeline latency grow relative to the products); blocks of 1,024 take 10 % fewer bundles on v6e, but
skip less, and need more VMEM than v5e's compiler grants by default.  On v6e the 256 x 256 matrix
unit is half empty at width 128, whatever the kernel; it is busy in 62 % of the forward bundles
(vector unit 68 %) and 93 % of the backward ones.  HBM bandwidth is no bottleneck: a forward step
reads 256 KiB of keys and values for 537 MFLOPs, 2,048 FLOPs per byte (backward 5,120), where these
chips balance at 170 to 560; without groups it is a quarter of that.

Neither `jax.experimental.pallas.ops.tpu.splash_attention` nor tokamax supports this mask: splash
attention takes a mask that is data only as a full boolean `[heads, N, N]`, one for all rows, and
tokamax's TPU kernel, the same splash attention, refuses per-key intervals (`Mask.q_end`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from befm_jax.llama import blocks

LANES = 128
LOG2_E = math.log2(math.e)

# Query rows per step, over the heads of a group: bounds VMEM where groups are large.
STEP_ROWS = 4096
# VMEM for the gradients of one row's keys and values, in bytes.
ROW_BYTES = 16 * 2**20
# Half of the smallest VMEM of a core (v5p and v7x have 64 MiB, v5e and v6e 128), above what
# the kernels need; the compiler's own limit (16 MiB on v5e) is lower than a long row takes.
VMEM_BYTES = 32 * 2**20

# Finite, so that a query without a visible key so far gives no NaN: its sums are multiplied by
# zero at its first visible key, and every slot sees itself.
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)

# `left @ right.T` and `left @ right`.
_TRANSPOSED = (((1,), (1,)), ((), ()))
_PLAIN = (((1,), (0,)), ((), ()))


def forward(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int32[Array, "B N"],
    *,
    block: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B N H h"], Float32[Array, "B H N"]]:
    """Attention over a forest, and the log-sum-exp of each query's scores.

    `query` is unscaled, `h ** -0.5` is applied here; query head `n` attends with key head
    `n // (H // K)`.  The output has the dtype of `query`; float32 inputs are multiplied as
    float32.  Any `N` and `h`.  Differentiable only delta `backward`.

    `block`: slots per block, a multiple of 128 (default: by dtype and group size).
    `interpret`: run on any backend, slowly and exactly, for tests.

    Under a mesh call it inside `jax.shard_map`; rows and groups are not split over devices.

    Raises:
        ValueError: the dtype is neither bfloat16 nor float32, or `block` isn't a multiple of 128.
    """
    shape = _shape(query, key, block)
    ends = _ends(end, shape)
    pairs = blocks.pairs(ends[:, 0], shape.block, shape.block)
    rows = (shape.groups, shape.block)
    output, log_sum_exp = pl.pallas_call(
        functools.partial(_forward_kernel, scale=shape.scale * LOG2_E),
        out_shape=(
            jax.ShapeDtypeStruct(shape.grouped, query.dtype),
            jax.ShapeDtypeStruct(shape.grouped[:-1], jnp.float32),
        ),
        name="forest_attention_forward",
        interpret=interpret,
        **_walk(
            work := blocks.by_query(pairs, shape.steps(0, shape.blocks)),
            shape,
            inputs=(_queries(shape), _keys(shape), _keys(shape), _key_ends(shape)),
            outputs=(_queries(shape), _row_stats(shape)),
            scratch=(
                pltpu.VMEM((*rows, shape.width), jnp.float32),
                pltpu.VMEM((*rows, LANES), jnp.float32),
                pltpu.VMEM((*rows, LANES), jnp.float32),
            ),
        ),
    )(*work[:4], _by_group(query, shape), _by_head(key, shape), _by_head(value, shape), ends)
    log_sum_exp = log_sum_exp.reshape(shape.rows, -1, shape.padded)[:, :, : shape.slots]
    return _from_groups(output, shape), log_sum_exp


def backward(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int32[Array, "B N"],
    output: Float[Array, "B N H h"],
    log_sum_exp: Float32[Array, "B H N"],
    gradient: Float[Array, "B N H h"],
    *,
    block: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B N H h"], Float[Array, "B N K h"], Float[Array, "B N K h"]]:
    """Gradients of `forward`'s output with respect to query, key and value, in their dtypes.

    `output` and `log_sum_exp` are the results of `forward`, `gradient` is the gradient of `output`;
    softmax weights are recomputed.  Options and errors are those of `forward`.
    """
    shape = _shape(query, key, block)
    ends = _ends(end, shape)
    all_pairs = blocks.pairs(ends[:, 0], shape.block, shape.block)
    query_inputs = (
        _by_group(gradient.astype(query.dtype), shape),
        _by_group(output, shape),
        # Padding queries may have any finite log-sum-exp: their gradient is zero.
        _by_group_row_stats(log_sum_exp * LOG2_E, shape),
    )
    grouped, keys, values = _by_group(query, shape), _by_head(key, shape), _by_head(value, shape)
    spans = [
        (first, min(first + shape.span_blocks, shape.blocks))
        for first in range(0, shape.blocks, shape.span_blocks)
    ]
    d_queries, d_keys, d_values = [], [], []
    for first, last in spans:
        slots = slice(first * shape.block, last * shape.block)
        pairs = blocks.Pairs(*(mask[:, :, first:last] for mask in all_pairs))
        d_query, d_key, d_value = pl.pallas_call(
            functools.partial(
                _backward_kernel,
                scale=shape.scale,
                first_block=first,
            ),
            out_shape=(
                jax.ShapeDtypeStruct(
                    shape.grouped, query.dtype if len(spans) == 1 else jnp.float32
                ),
                jax.ShapeDtypeStruct(keys[:, :, slots].shape, jnp.float32),
                jax.ShapeDtypeStruct(keys[:, :, slots].shape, jnp.float32),
            ),
            name="forest_attention_backward",
            interpret=interpret,
            **_walk(
                work := blocks.by_query(pairs, shape.steps(first, last)),
                shape,
                inputs=(
                    _queries(shape),
                    _keys(shape),
                    _keys(shape),
                    _key_ends(shape),
                    _queries(shape),
                    _queries(shape),
                    _row_stats(shape),
                ),
                outputs=(
                    _queries(shape),
                    _whole_row(shape, last - first),
                    _whole_row(shape, last - first),
                ),
                scratch=(
                    pltpu.VMEM((shape.groups, shape.block, shape.width), jnp.float32),
                    pltpu.VMEM((shape.groups, shape.block), jnp.float32),
                ),
            ),
        )(
            *work[:4],
            grouped,
            keys[:, :, slots],
            values[:, :, slots],
            ends[:, :, slots],
            *query_inputs,
        )
        if len(spans) > 1:
            # Query blocks that see no key of the span were not written.
            written = jnp.repeat(pairs.needed.any(axis=2), shape.block, axis=1)
            d_query = jnp.where(written[:, None, None, :, None], d_query, 0)
        d_queries.append(d_query)
        d_keys.append((d_key * shape.scale).astype(key.dtype))
        d_values.append(d_value.astype(value.dtype))
    return (
        _from_groups(sum(d_queries[1:], d_queries[0]).astype(query.dtype), shape),
        _from_heads(jnp.concatenate(d_keys, axis=2), shape),
        _from_heads(jnp.concatenate(d_values, axis=2), shape),
    )


class _Shape(NamedTuple):
    rows: int
    slots: int
    heads: int
    groups: int
    width: int
    block: int

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.slots, self.block)

    @property
    def padded(self) -> int:
        return self.blocks * self.block

    @property
    def grouped(self) -> tuple[int, ...]:
        return self.rows, self.heads, self.groups, self.padded, self.width

    @property
    def scale(self) -> float:
        return self.width**-0.5

    @property
    def span_blocks(self) -> int:
        # Keys and values, each double-buffered in float32.
        slot_bytes = 16 * pl.cdiv(self.width, LANES) * LANES
        return max(1, ROW_BYTES // slot_bytes // self.block)

    def steps(self, first: int, last: int) -> int:
        """The most steps that the key blocks from `first` to before `last` can take."""
        return self.rows * sum(self.blocks - at for at in range(first, last))


def _shape(query: Array, key: Array, block: int | None) -> _Shape:
    rows, slots, heads, width = query.shape
    groups = heads // key.shape[2]
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"the dtype of query is {query.dtype}; it must be bfloat16 or float32")
    if block is None:
        # float32 is multiplied in six passes: a quarter of the area is enough work for a step.
        block = 512 if query.dtype == jnp.bfloat16 else 256
        block = max(LANES, min(block, STEP_ROWS // groups // LANES * LANES))
    if block < LANES or block % LANES:
        raise ValueError(f"block is {block}; it must be a multiple of {LANES} slots")
    # Keep the number of blocks, and shrink them to the least size that covers the slots.
    needed = pl.cdiv(slots, pl.cdiv(slots, block))
    block = pl.cdiv(needed, LANES) * LANES
    return _Shape(rows, slots, key.shape[2], groups, width, block)


def _pad_slots(x: Array, shape: _Shape, axis: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, shape.padded - shape.slots)
    return jnp.pad(x, widths)


def _by_group(x: Float[Array, "B N H h"], shape: _Shape) -> Float[Array, "B K G M h"]:
    x = _pad_slots(x, shape, 1)
    x = x.reshape(shape.rows, shape.padded, shape.heads, shape.groups, shape.width)
    return x.transpose(0, 2, 3, 1, 4)


def _from_groups(x: Float[Array, "B K G M h"], shape: _Shape) -> Float[Array, "B N H h"]:
    x = x.transpose(0, 3, 1, 2, 4)[:, : shape.slots]
    return x.reshape(shape.rows, shape.slots, -1, shape.width)


def _by_head(x: Float[Array, "B N K h"], shape: _Shape) -> Float[Array, "B K M h"]:
    return _pad_slots(x, shape, 1).swapaxes(1, 2)


def _from_heads(x: Float[Array, "B K M h"], shape: _Shape) -> Float[Array, "B N K h"]:
    return x.swapaxes(1, 2)[:, : shape.slots]


def _by_group_row_stats(x: Float32[Array, "B H N"], shape: _Shape) -> Float32[Array, "B K G M"]:
    x = _pad_slots(x, shape, 2)
    return x.reshape(shape.grouped[:-1])


def _ends(end: Int32[Array, "B N"], shape: _Shape) -> Int32[Array, "B 1 M"]:
    return blocks.pad_end(end.astype(jnp.int32), shape.padded)[:, None, :]


# Index maps take the grid indices, then the prefetched work lists.
def _queries(shape: _Shape) -> pl.BlockSpec:
    return pl.BlockSpec(
        (None, None, shape.groups, shape.block, shape.width),
        lambda head, step, row, query, key, marks: (row[step], head, 0, query[step], 0),
    )


def _row_stats(shape: _Shape) -> pl.BlockSpec:
    return pl.BlockSpec(
        (None, None, shape.groups, shape.block),
        lambda head, step, row, query, key, marks: (row[step], head, 0, query[step]),
    )


def _keys(shape: _Shape) -> pl.BlockSpec:
    return pl.BlockSpec(
        (None, None, shape.block, shape.width),
        lambda head, step, row, query, key, marks: (row[step], head, key[step], 0),
    )


def _whole_row(shape: _Shape, span_blocks: int) -> pl.BlockSpec:
    return pl.BlockSpec(
        (None, None, span_blocks * shape.block, shape.width),
        lambda head, step, row, query, key, marks: (row[step], head, 0, 0),
    )


def _key_ends(shape: _Shape) -> pl.BlockSpec:
    return pl.BlockSpec(
        (None, 1, shape.block),
        lambda head, step, row, query, key, marks: (row[step], 0, key[step]),
    )


def _walk(
    work: blocks.Work,
    shape: _Shape,
    *,
    inputs: Sequence[pl.BlockSpec],
    outputs: Sequence[pl.BlockSpec],
    scratch: Sequence[Any],
) -> dict[str, Any]:
    """Arguments of a `pallas_call` that runs the listed work, once for every key head."""
    return {
        "grid_spec": pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(shape.heads, work.steps),
            in_specs=inputs,
            out_specs=outputs,
            scratch_shapes=scratch,
        ),
        # Heads may be split over two cores of a chip (v5p); steps accumulate, so they keep order.
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
    }


def _dot(left: Array, right: Array, dimensions: tuple) -> Array:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left, right, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _across(column: Array, width: int) -> Array:
    """A column broadcast over the lanes, `[S, LANES]`, as `[S, width]`."""
    return jnp.tile(column, (1, pl.cdiv(width, LANES)))[:, :width]


def _row(column: Array) -> Array:
    """A column, one lane wide or broadcast over the lanes, as a row `[1, S]`."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _either_way(whole: Array, step: Callable[[bool], None]) -> None:
    """`step(False)`, without the mask, where a block is fully visible; else `step(True)`."""
    pl.when(whole)(functools.partial(step, False))
    pl.when(jnp.logical_not(whole))(functools.partial(step, True))


def _forward_kernel(
    row: Any,
    query_block: Any,
    key_block: Any,
    marks: Any,
    q: Any,
    k: Any,
    v: Any,
    end: Any,
    output: Any,
    log_sum_exp: Any,
    accumulator: Any,
    row_max: Any,
    row_sum: Any,
    *,
    scale: float,
) -> None:
    step = pl.program_id(1)
    mark = marks[step]
    groups, queries, width = q.shape
    keys = k.shape[0]

    @pl.when(mark & blocks.FIRST != 0)
    def start() -> None:
        accumulator[...] = jnp.zeros_like(accumulator)
        row_max[...] = jnp.full_like(row_max, HIDDEN)
        row_sum[...] = jnp.zeros_like(row_sum)

    def add(masked: bool) -> None:
        if masked:
            tile = (queries, keys)
            query_slot = query_block[step] * queries + jax.lax.broadcasted_iota(jnp.int32, tile, 0)
            key_slot = key_block[step] * keys + jax.lax.broadcasted_iota(jnp.int32, tile, 1)
            visible = (key_slot <= query_slot) & (query_slot <= end[...])
        for group in range(groups):
            scores = _dot(q[group], k[...], _TRANSPOSED) * scale
            if masked:
                scores = jnp.where(visible, scores, HIDDEN)
            old_max = row_max[group]
            new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
            rescale = jnp.exp2(old_max - new_max)
            weights = jnp.exp2(scores - _across(new_max, keys))
            by_lane = sum(weights[:, at : at + LANES] for at in range(0, keys, LANES))
            row_max[group] = new_max
            row_sum[group] = row_sum[group] * rescale + by_lane
            update = _dot(weights.astype(v.dtype), v[...], _PLAIN)
            accumulator[group] = accumulator[group] * _across(rescale, width) + update

    _either_way(mark & blocks.WHOLE != 0, add)

    @pl.when(mark & blocks.LAST != 0)
    def finish() -> None:
        for group in range(groups):
            denominator = jnp.sum(row_sum[group], axis=1, keepdims=True)
            output[group] = (accumulator[group] / denominator).astype(output.dtype)
            log_total = (row_max[group] + jnp.log2(denominator)) / LOG2_E
            log_sum_exp[pl.ds(group, 1), :] = _row(log_total)


def _backward_kernel(
    row: Any,
    query_block: Any,
    key_block: Any,
    marks: Any,
    q: Any,
    k: Any,
    v: Any,
    end: Any,
    d_output: Any,
    output: Any,
    log_total: Any,
    d_query: Any,
    d_key: Any,
    d_value: Any,
    accumulator: Any,
    delta: Any,
    *,
    scale: float,
    first_block: int,
) -> None:
    """Accumulates all gradients.

    Tiles have keys in rows and queries in lanes: only one of five operands is transposed.
    """
    step = pl.program_id(1)
    mark = marks[step]
    groups, queries, _ = q.shape
    keys = k.shape[0]
    key_start = (key_block[step] + first_block) * keys
    key_slice = pl.ds(pl.multiple_of(key_block[step] * keys, keys), keys)

    @pl.when(mark & blocks.FIRST != 0)
    def start() -> None:
        accumulator[...] = jnp.zeros_like(accumulator)
        for group in range(groups):
            products = d_output[group].astype(jnp.float32) * output[group].astype(jnp.float32)
            delta[pl.ds(group, 1), :] = _row(jnp.sum(products, axis=1, keepdims=True))

    # The first query block that sees a key block is its own.
    @pl.when(query_block[step] == key_block[step] + first_block)
    def open_keys() -> None:
        d_key[key_slice, :] = jnp.zeros((keys, k.shape[1]), jnp.float32)
        d_value[key_slice, :] = jnp.zeros((keys, v.shape[1]), jnp.float32)

    def add(masked: bool) -> None:
        if masked:
            tile = (keys, queries)
            key_slot = key_start + jax.lax.broadcasted_iota(jnp.int32, tile, 0)
            query_slot = query_block[step] * queries + jax.lax.broadcasted_iota(jnp.int32, tile, 1)
            end_column = jnp.broadcast_to(end[...], (LANES, keys)).T
            visible = (key_slot <= query_slot) & (query_slot <= _across(end_column, queries))
        for group in range(groups):
            scores = _dot(k[...], q[group], _TRANSPOSED) * (scale * LOG2_E)
            if masked:
                scores = jnp.where(visible, scores, HIDDEN)
            weights = jnp.exp2(scores - log_total[pl.ds(group, 1), :])
            d_value[key_slice, :] += _dot(weights.astype(v.dtype), d_output[group], _PLAIN)
            d_weights = _dot(v[...], d_output[group], _TRANSPOSED)
            d_scores = (weights * (d_weights - delta[pl.ds(group, 1), :])).astype(k.dtype)
            d_key[key_slice, :] += _dot(d_scores, q[group], _PLAIN)
            accumulator[group] += _dot(d_scores.T, k[...], _PLAIN)

    _either_way(mark & blocks.WHOLE != 0, add)

    @pl.when(mark & blocks.LAST != 0)
    def finish() -> None:
        d_query[...] = (accumulator[...] * scale).astype(d_query.dtype)

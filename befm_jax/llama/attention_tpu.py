"""Forest attention for TPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from befm_jax.llama import blocks

LANES = 128
BLOCK = 512
LOG2_E = math.log2(math.e)
# Finite, so that a row of which nothing was seen so far gives no NaN: what it adds up is
# multiplied by zero as soon as the row's own slot, which it always sees, comes by.
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)

_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))


def forward(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int32[Array, "B N"],
    *,
    block: int = BLOCK,
    interpret: Any = False,
) -> tuple[Float[Array, "B N H h"], Float32[Array, "B H N"]]:
    shape = _shape(query, key, block)
    q, k, v, ends = _grouped(query, shape), _keyed(key, shape), _keyed(value, shape), _ends(end, shape)
    work = blocks.by_query(blocks.pairs(ends[:, 0], shape.block, shape.block), shape.steps)
    at = _Specs(shape, query_is_outer=True)
    mixed, log_sum_exp = _call(
        functools.partial(_forward_kernel, scale=_base2(shape)),
        "forest_attention_forward",
        work,
        shape,
        (at.queries(), at.keys(), at.keys(), at.ends()),
        (at.queries(), at.figures()),
        (
            jax.ShapeDtypeStruct(q.shape, query.dtype),
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        ),
        (
            pltpu.VMEM((shape.groups, shape.block, shape.width), jnp.float32),
            pltpu.VMEM((shape.groups, shape.block, LANES), jnp.float32),
            pltpu.VMEM((shape.groups, shape.block, LANES), jnp.float32),
        ),
        interpret,
    )(q, k, v, ends)
    log_sum_exp = log_sum_exp.reshape(shape.rows, -1, shape.padded)[:, :, : shape.slots]
    return _ungrouped(mixed, shape), log_sum_exp


def backward(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int32[Array, "B N"],
    mixed: Float[Array, "B N H h"],
    log_sum_exp: Float32[Array, "B H N"],
    gradient: Float[Array, "B N H h"],
    *,
    block: int = BLOCK,
    interpret: Any = False,
) -> tuple[Float[Array, "B N H h"], Float[Array, "B N K h"], Float[Array, "B N K h"]]:
    shape = _shape(query, key, block)
    q, k, v, ends = _grouped(query, shape), _keyed(key, shape), _keyed(value, shape), _ends(end, shape)
    d_mixed = _grouped(gradient.astype(query.dtype), shape)
    through = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)
    through = _figures(through.swapaxes(1, 2), shape)
    # Queries of padding: any finite figure does, their gradient is zero.
    normaliser = _figures(log_sum_exp * LOG2_E, shape)
    found = blocks.pairs(ends[:, 0], shape.block, shape.block)
    operands = (q, k, v, ends, d_mixed, normaliser, through)

    at = _Specs(shape, query_is_outer=True)
    (d_query,) = _call(
        functools.partial(_d_query_kernel, scale=_base2(shape)),
        "forest_attention_d_query",
        blocks.by_query(found, shape.steps),
        shape,
        (
            at.queries(),
            at.keys(),
            at.keys(),
            at.ends(),
            at.queries(),
            at.figures(),
            at.figures(),
        ),
        (at.queries(),),
        (jax.ShapeDtypeStruct(q.shape, query.dtype),),
        (
            pltpu.VMEM((shape.groups, shape.block, shape.width), jnp.float32),
            pltpu.VMEM((shape.groups, shape.block, LANES), jnp.float32),
            pltpu.VMEM((shape.groups, shape.block, LANES), jnp.float32),
        ),
        interpret,
    )(*operands)

    at = _Specs(shape, query_is_outer=False)
    d_key, d_value = _call(
        functools.partial(_d_key_kernel, scale=_base2(shape)),
        "forest_attention_d_key_value",
        blocks.by_key(found, shape.steps),
        shape,
        (
            at.queries(),
            at.keys(),
            at.keys(),
            at.ends(),
            at.queries(),
            at.figures(),
            at.figures(),
        ),
        (at.keys(), at.keys()),
        (
            jax.ShapeDtypeStruct(k.shape, key.dtype),
            jax.ShapeDtypeStruct(v.shape, value.dtype),
        ),
        (
            pltpu.VMEM((shape.block, shape.width), jnp.float32),
            pltpu.VMEM((shape.block, shape.width), jnp.float32),
            pltpu.VMEM((shape.block, LANES), jnp.int32),
        ),
        interpret,
    )(*operands)
    return _ungrouped(d_query, shape), _unkeyed(d_key, shape), _unkeyed(d_value, shape)


class _Shape(NamedTuple):
    rows: int
    slots: int
    padded: int
    heads: int
    groups: int
    width: int
    block: int

    @property
    def steps(self) -> int:
        return blocks.most_pairs(self.rows, self.padded, self.block, self.block)


def _shape(query, key, block: int) -> _Shape:
    rows, slots, heads, width = query.shape
    of = -(-slots // block)
    block = -(-slots // of // LANES) * LANES
    groups = heads // key.shape[2]
    return _Shape(rows, slots, of * block, key.shape[2], groups, width, block)


def _base2(shape: _Shape) -> float:
    return shape.width**-0.5 * LOG2_E


def _grouped(x, shape: _Shape):
    x = jnp.pad(x, ((0, 0), (0, shape.padded - shape.slots), (0, 0), (0, 0)))
    x = x.reshape(shape.rows, shape.padded, shape.heads, shape.groups, shape.width)
    return x.transpose(0, 2, 3, 1, 4)


def _ungrouped(x, shape: _Shape):
    x = x.transpose(0, 3, 1, 2, 4)[:, : shape.slots]
    return x.reshape(shape.rows, shape.slots, -1, shape.width)


def _keyed(x, shape: _Shape):
    x = jnp.pad(x, ((0, 0), (0, shape.padded - shape.slots), (0, 0), (0, 0)))
    return x.swapaxes(1, 2)


def _unkeyed(x, shape: _Shape):
    return x.swapaxes(1, 2)[:, : shape.slots]


def _figures(x, shape: _Shape):
    x = jnp.pad(x, ((0, 0), (0, 0), (0, shape.padded - shape.slots)))
    return x.reshape(shape.rows, shape.heads, shape.groups, shape.padded)


def _ends(end, shape: _Shape):
    return blocks.pad_end(end, shape.padded)[:, None, :]


class _Specs:
    def __init__(self, shape: _Shape, *, query_is_outer: bool):
        self.shape, self.query_is_outer = shape, query_is_outer

    def queries(self) -> pl.BlockSpec:
        shape = self.shape

        def index(head, step, row, outer, inner, marks):
            return row[step], head, 0, (outer if self.query_is_outer else inner)[step], 0

        return pl.BlockSpec((None, None, shape.groups, shape.block, shape.width), index)

    def figures(self) -> pl.BlockSpec:
        shape = self.shape

        def index(head, step, row, outer, inner, marks):
            return row[step], head, 0, (outer if self.query_is_outer else inner)[step]

        return pl.BlockSpec((None, None, shape.groups, shape.block), index)

    def keys(self) -> pl.BlockSpec:
        shape = self.shape

        def index(head, step, row, outer, inner, marks):
            return row[step], head, (inner if self.query_is_outer else outer)[step], 0

        return pl.BlockSpec((None, None, shape.block, shape.width), index)

    def ends(self) -> pl.BlockSpec:
        def index(head, step, row, outer, inner, marks):
            return row[step], 0, (inner if self.query_is_outer else outer)[step]

        return pl.BlockSpec((None, 1, self.shape.block), index)


def _call(kernel, name, work: blocks.Work, shape: _Shape, inputs, outputs, results, scratch, interpret):
    def run(*operands):
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=4,
                grid=(shape.heads, work.count),
                in_specs=inputs,
                out_specs=outputs,
                scratch_shapes=scratch,
            ),
            out_shape=results,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
            ),
            name=name,
            interpret=interpret,
        )(work.row, work.outer, work.inner, work.marks, *operands)

    return run


def _dot(left, right, dimensions):
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left, right, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _column(row):
    """A row of figures `[1, S]` as a column, repeated over the lanes: `[S, LANES]`."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _tile(column, width: int):
    return jnp.tile(column, (1, width // LANES)) if width >= LANES else column[:, :width]


def _either_way(whole, step: Callable[[bool], None]) -> None:
    pl.when(whole)(functools.partial(step, False))
    pl.when(jnp.logical_not(whole))(functools.partial(step, True))


def _forward_kernel(
    row, outer, inner, marks, q, k, v, end, mixed, log_sum_exp, sums, greatest, total, *, scale
):
    step = pl.program_id(1)
    mark = marks[step]
    groups, queries, width = q.shape
    keys = k.shape[0]

    @pl.when(mark & blocks.FIRST != 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        greatest[...] = jnp.full_like(greatest, HIDDEN)
        total[...] = jnp.zeros_like(total)

    def add(masked: bool):
        if masked:
            shape = (queries, keys)
            query_slot = outer[step] * queries + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            key_slot = inner[step] * keys + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            visible = (key_slot <= query_slot) & (query_slot <= end[...])
        for group in range(groups):
            scores = _dot(q[group], k[...], _NT) * scale
            if masked:
                scores = jnp.where(visible, scores, HIDDEN)
            before = greatest[group]
            now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            shrink = jnp.exp2(before - now)
            weights = jnp.exp2(scores - _tile(now, keys))
            greatest[group] = now
            by_lane = sum(weights[:, at : at + LANES] for at in range(0, keys, LANES))
            total[group] = total[group] * shrink + by_lane
            mixed_now = _dot(weights.astype(v.dtype), v[...], _NN)
            sums[group] = sums[group] * _tile(shrink, width) + mixed_now

    _either_way(mark & blocks.WHOLE != 0, add)

    @pl.when(mark & blocks.LAST != 0)
    def _():
        for group in range(groups):
            summed = jnp.sum(total[group], axis=1, keepdims=True)
            mixed[group] = (sums[group] / summed).astype(mixed.dtype)
            figure = (greatest[group] + jnp.log2(summed)) * (1 / LOG2_E)
            log_sum_exp[pl.ds(group, 1), :] = figure.T[:1]


def _d_query_kernel(
    row,
    outer,
    inner,
    marks,
    q,
    k,
    v,
    end,
    d_mixed,
    normaliser,
    through,
    d_query,
    sums,
    normalisers,
    throughs,
    *,
    scale,
):
    step = pl.program_id(1)
    mark = marks[step]
    groups, queries, _ = q.shape
    keys = k.shape[0]

    @pl.when(mark & blocks.FIRST != 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        for group in range(groups):
            normalisers[group] = _column(normaliser[pl.ds(group, 1), :])
            throughs[group] = _column(through[pl.ds(group, 1), :])

    def add(masked: bool):
        if masked:
            shape = (queries, keys)
            query_slot = outer[step] * queries + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            key_slot = inner[step] * keys + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            visible = (key_slot <= query_slot) & (query_slot <= end[...])
        for group in range(groups):
            scores = _dot(q[group], k[...], _NT) * scale
            if masked:
                scores = jnp.where(visible, scores, HIDDEN)
            weights = jnp.exp2(scores - _tile(normalisers[group], keys))
            d_weights = _dot(d_mixed[group], v[...], _NT)
            d_scores = weights * (d_weights - _tile(throughs[group], keys))
            sums[group] += _dot(d_scores.astype(k.dtype), k[...], _NN)

    _either_way(mark & blocks.WHOLE != 0, add)

    @pl.when(mark & blocks.LAST != 0)
    def _():
        d_query[...] = (sums[...] * (scale / LOG2_E)).astype(d_query.dtype)


def _d_key_kernel(
    row,
    outer,
    inner,
    marks,
    q,
    k,
    v,
    end,
    d_mixed,
    normaliser,
    through,
    d_key,
    d_value,
    key_sums,
    value_sums,
    ends,
    *,
    scale,
):
    step = pl.program_id(1)
    mark = marks[step]
    groups, queries, _ = q.shape
    keys = k.shape[0]

    @pl.when(mark & blocks.FIRST != 0)
    def _():
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)
        ends[...] = _column(end[...])

    def add(masked: bool):
        if masked:
            shape = (keys, queries)
            key_slot = outer[step] * keys + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            query_slot = inner[step] * queries + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            visible = (key_slot <= query_slot) & (query_slot <= _tile(ends[...], queries))
        for group in range(groups):
            scores = _dot(k[...], q[group], _NT) * scale
            if masked:
                scores = jnp.where(visible, scores, HIDDEN)
            weights = jnp.exp2(scores - normaliser[pl.ds(group, 1), :])
            value_sums[...] += _dot(weights.astype(d_mixed.dtype), d_mixed[group], _NN)
            d_weights = _dot(v[...], d_mixed[group], _NT)
            d_scores = weights * (d_weights - through[pl.ds(group, 1), :])
            key_sums[...] += _dot(d_scores.astype(q.dtype), q[group], _NN)

    _either_way(mark & blocks.WHOLE != 0, add)

    @pl.when(mark & blocks.LAST != 0)
    def _():
        d_key[...] = (key_sums[...] * (scale / LOG2_E)).astype(d_key.dtype)
        d_value[...] = value_sums[...].astype(d_value.dtype)

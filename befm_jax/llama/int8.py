"""Int8 weight-only quantisation, one scale per output channel (LLM.int8(): arXiv 2208.07339, 2.1).

    params = int8.quantize(params)                      # or llama.load(..., quantize="int8")
    params = lora.attach(params, adapter)               # the adapter stays float32

Products are taken in the dtype of the activations.  Embeddings, the vocabulary projection and the
norms are not quantised.

A weight is dequantised within the product, not before it.  In XLA's optimised programs (jax 0.10.2)
at the shape of Llama 3.1 8B, for a LoRA step of 2,048 slots (v5e: 512) and for decoding 256
participants:

- TPU (v5e, v5p): the conversion is fused into every product; no wide copy in either program.
- GPU (H100, without autotuning): likewise, except in the backward pass: the weights of the query,
  key and value projections, which XLA merges into one product, are converted before it, a layer's
  50 MB at a time.
- CPU: XLA's products do not fuse with a conversion, so that it writes the wide weight to memory and
  reads it back, at every token.  For decoding, the weight is therefore converted in blocks of rows
  that fit a cache: a [14336, 4096] takes 1.2 times as long as in float32 at one row and 0.8 times
  at 16, where the full conversion takes 14 and 3.5 times.  For many rows, and where it is sharded,
  it is converted at once (0.23 GB for that one): at 512 rows that takes 1.3 times as long (1.05
  in blocks), a [4096, 14336] 1.3 times (1.4 in blocks).

The backward pass converts again, by a custom VJP.  JAX's own differentiation would keep the wide
weights of all layers as residuals wherever layers are not rematerialised.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from befm_jax.llama.config import LINEARS
from befm_jax.llama.linear import dot
from befm_jax.llama.model import Params

_LARGEST = 127.0
# Weights that a CPU converts at a time: 4 MB of float32, which fit a cache.
_BLOCK = 1 << 20
# From this many rows on the product dominates, and both ways are within a third of each other.
_MANY_ROWS = 256


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclass
class Int8Kernel:
    """A weight `[out, in]` as `values * scale[out]`; stacked layers have a leading axis `L`.

    `values` stays the first field: flax checks the shape of the first leaf alone.
    """

    values: Int8[Array, "*L F D"]
    scale: Float[Array, "*L F"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the represented weight."""
        return self.values.shape

    def project(self, x: Float[Array, "... D"], cut: bool = False) -> Float[Array, "... F"]:
        """`x` times the transposed weight, scaled after the product in float32; dtype of `x`.

        `cut`: whether the weight is sharded.
        """
        rows = x.reshape(-1, x.shape[-1])
        # A loop over blocks of a sharded weight would have a collective per iteration, and the
        # loops of several weights run concurrently (see `linear.after`).
        in_blocks = len(rows) < _MANY_ROWS and self.values.size > _BLOCK and not cut
        y = _product(rows, self.values, in_blocks)
        y = (y.astype(jnp.float32) * self.scale[None, :]).astype(x.dtype)
        return y.reshape(*x.shape[:-1], -1)

    def dense(self) -> Float[Array, "*L F D"]:
        """The dequantised weight, float32."""
        return self.values.astype(jnp.float32) * self.scale[..., None]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(
    x: Float[Array, "T D"], values: Int8[Array, "F D"], in_blocks: bool
) -> Float[Array, "T F"]:
    """`x` times transposed integers, in the dtype of `x`; differentiable in `x` alone.

    `in_blocks`: whether CPUs convert `values` in blocks of rows.
    """
    if in_blocks:
        return jax.lax.platform_dependent(x, values, cpu=_by_blocks, default=dot)
    return dot(x, values)


def _product_forward(x: Array, values: Array, in_blocks: bool) -> tuple[Array, Array]:
    return _product(x, values, in_blocks), values


def _product_backward(in_blocks: bool, values: Array, gradient: Array) -> tuple[Array, None]:
    del in_blocks
    return dot(gradient, values.T), None


_product.defvjp(_product_forward, _product_backward)


def _by_blocks(x: Float[Array, "T D"], values: Int8[Array, "F D"]) -> Float[Array, "T F"]:
    """`x` times transposed `values`, which are converted in blocks of rows."""
    height = max(1, _BLOCK // values.shape[1])
    blocks, rest = divmod(len(values), height)

    def add(number: Array, y: Array) -> Array:
        block = jax.lax.dynamic_slice_in_dim(values, number * height, height)
        return jax.lax.dynamic_update_slice_in_dim(y, dot(x, block), number * height, axis=1)

    empty = jnp.zeros((len(x), len(values)), x.dtype)
    y: Array = jax.lax.fori_loop(0, blocks, add, empty)
    return y.at[:, -rest:].set(dot(x, values[-rest:])) if rest else y


def quantize_matrix(weight: Float[Array, "*L F D"]) -> Int8Kernel:
    """A weight quantised per output channel to 255 even steps between plus and minus its maximum.

    The error of an entry is at most half a step: `max(abs(row)) / 254`.
    """
    wide = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    # NaN and infinities stay in the scale: as integers they would be ordinary numbers.
    scale = jnp.where(largest == 0, 1.0, largest / _LARGEST)
    return Int8Kernel(jnp.round(wide / scale[..., None]).astype(jnp.int8), scale)


def is_quantized(path: tuple[str, ...]) -> bool:
    """Whether `quantize` quantises the parameter at a path: the weight of a layer's linear."""
    return path[-1] == "weight" and path[-2] in LINEARS


def quantize(params: Params) -> Params:
    """The parameter tree with an `Int8Kernel` for the weight of every layer's linear."""
    flat: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(params)
    for path, leaf in flat.items():
        if is_quantized(path):
            flat[path] = quantize_matrix(leaf)
    tree: Params = flax.traverse_util.unflatten_dict(flat)
    return tree

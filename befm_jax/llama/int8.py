"""Weights in eight bits, one scale for each output channel (LLM.int8(): arXiv 2208.07339, 2.1).

    params = int8.quantize(params)                      # or llama.load(..., quantize="int8")
    params = lora.attach(params, adapter)               # the adapter stays float32

Only weights are rounded: products are taken in the dtype of the activations.  Embeddings, the
vocabulary projection and the norms stay as they are.
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
        """That of the weight which this stands for."""
        return self.values.shape

    def project(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """`x` times the transposed weight, scaled after the product; in the dtype of `x`."""
        y = dot(x, self.values)
        return y * self.scale.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

    def dense(self) -> Float[Array, "*L F D"]:
        """The rounded weight, float32."""
        return self.values.astype(jnp.float32) * self.scale[..., None]


def quantize_matrix(weight: Float[Array, "*L F D"]) -> Int8Kernel:
    """Rounds each output channel to 255 even steps between minus and plus its largest entry.

    The error of an entry is at most half a step: `max(abs(row)) / 254`.
    """
    wide = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)
    return Int8Kernel(jnp.round(wide / scale[..., None]).astype(jnp.int8), scale)


def is_quantized(path: tuple[str, ...]) -> bool:
    """Whether the parameter at a path is one that `quantize` rounds: a layer's linear."""
    return path[-1] == "weight" and path[-2] in LINEARS


def quantize(params: Params) -> Params:
    """The parameter tree with an `Int8Kernel` for the weight of every layer's linear."""
    flat: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(params)
    for path, leaf in flat.items():
        if is_quantized(path):
            flat[path] = quantize_matrix(leaf)
    tree: Params = flax.traverse_util.unflatten_dict(flat)
    return tree

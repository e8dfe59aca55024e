"""Attention over token forests: one mask rule, and the kernel for each platform.

Slot `i` attends to slot `j` exactly when `j <= i <= end[j]`: to itself and its ancestors.  Causal
masks, unrelated texts packed in one row and trees are all of that form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
from jaxtyping import Array, Float, Int

from befm_jax.llama import attention_cpu, attention_gpu, attention_tpu
from befm_jax.llama.linear import ShardingRules

_Residuals = tuple[Array, ...]


@jax.custom_vjp
def forest_attention(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int[Array, "B N"],
) -> Float[Array, "B N H h"]:
    """Grouped-query attention of rotated heads; softmax in float32, output in `query`'s dtype.

    Each kernel skips the key blocks that no query of a block attends to; no `[N, N]` array exists.
    The kernel is selected when the program is lowered for a platform; a platform without one is an
    error.  All kernels are traced, so that inputs which one of them rejects (float16, heads wider
    than 128) are rejected everywhere.
    """
    return _forward(query, key, value, end)[0]


def _forward(query: Array, key: Array, value: Array, end: Array) -> tuple[Array, Array]:
    output_and_lse: tuple[Array, Array] = jax.lax.platform_dependent(
        query,
        key,
        value,
        end,
        cpu=attention_cpu.forward,
        cuda=attention_gpu.forward,
        tpu=attention_tpu.forward,
    )
    return output_and_lse


def _forward_with_residuals(
    query: Array, key: Array, value: Array, end: Array
) -> tuple[Array, _Residuals]:
    output, log_sum_exp = _forward(query, key, value, end)
    return output, (query, key, value, end, output, log_sum_exp)


def _backward(residuals: _Residuals, gradient: Array) -> tuple[Array, Array, Array, None]:
    gradients: tuple[Array, Array, Array] = jax.lax.platform_dependent(
        *residuals,
        gradient,
        cpu=attention_cpu.backward,
        cuda=attention_gpu.backward,
        tpu=attention_tpu.backward,
    )
    return (*gradients, None)


forest_attention.defvjp(_forward_with_residuals, _backward)


class ForestAttention(flax.struct.PyTreeNode):
    """Attention within the rows of a forest; carries no state from call to call.

    An attention strategy is called in every layer as `strategy(query, key, value, state)`, with
    rotated queries and keys, and returns the attention output and the layer's new state.  `layout`
    shards rows and heads over devices.
    """

    end: Int[Array, "B N"]
    layout: ShardingRules | None = flax.struct.field(pytree_node=False, default=None)

    def __call__(
        self,
        query: Float[Array, "B N H h"],
        key: Float[Array, "B N K h"],
        value: Float[Array, "B N K h"],
        state: Any = None,
    ) -> tuple[Float[Array, "B N H h"], Any]:
        """Attention output, and `state` unchanged."""
        attend: Callable[..., Any] = forest_attention
        if self.layout is not None:
            # Rows and heads are independent, which the compiler can't infer from a kernel.
            heads = ("rows", "slots", "each_head", None)
            in_axes = (heads, heads, heads, ("rows", "slots"))
            attend = self.layout.on_each_device(forest_attention, in_axes, heads)
        return attend(query, key, value, self.end), state

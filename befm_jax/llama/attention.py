"""Attention over token forests: one rule, and the kernel that the hardware does it best with.

Slot `i` sees slot `j` exactly when `j <= i <= end[j]`: itself and its ancestors.  Causal masks,
unrelated texts packed in one row and trees are all of that form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
from jaxtyping import Array, Float, Int

from befm_jax.llama import attention_cpu, attention_gpu, attention_tpu
from befm_jax.llama.linear import Layout

_Residuals = tuple[Array, ...]


@jax.custom_vjp
def forest_attention(
    query: Float[Array, "B N H h"],
    key: Float[Array, "B N K h"],
    value: Float[Array, "B N K h"],
    end: Int[Array, "B N"],
) -> Float[Array, "B N H h"]:
    """Grouped-query attention of rotated heads; softmax in float32, result in `query`'s dtype.

    Each kernel skips the blocks that none of their queries can see, and no `[N, N]` array exists.
    Which one runs is decided where the program is compiled for a platform; one for which there is
    none is an error, for nothing else knows the mask.  Programs are traced for all of them: what
    one can't take (float16, heads wider than 128) none is given.
    """
    return _forward(query, key, value, end)[0]


def _forward(query: Array, key: Array, value: Array, end: Array) -> tuple[Array, Array]:
    found: tuple[Array, Array] = jax.lax.platform_dependent(
        query,
        key,
        value,
        end,
        cpu=attention_cpu.forward,
        cuda=attention_gpu.forward,
        tpu=attention_tpu.forward,
    )
    return found


def _forward_keeping(
    query: Array, key: Array, value: Array, end: Array
) -> tuple[Array, _Residuals]:
    mixed, log_sum_exp = _forward(query, key, value, end)
    return mixed, (query, key, value, end, mixed, log_sum_exp)


def _backward(kept: _Residuals, gradient: Array) -> tuple[Array, Array, Array, None]:
    slopes: tuple[Array, Array, Array] = jax.lax.platform_dependent(
        *kept,
        gradient,
        cpu=attention_cpu.backward,
        cuda=attention_gpu.backward,
        tpu=attention_tpu.backward,
    )
    return (*slopes, None)


forest_attention.defvjp(_forward_keeping, _backward)


class ForestAttention(flax.struct.PyTreeNode):
    """Attention within the rows of a forest; carries no state from call to call.

    An attention strategy is called in every layer as `strategy(query, key, value, state)`, with
    rotated queries and keys, and returns the mixed values and the layer's new state.  `layout`
    says how rows and heads are cut over devices.
    """

    end: Int[Array, "B N"]
    layout: Layout | None = flax.struct.field(pytree_node=False, default=None)

    def __call__(
        self,
        query: Float[Array, "B N H h"],
        key: Float[Array, "B N K h"],
        value: Float[Array, "B N K h"],
        state: Any = None,
    ) -> tuple[Float[Array, "B N H h"], Any]:
        """Mixed values, and `state` as it came."""
        attend: Callable[..., Any] = forest_attention
        if self.layout is not None:
            # Rows and heads need nothing of one another, which no compiler sees in a kernel.
            heads = ("rows", "slots", "each_head", None)
            taken = (heads, heads, heads, ("rows", "slots"))
            attend = self.layout.on_each_device(forest_attention, taken, heads)
        return attend(query, key, value, self.end), state

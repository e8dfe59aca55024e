"""FLOPs of training and decoding, counted from the model's shape.

A multiply-add is two FLOPs.  Matrix products alone are counted: everything else is bound by memory
bandwidth on any accelerator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from befm_jax.llama.config import LINEARS, LlamaConfig


@dataclass(frozen=True)
class Flops:
    """FLOPs by purpose; `recomputed` are those that `remat` repeats in the backward pass."""

    linears: float = 0.0
    adapter: float = 0.0
    attention: float = 0.0
    vocabulary: float = 0.0
    recomputed: float = 0.0

    @property
    def needed(self) -> float:
        """FLOPs without recomputation: model FLOPs."""
        return self.linears + self.adapter + self.attention + self.vocabulary

    @property
    def done(self) -> float:
        """FLOPs with recomputation: hardware FLOPs."""
        return self.needed + self.recomputed


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """`(out, in)` of every linear of a layer."""
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }


def training(
    config: LlamaConfig,
    *,
    slots: float,
    pairs: float,
    reads: float,
    rank: int = 0,
    targets: Iterable[str] = LINEARS,
    remat: bool = False,
) -> Flops:
    """FLOPs of one forward and backward pass.

    `slots`: tokens, padding included.  `pairs`: pairs of a query and a visible key (`n (n + 1) / 2`
    for one text of `n` tokens).  `reads`: slots with a vocabulary projection.  `rank`: where not 0,
    only a LoRA adapter of that rank on the `targets` is trained, and the frozen weights and the
    vocabulary projection need no weight gradients, a third of their FLOPs.
    """
    shapes, layers = linear_shapes(config), config.num_hidden_layers
    weights = layers * sum(out * into for out, into in shapes.values())
    targets = set(targets)
    adapter = layers * rank * sum(sum(shapes[name]) for name in targets)
    # A layer's last product gives its output, which the backward pass does not need again.
    out, into = shapes["down_proj"]
    last = 2 * layers * slots * out * (into + rank * ("down_proj" in targets))
    forward = Flops(
        linears=2 * weights * slots,
        adapter=2 * adapter * slots,
        attention=layers * 4 * config.num_attention_heads * config.head_dim * pairs,
        vocabulary=2 * config.vocab_size * config.hidden_size * reads,
    )
    # Activation gradients cost as much as the forward pass, and so do gradients of trained weights.
    passes = 2 if rank else 3
    return Flops(
        linears=passes * forward.linears,
        adapter=3 * forward.adapter,
        # The backward pass recomputes the scores, and takes four further products.
        attention=forward.attention * (1 + 2.5),
        vocabulary=passes * forward.vocabulary,
        recomputed=forward.needed - forward.vocabulary - last if remat else 0.0,
    )


def decoding(config: LlamaConfig, *, tokens: float, pairs: float) -> Flops:
    """FLOPs of decoding `tokens` tokens that attend over `pairs` query-key pairs in all."""
    weights = config.num_hidden_layers * sum(
        out * into for out, into in linear_shapes(config).values()
    )
    return Flops(
        linears=2 * weights * tokens,
        attention=config.num_hidden_layers
        * 4
        * config.num_attention_heads
        * config.head_dim
        * pairs,
        vocabulary=2 * config.vocab_size * config.hidden_size * tokens,
    )

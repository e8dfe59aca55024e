"""How many operations a step needs, counted from the model's shape.

A multiplication and an addition are two operations.  Matrix products are counted and nothing else:
on any accelerator the rest is a matter of memory.  What is counted is what the mathematics needs;
`recomputed` says what a backward pass that keeps no activations (`remat`) does a second time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from befm_jax.llama.config import LINEARS, LlamaConfig


@dataclass(frozen=True)
class Flops:
    """Flops by what they are for; `recomputed` repeats some of the others."""

    linears: float = 0.0
    adapter: float = 0.0
    attention: float = 0.0
    vocabulary: float = 0.0
    recomputed: float = 0.0

    @property
    def needed(self) -> float:
        """Without what is computed twice."""
        return self.linears + self.adapter + self.attention + self.vocabulary

    @property
    def done(self) -> float:
        """All that the hardware does."""
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
    """Of one forward and backward pass.

    `slots`: tokens, padding included.  `pairs`: pairs of a query and a key that it sees (of one
    text of `n` tokens `n (n + 1) / 2`).  `reads`: slots at which the vocabulary is projected.
    With a `rank` only an adapter of that rank on the `targets` is trained: the weights under it,
    and the vocabulary, get no gradient, which is a third of the usual work not done.
    """
    shapes, layers = linear_shapes(config), config.num_hidden_layers
    weights = layers * sum(out * into for out, into in shapes.values())
    targets = set(targets)
    thin = layers * rank * sum(sum(shapes[name]) for name in targets)
    # A layer's last product gives its output, which the backward pass does not need again.
    out, into = shapes["down_proj"]
    last = 2 * layers * slots * out * (into + rank * ("down_proj" in targets))
    forward = Flops(
        linears=2 * weights * slots,
        adapter=2 * thin * slots,
        attention=layers * 4 * config.num_attention_heads * config.head_dim * pairs,
        vocabulary=2 * config.vocab_size * config.hidden_size * reads,
    )
    # Backward: activations' gradients as much again, weights' as much again where they are trained.
    trained = 2 if rank else 3
    return Flops(
        linears=trained * forward.linears,
        adapter=3 * forward.adapter,
        # The backward pass makes the scores again, and four products from them.
        attention=forward.attention * (1 + 2.5),
        vocabulary=trained * forward.vocabulary,
        recomputed=forward.needed - forward.vocabulary - last if remat else 0.0,
    )


def decoding(config: LlamaConfig, *, tokens: float, pairs: float) -> Flops:
    """Of drawing so many tokens, which look back on so many pairs in all."""
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

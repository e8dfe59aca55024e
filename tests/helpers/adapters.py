"""A small shape, an adapter whose ranks differ everywhere, and adapters that change something."""

import jax.numpy as jnp
import numpy as np

from befm_jax.adapters import lora
from befm_jax.adapters.lora import LoraSpec

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


# Ranks that differ by layer and by linear, a linear with an adapter in one layer only, one without.
UNEVEN = LoraSpec(
    rank=4,
    alpha=8.0,
    targets=(
        "q_proj", "o_proj", "down_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.k_proj",
    ),
    rank_pattern=((r"layers\.0\..*q_proj", 2), ("down_proj", 6), (r"1\.mlp\.up_proj", 1)),
    alpha_pattern=(("o_proj", 3.0), (r"layers\.1\.mlp\..*", 5.0)),
)  # fmt: skip


def random_b(adapter, scale=0.1):
    """The adapter with random `B`, in the ranks that it really has."""
    noise = np.random.default_rng(5)
    weights = {}
    for path, weight in adapter.weights.items():
        ranks = np.array(adapter.per_layer(path).ranks)
        real = np.arange(ranks.max()) < ranks[:, None]
        drawn = scale * noise.standard_normal(weight["b"].shape) * real[:, None]
        weights[path] = weight | {"b": jnp.asarray(drawn, jnp.float32)}
    return lora.Adapter(weights, adapter.spec)

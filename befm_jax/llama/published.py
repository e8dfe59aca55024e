"""Configs of published models, from `config.json` on the hub, for plans without a checkpoint."""

from __future__ import annotations

from dataclasses import replace

from befm_jax.llama.config import LlamaConfig, RopeScaling

_LLAMA_31_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    bos_token_id=128_000,
    eos_token_id=(128_001, 128_008, 128_009),
)
_LLAMA_31_70B = replace(
    _LLAMA_31_8B,
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
)
_LLAMA_31_405B = replace(
    _LLAMA_31_8B,
    hidden_size=16_384,
    intermediate_size=53_248,
    num_hidden_layers=126,
    num_attention_heads=128,
)
_LLAMA_32_1B = replace(
    _LLAMA_31_8B,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    head_dim=64,
    tie_word_embeddings=True,
    rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
)
_LLAMA_32_3B = replace(
    _LLAMA_32_1B,
    hidden_size=3072,
    num_hidden_layers=28,
    num_attention_heads=24,
    head_dim=128,
)
PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_31_8B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_31_70B,
    "meta-llama/Llama-3.1-405B-Instruct": _LLAMA_31_405B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_32_1B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_32_3B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_31_70B,
}

"""Random transformers models of several shapes, and the two implementations side by side."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from befm_jax.llama import hf
from befm_jax.llama.attention import ForestAttention
from befm_jax.llama.model import Llama

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_theta": 500_000.0,
}


def reference_model(seed: int = 0, model_type: str = "llama", **fields: Any) -> PreTrainedModel:
    """A random float32 transformers model; small, with heads of width 128 unless told."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 199,
        "hidden_size": 256,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "rope_parameters": LLAMA31_ROPE,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        "initializer_range": 0.05,
    } | fields
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        # Fresh norms are all ones and fresh biases all zeros: a mix-up would not show.
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_tokens(config: Any, batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))


def reference_logits(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def chain_end(tokens: np.ndarray) -> np.ndarray:
    """`end` of rows that are plain sequences: every slot's last descendant is the row's last."""
    return np.full(tokens.shape, tokens.shape[1] - 1, np.int32)


def our_logits(config, params, tokens: np.ndarray, **options: Any) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    model = Llama(config, **options)
    run = jax.jit(lambda p, t, n, e: model.apply({"params": p}, t, n, ForestAttention(e)))
    logits = run(params, jnp.asarray(tokens), jnp.asarray(positions), chain_end(tokens))
    return np.asarray(logits)


def carried_over(model: PreTrainedModel, directory: Path):
    """The same model here: written by transformers, read by `hf.load`."""
    model.save_pretrained(directory)
    return hf.load(directory)

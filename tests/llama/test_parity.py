"""The Flax port against transformers' Llama and Qwen3, whole and module by module.

At least 1,024 positions and heads of width 128: short prompts and narrow heads hide errors of the
rotary embedding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from befm_jax.llama import hf, rope
from befm_jax.llama.attention import ForestAttention
from befm_jax.llama.model import MLP, Layer, RMSNorm, SelfAttention
from tests.helpers.parity import (
    LLAMA31_ROPE,
    carried_over,
    our_logits,
    random_tokens,
    reference_logits,
    reference_model,
)

LENGTH = 1024
SHAPES = {
    "gqa ratio 1": {"num_key_value_heads": 4},
    "gqa ratio 2": {"num_key_value_heads": 2},
    "gqa ratio 8": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "no rope scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "linear rope scaling": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    },
    "head width not width over heads": {"hidden_size": 192},
    "head width equal to width over heads": {"head_dim": 64},
    "biases": {"attention_bias": True, "mlp_bias": True},
    # Of the shapes of Llama 3.2 1B and 3B, and of 405B's heads: narrow heads, or many to a key.
    "llama 3.2": {
        "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "rope_parameters": LLAMA31_ROPE | {"factor": 32.0},
    },
    "qwen3": {
        "model_type": "qwen3", "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "qwen3 with tied embeddings and biases": {
        "model_type": "qwen3", "tie_word_embeddings": True, "attention_bias": True,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_logits_equal_transformers(shape, tmp_path):
    reference = reference_model(**SHAPES[shape])
    tokens = random_tokens(reference.config, 2, LENGTH)
    config, params = carried_over(reference, tmp_path)
    difference = np.abs(our_logits(config, params, tokens) - reference_logits(reference, tokens))
    assert difference.max() <= 2e-5


EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYOUTS = {
    "head alone": lambda t: {HEAD if name == EMBEDDINGS else name: t[name] for name in t},
    "head that differs": lambda t: t | {HEAD: t[EMBEDDINGS].flip(0).contiguous()},
    "no prefix": lambda t: {name.removeprefix("model."): t[name] for name in t},
    "inv_freq": lambda t: t | {"model.rotary_emb.inv_freq": torch.ones(64)},
    "a layer in bfloat16": lambda t: {
        name: t[name].bfloat16() if name == "model.layers.1.mlp.up_proj.weight" else t[name]
        for name in t
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_that_transformers_reads_are_the_same_model_here(layout, tmp_path):
    reference_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(LAYOUTS[layout](load_file(file)), file, metadata={"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = random_tokens(reference.config, 1, 128)
    config, params = hf.load(tmp_path)
    difference = np.abs(our_logits(config, params, tokens) - reference_logits(reference, tokens))
    assert difference.max() <= 2e-5


def test_bfloat16_logits_are_within_a_twentieth_of_the_range(tmp_path):
    reference = reference_model()
    tokens = random_tokens(reference.config, 2, LENGTH)
    config, params = carried_over(reference, tmp_path)
    expected = reference_logits(reference, tokens)
    ours = our_logits(config, params, tokens, dtype=jnp.bfloat16)
    assert np.abs(ours - expected).max() <= 5e-2 * np.ptp(expected)


def test_remat_changes_nothing(tmp_path):
    reference = reference_model()
    tokens = random_tokens(reference.config, 1, 64)
    config, params = carried_over(reference, tmp_path)
    plain = our_logits(config, params, tokens)
    np.testing.assert_array_equal(our_logits(config, params, tokens, remat=True), plain)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_theta": 10_000.0},
        {"rope_scaling": None},
        {"rms_norm_eps": 1e-6},
        {"head_order": True},
    ],
    ids=["theta", "no scaling", "epsilon", "key heads in another order"],
)
def test_this_comparison_sees_a_wrong_constant(wrong, tmp_path):
    """Guards the test above: each of these errors stands in some public port of Llama 3."""
    reference = reference_model()
    tokens = random_tokens(reference.config, 1, LENGTH)
    config, params = carried_over(reference, tmp_path)
    if wrong.pop("head_order", False):
        weight = params["layers"]["self_attn"]["k_proj"]["weight"]
        params["layers"]["self_attn"]["k_proj"]["weight"] = weight[:, ::-1]
    config = dataclasses.replace(config, **wrong)
    difference = np.abs(our_logits(config, params, tokens) - reference_logits(reference, tokens))
    assert difference.max() > 10 * 2e-5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A reference model, our config and the parameters of its first layer."""
    reference = reference_model()
    config, params = carried_over(reference, tmp_path_factory.mktemp("model"))
    return reference, config, jax.tree.map(lambda leaf: leaf[0], params["layers"])


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).standard_normal((1, LENGTH, 256)).astype(np.float32)


class TestModules:
    """Each module on its own against its counterpart, with the same weights and input."""

    def turns(self, reference, config, x):
        positions = torch.arange(LENGTH)[None]
        theirs = reference.model.rotary_emb(torch.tensor(x), positions)
        return theirs, rope.tables(jnp.arange(LENGTH)[None], config)

    def test_rotary_tables(self, pair, x):
        reference, config, _ = pair
        theirs, ours = self.turns(reference, config, x)
        for their, our in zip(theirs, ours, strict=True):
            half = their.numpy()[..., : config.head_dim // 2]
            np.testing.assert_allclose(our, half, atol=1e-6, rtol=0)

    def test_norm(self, pair, x):
        reference, config, layer = pair
        theirs = reference.model.layers[0].input_layernorm(torch.tensor(x)).detach()
        ours = RMSNorm(config.rms_norm_eps).apply({"params": layer["input_layernorm"]}, x)
        np.testing.assert_allclose(ours, theirs, atol=2e-6)

    def test_mlp(self, pair, x):
        reference, config, layer = pair
        theirs = reference.model.layers[0].mlp(torch.tensor(x)).detach()
        ours = MLP(config).apply({"params": layer["mlp"]}, jnp.asarray(x))
        np.testing.assert_allclose(ours, theirs, atol=2e-5)

    def test_attention_and_layer(self, pair, x):
        reference, config, layer = pair
        theirs_turn, turn = self.turns(reference, config, x)
        seen = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
        strategy = ForestAttention(jnp.full((1, LENGTH), LENGTH - 1))
        block = reference.model.layers[0]
        with torch.no_grad():
            attention = block.self_attn(
                torch.tensor(x), position_embeddings=theirs_turn, attention_mask=seen
            )[0]
            whole = block(torch.tensor(x), position_embeddings=theirs_turn, attention_mask=seen)
        ours, _ = SelfAttention(config).apply(
            {"params": layer["self_attn"]}, jnp.asarray(x), turn, strategy, None
        )
        np.testing.assert_allclose(ours, attention, atol=2e-5)
        ours, _ = Layer(config).apply({"params": layer}, jnp.asarray(x), turn, strategy, None)
        np.testing.assert_allclose(ours, whole, atol=2e-5)


def test_a_model_saved_here_is_the_same_model_there(tmp_path):
    from transformers import AutoModelForCausalLM

    for fields in (
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"model_type": "qwen3"},
        {"model_type": "qwen3", "tie_word_embeddings": True},
    ):
        reference = reference_model(**fields)
        config, params = carried_over(reference, tmp_path / "theirs")
        hf.save(tmp_path / "ours", config, params, max_shard_bytes=400_000)
        assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
        assert type(back) is type(reference)
        assert back.config.rope_parameters == reference.config.rope_parameters
        tokens = random_tokens(reference.config, 1, 32)
        np.testing.assert_array_equal(
            reference_logits(back, tokens), reference_logits(reference, tokens)
        )

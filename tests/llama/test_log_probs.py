"""Vocabulary projections in chunks, against all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from befm_jax.adapters import lora
from befm_jax.data import forest as forests
from befm_jax.data.forest import Encoded
from befm_jax.llama import int8, log_probs
from befm_jax.llama.attention import ForestAttention
from tests.helpers.small import random_conversations, random_paths, small_model


def plain(model, params, forest, reads):
    """Log-probabilities and greedy flags of all reads from the logits of every slot."""
    attention = ForestAttention(jnp.asarray(forest.end))
    logits = model.apply({"params": params}, forest.tokens, forest.depth, attention)
    everything = jax.nn.log_softmax(logits)
    row = np.arange(len(forest.tokens))[:, None]
    slot, real = reads.slots[row, reads.column], reads.column >= 0
    log_probs = everything[row, slot, reads.token]
    greedy = jnp.argmax(logits, axis=-1)[row, slot] == reads.token
    return jnp.where(real, log_probs, 0), real & greedy


def case(seed, **fields):
    model, params = small_model(seed, **fields)
    built = forests.build([*random_paths(seed, count=40), *random_conversations(seed)], 70)
    assert len(built.forest.tokens) > 1
    assert (built.reads.weight < 0).any()
    return model, params, built.forest, built.reads


@pytest.fixture(params=[2, 6, 30, 10_000], ids="{} columns at once".format)
def columns_at_once(request, monkeypatch):
    monkeypatch.setattr(log_probs, "_COLUMNS", request.param)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.usefixtures("columns_at_once")
def test_scores_are_those_of_all_logits(tied):
    model, params, forest, reads = case(1, tie_word_embeddings=tied)
    found = log_probs.token_scores(model, params, forest, reads)
    expected, greedy = plain(model, params, forest, reads)
    np.testing.assert_allclose(found.log_probs, expected, atol=2e-6)
    np.testing.assert_array_equal(found.greedy, greedy)
    assert found.greedy.any()
    assert not found.greedy[reads.column >= 0].all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.usefixtures("columns_at_once")
def test_value_and_gradient_of_all_parameters_are_those_of_all_logits(tied):
    model, params, forest, reads = case(2, tie_word_embeddings=tied)
    ours = jax.jit(
        jax.value_and_grad(lambda params: log_probs.log_likelihood(model, params, forest, reads))
    )(params)
    theirs = jax.jit(
        jax.value_and_grad(
            lambda params: jnp.sum(reads.weight * plain(model, params, forest, reads)[0])
        )
    )(params)
    assert_same(ours, theirs)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.usefixtures("columns_at_once")
def test_value_and_gradient_of_an_adapter_are_those_of_all_logits(quantized):
    model, params, forest, reads = case(3)
    params = int8.quantize(params) if quantized else params
    adapter = lora.init(jax.random.key(0), params, rank=3)
    for weight in adapter.weights.values():
        weight["b"] = 0.05 * jax.random.normal(jax.random.key(1), weight["b"].shape)

    def both(score):
        return jax.jit(jax.value_and_grad(lambda adapter: score(lora.attach(params, adapter))))(
            adapter
        )

    ours = both(lambda params: log_probs.log_likelihood(model, params, forest, reads))
    theirs = both(lambda params: jnp.sum(reads.weight * plain(model, params, forest, reads)[0]))
    assert_same(ours, theirs)


def assert_same(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(float(jnp.abs(other).max()), 1e-6)
        assert float(jnp.abs(one - other).max()) <= 1e-5 * scale


def text(slots, vocabulary):
    """One row of plain text, every token but the first learnt."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, slots).tolist()
    return forests.build([Encoded.of(tokens[:1], tokens[1:])], slots)


def adapter_step(model, params, built):
    forest, reads = built.forest, built.reads
    adapter = lora.init(jax.random.key(0), params, rank=2)

    def score(adapter, params):
        return log_probs.log_likelihood(model, lora.attach(params, adapter), forest, reads)

    return jax.jit(jax.value_and_grad(score)).lower(adapter, params).compile()


def test_the_logits_of_a_long_text_never_exist_whole(monkeypatch):
    monkeypatch.setattr(log_probs, "_COLUMNS", 64)
    slots, vocabulary = 1024, 16_000
    model, params = small_model(vocab_size=vocabulary)
    program = adapter_step(model, params, text(slots, vocabulary))
    whole = slots * vocabulary * 4
    assert program.memory_analysis().temp_size_in_bytes < whole / 2


def test_a_vocabulary_projection_that_is_not_trained_gets_no_gradient(monkeypatch):
    """Its gradient would be as large as itself: no such array may stand in the program."""
    monkeypatch.setattr(log_probs, "_COLUMNS", 64)
    model, params = small_model(vocab_size=16_000)
    program = adapter_step(model, params, text(256, 16_000))
    assert "f32[16000,32]{1,0} add" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 16_000 * (32 + 3 * 64) * 4


@pytest.mark.parametrize("learnt", [1, 65, 500])
def test_columns_that_nobody_reads_at_are_not_projected(learnt, monkeypatch):
    monkeypatch.setattr(log_probs, "_COLUMNS", 64)
    model, params = small_model()
    tokens = tuple(np.random.default_rng(0).integers(0, 97, 640).tolist())
    built = forests.build([Encoded.of(tokens[: 640 - learnt], tokens[640 - learnt :])], 640)
    chunks = []
    monkeypatch.setattr(
        log_probs,
        "vocabulary_logits",
        lambda *given: (
            jax.debug.callback(lambda: chunks.append(1)),
            model.apply({"params": given[1]}, given[2], method="logits"),
        )[1],
    )
    jax.block_until_ready(log_probs.token_scores(model, params, built.forest, built.reads))
    jax.effects_barrier()
    assert len(chunks) == -(-learnt // 64)

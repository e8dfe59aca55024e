"""A model that can't answer says so: no distribution of NaN, no population of empty answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from befm_jax.adapters import lora
from befm_jax.data.forest import Encoded
from befm_jax.errors import UserError
from befm_jax.inference import sample, score
from befm_jax.inference.checks import NonFiniteError
from befm_jax.inference.next_token import NOT_FINITE, Sampling, next_token
from befm_jax.llama import int8
from tests.helpers.small import small_model

PROMPT, ANSWER = (5, 6, 7), (8, 9, 1)


def both_ways(model, params):
    """Scores an answer, and draws some."""
    yield lambda: score.log_probs(model, params, [Encoded.of(PROMPT, ANSWER)])
    yield lambda: sample.population(
        model, params, PROMPT, 3, stop_ids=[1], sampling=Sampling(max_new_tokens=4)
    )


def damaged(params, *path, value):
    """The parameters with one number of a weight replaced."""
    leaf = params
    for name in path[:-1]:
        leaf = leaf[name]
    at = (-1,) * leaf[path[-1]].ndim
    leaf[path[-1]] = leaf[path[-1]].at[at].set(value)
    return params


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("norm", "weight"), jnp.nan),
        (("norm", "weight"), jnp.inf),
        (("lm_head", "weight"), jnp.nan),
        (("layers", "mlp", "up_proj", "weight"), jnp.nan),
        (("layers", "mlp", "up_proj", "weight"), jnp.inf),
    ],
    ids=str,
)
@pytest.mark.parametrize("quantized", [False, True])
def test_weights_that_are_not_finite_are_named(path, value, quantized):
    model, params = small_model()
    params = damaged(params, *path, value=value)
    for answers in both_ways(model, int8.quantize(params) if quantized else params):
        with pytest.raises(NonFiniteError, match=f"not finite: .*{path[-2]}/weight"):
            answers()


def test_an_embedding_that_nobody_reads_harms_nothing():
    model, params = small_model()
    for answers in both_ways(model, damaged(params, "embed_tokens", "weight", value=jnp.nan)):
        answers()


def test_an_overflow_of_finite_weights_is_said():
    model, params = small_model()
    adapter = lora.init(jax.random.key(0), params, rank=2, alpha=1e38)
    for weight in adapter.weights.values():
        weight["b"] = weight["b"] + 1e30
    for answers in both_ways(model, lora.attach(params, adapter)):
        with pytest.raises(NonFiniteError, match="overflow"):
            answers()


def test_a_draw_from_logits_that_are_not_finite_is_no_token():
    """Masked tokens have minus infinity; every other row is drawn as before."""
    logits = np.zeros((5, 300), np.float32)
    logits[1, 200] = np.nan
    logits[2, 3] = np.inf
    logits[3, 1:] = -np.inf
    logits[4] = -np.inf
    keys = jax.random.split(jax.random.key(0), 5)
    for settings in ({}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9, "temperature": 0.5}):
        found = np.asarray(next_token(jnp.asarray(logits), keys, Sampling(**settings)))
        assert found[0] >= 0
        assert found[3] == 0
        assert (found[[1, 2, 4]] == NOT_FINITE).all()


def test_a_token_without_an_embedding_is_named():
    model, params = small_model()
    with pytest.raises(UserError, match=r"token id 97; .* below 97"):
        score.log_probs(model, params, [Encoded.of((5, 97), ANSWER)])
    with pytest.raises(UserError, match="token id 97"):
        score.log_probs(model, params, [Encoded.of(PROMPT, (97, 1))])
    with pytest.raises(UserError, match="token id 97"):
        sample.population(model, params, (97, 3), 2, stop_ids=[1])


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_a_seed_that_would_draw_as_another_is_refused(seed):
    model, params = small_model()
    with pytest.raises(ValueError, match="seed is"):
        sample.population(model, params, PROMPT, 2, seed=seed, stop_ids=[1])

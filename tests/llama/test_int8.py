"""Eight-bit weights: the rounding's bound, the product, and what stands on top of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import our_logits, random_tokens
from small import SMALL, random_paths, small_model

from befm_jax.adapters import lora
from befm_jax.data.pipeline import ForestBatches
from befm_jax.llama import int8
from befm_jax.training import step as steps


@pytest.fixture(scope="module")
def matrix():
    random = np.random.default_rng(0)
    rows = np.exp(random.normal(0, 2, (3, 40, 1)))
    drawn = (rows * random.standard_normal((3, 40, 70))).astype(np.float32)
    drawn[1, 7] = 0
    return drawn


def test_an_entry_is_off_by_half_a_step_of_its_row_at_most(matrix):
    kernel = int8.quantize_matrix(jnp.asarray(matrix))
    assert kernel.values.dtype == jnp.int8
    step = np.abs(matrix).max(-1, keepdims=True) / 127
    assert (np.abs(kernel.dense() - matrix) <= 0.5001 * step).all()
    assert (np.abs(np.asarray(kernel.values)).max(-1) == 127).sum() == 3 * 40 - 1
    assert not np.isnan(kernel.dense()).any()


def test_the_product_is_that_of_the_rounded_matrix(matrix):
    kernel = jax.tree.map(lambda leaf: leaf[0], int8.quantize_matrix(jnp.asarray(matrix)))
    x = np.random.default_rng(1).standard_normal((2, 5, 70)).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(kernel.dense(), np.float64).T
    np.testing.assert_allclose(kernel.project(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)
    assert kernel.project(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_rounded_model_is_near_and_equals_its_dense_weights():
    model, params = small_model()
    rounded = int8.quantize(params)
    dense = jax.tree.map(
        lambda leaf: leaf.dense() if isinstance(leaf, int8.Int8Kernel) else leaf,
        rounded,
        is_leaf=lambda leaf: isinstance(leaf, int8.Int8Kernel),
    )
    tokens = random_tokens(SMALL, 2, 40)
    exact, found, expected = (
        our_logits(model.config, tree, tokens) for tree in (params, rounded, dense)
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert 0 < np.abs(found - exact).max() < 0.05 * np.ptp(exact)


def test_lora_trains_over_a_rounded_base():
    model, params = small_model()
    rounded = int8.quantize(params)
    adapter = lora.init(jax.random.key(0), rounded, rank=2)
    batch = ForestBatches(random_paths(0), slots=40, rows=2, epochs=1)[0][0]
    loss, gradient = jax.jit(
        lambda *of: steps.value_and_gradient(model, steps.train_adapter, *of, jax.random.key(0))
    )(rounded, adapter, batch)
    assert np.isfinite(loss)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter)
    assert all(np.abs(weight["b"]).max() > 0 for weight in gradient.weights.values())

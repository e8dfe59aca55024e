"""Eight-bit weights: the rounding's bound, the product, and what stands on top of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from befm_jax.adapters import lora
from befm_jax.data.pipeline import lay_out
from befm_jax.llama import int8
from befm_jax.training import step as steps
from tests.helpers.parity import our_logits, random_tokens
from tests.helpers.small import SMALL, random_paths, small_model


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


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_become_a_number(matrix, damage):
    damaged = matrix[0].copy()
    damaged[3, 5] = damage
    kernel = int8.quantize_matrix(jnp.asarray(damaged))
    product = np.asarray(kernel.project(jnp.ones((1, 70))))
    assert np.flatnonzero(~np.isfinite(product[0])).tolist() == [3]


def test_the_product_is_that_of_the_rounded_matrix(matrix):
    kernel = jax.tree.map(lambda leaf: leaf[0], int8.quantize_matrix(jnp.asarray(matrix)))
    x = np.random.default_rng(1).standard_normal((2, 5, 70)).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(kernel.dense(), np.float64).T
    np.testing.assert_allclose(kernel.project(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)
    assert kernel.project(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("rows", [3, int8._MANY_ROWS])
@pytest.mark.parametrize(("height", "width"), [(3000, 700), (2996, 700), (700, 3000), (40, 70)])
def test_blocks_are_of_one_product_forward_and_backward(height, width, rows):
    """Matrices of a whole number of blocks, of some and a rest, and of less than one; and whole."""
    random = np.random.default_rng(height)
    kernel = int8.quantize_matrix(jnp.asarray(random.standard_normal((height, width)), jnp.float32))
    x, gradient = (random.standard_normal((1, rows, size)) for size in (width, height))
    found, back = jax.vjp(jax.jit(kernel.project), jnp.asarray(x, jnp.float32))
    dense = np.asarray(kernel.values, np.float64) * np.asarray(kernel.scale, np.float64)[:, None]
    for ours, exact in (
        (found, x @ dense.T),
        (back(jnp.asarray(gradient, jnp.float32))[0], gradient @ dense),
    ):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-6 * np.abs(exact).max())


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


@pytest.fixture(scope="module")
def trained():
    """A step over a rounded base, as a jitted function and what to call it with."""
    model, params = small_model()
    rounded = int8.quantize(params)
    adapter = lora.init(jax.random.key(0), rounded, rank=2)
    batch = lay_out(random_paths(0), slots=40, parts=2, seed=0)[0]
    run = jax.jit(
        lambda *of: steps.value_and_gradient(model, steps.train_adapter, *of, jax.random.key(0))
    )
    return run, (rounded, adapter, batch)


def test_lora_trains_over_a_rounded_base(trained):
    run, given = trained
    loss, gradient = run(*given)
    adapter = given[1]
    assert np.isfinite(loss)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter)
    assert all(np.abs(weight["b"]).max() > 0 for weight in gradient.weights.values())


def test_no_wide_weights_are_kept_for_the_backward_pass(trained):
    """Layers are not recomputed here: what the backward pass needs is kept for all of them."""
    run, given = trained
    program = run.lower(*given).compile().as_text()
    layers = given[0]["layers"]
    wide = {
        "f32[" + ",".join(map(str, kernel.shape)) + "]"
        for part in ("self_attn", "mlp")
        for kernel in (linear["weight"] for linear in layers[part].values())
    }
    rounded = {shape.replace("f32", "s8") for shape in wide}
    assert {shape for shape in rounded if shape in program} == rounded
    assert {shape for shape in wide if shape in program} == set()

"""The forest's loss and gradient against ordinary supervised fine-tuning on padded sequences."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from befm_jax.adapters import lora
from befm_jax.data.pipeline import lay_out
from befm_jax.llama import tiny
from befm_jax.llama.attention import ForestAttention
from befm_jax.llama.model import Llama
from befm_jax.training import optimizer as optimizers
from befm_jax.training import step as steps
from tests.helpers.small import (
    SMALL,
    game_tokenizer,
    random_conversations,
    random_paths,
    real_paths,
    small_model,
)


def padded_loss(model, params, paths):
    """The learnt tokens' mean over one padded sequence an observation: what others compute.

    Written from the definition, sharing no code with the forest: every observation is a row of
    its own, with causal attention, next-token cross-entropy and a mask on what is learnt.
    """
    rows = [path for path in paths for _ in range(int(path.observations))]
    length = max(len(path.ids) for path in rows)
    tokens = np.zeros((len(rows), length), np.int32)
    learnt = np.zeros((len(rows), length), np.float32)
    scale = np.array([[path.scale] for path in rows], np.float32)
    for row, path in enumerate(rows):
        tokens[row, : len(path.ids)] = path.ids
        for start, stop in path.learnt:
            learnt[row, start:stop] = 1
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    causal = ForestAttention(jnp.full(tokens.shape, length - 1))
    logits = model.apply({"params": params}, tokens, positions, causal)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.sum(losses * learnt[:, 1:] * scale) / jnp.sum(learnt)


def assert_trees_close(ours, theirs, relative):
    """Largest difference of any leaf, relative to that leaf's largest entry."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = np.abs(other).max()
        assert np.abs(one - other).max() <= relative * max(scale, 1e-6)


def used_adapter(params, seed=3):
    """An adapter whose B is not zero any more, so that A has a gradient too."""
    adapter = lora.init(jax.random.key(seed), params, rank=4)
    noise = np.random.default_rng(seed)
    for weight in adapter.weights.values():
        weight["b"] = jnp.asarray(0.05 * noise.standard_normal(weight["b"].shape), jnp.float32)
    return adapter


CASES = {
    "real game prompts": lambda: real_paths(0),
    "random tries 1": lambda: random_paths(1),
    "random tries 2": lambda: random_paths(2),
    "random tries 3": lambda: random_paths(3),
    "many spans 1": lambda: random_conversations(1),
    "many spans 2": lambda: random_conversations(2),
    "many spans 3": lambda: random_conversations(3),
}


def case(name):
    paths = CASES[name]()
    vocabulary = game_tokenizer().vocab_size if "real" in name else SMALL.vocab_size
    model, params = small_model(vocab_size=vocabulary)
    longest = max(len(path.ids) for path in paths)
    batch, _ = lay_out(paths, slots=longest + 9, parts=2, seed=0)
    return model, params, paths, batch


@pytest.mark.parametrize("name", CASES)
def test_adapter_loss_and_gradient_equal_padded_sequences(name):
    model, params, paths, batch = case(name)
    adapter = used_adapter(params)
    ours = jax.jit(
        lambda adapter: steps.value_and_gradient(
            model, steps.train_adapter, params, adapter, batch, jax.random.key(0)
        )
    )(adapter)
    theirs = jax.jit(
        jax.value_and_grad(lambda adapter: padded_loss(model, lora.attach(params, adapter), paths))
    )(adapter)
    assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-5)
    assert_trees_close(ours[1], theirs[1], 1e-5)


@pytest.mark.parametrize("name", ["real game prompts", "random tries 1", "many spans 1"])
def test_gradient_of_all_parameters_equals_padded_sequences(name):
    model, params, paths, batch = case(name)
    ours = jax.jit(
        lambda params: steps.value_and_gradient(
            model, steps.train_all, None, params, batch, jax.random.key(0)
        )
    )(params)
    theirs = jax.jit(jax.value_and_grad(lambda params: padded_loss(model, params, paths)))(params)
    assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-5)
    assert_trees_close(ours[1], theirs[1], 1e-5)


def test_the_comparison_sees_a_wrong_mask_and_a_wrong_position():
    """Guards the tests above: both errors must show well beyond their tolerance."""
    model, params, _, batch = case("random tries 1")

    @jax.jit
    def gradient(batch):
        key = jax.random.key(0)
        return steps.value_and_gradient(model, steps.train_all, None, params, batch, key)[1]

    right = gradient(batch)
    slots = batch.forest.end.shape[-1]
    everyone = batch.forest._replace(end=np.full_like(batch.forest.end, slots - 1))
    in_order = batch.forest._replace(
        depth=np.broadcast_to(np.arange(slots, dtype=np.int32), batch.forest.depth.shape)
    )
    for wrong in (everyone, in_order):
        with pytest.raises(AssertionError):
            assert_trees_close(gradient(batch._replace(forest=wrong)), right, 1e-2)


def test_accumulation_does_not_change_loss_or_gradient():
    paths = random_paths(4, count=60)
    model, params = small_model()
    run = jax.jit(partial(steps.value_and_gradient, model, steps.train_all, None))
    found = [
        run(params, lay_out(paths, slots=slots, parts=1, seed=0)[0], jax.random.key(0))
        for slots in (40, 160)
    ]
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-6)
    assert_trees_close(found[0][1], found[1][1], 1e-5)


def test_bfloat16_compute_keeps_adapter_moments_and_gradient_in_float32():
    model, params, _, batch = case("random tries 1")
    model = Llama(model.config, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    adapter = lora.init(jax.random.key(0), params, rank=4)
    optimizer = optimizers.adamw(1e-3)
    state = steps.init_state(adapter, optimizer, seed=0)
    state, metrics = steps.make_train_step(model, optimizer, steps.train_adapter)(
        state, params, batch
    )
    floats = [
        leaf
        for leaf in jax.tree.leaves((state.trained, state.moments))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}
    assert np.isfinite(float(metrics.loss))


def test_a_step_compiles_once_and_learns():
    model, params, _, batch = case("random tries 1")
    optimizer = optimizers.adamw(optimizers.schedule(1e-2, 30, 0.1))
    train_step = steps.make_train_step(model, optimizer, steps.train_adapter)
    state = steps.init_state(lora.init(jax.random.key(0), params, rank=4), optimizer, seed=0)
    losses = []
    for _ in range(30):
        state, metrics = train_step(state, params, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.8 * losses[0]
    assert train_step._cache_size() == 1
    assert int(state.step) == 30


def test_profiles_name_the_parts_of_a_step():
    model, params, _, batch = case("random tries 1")
    optimizer = optimizers.adamw(1e-3)
    state = steps.init_state(lora.init(jax.random.key(0), params, rank=2), optimizer, seed=0)
    train_step = steps.make_train_step(model, optimizer, steps.train_adapter)
    text = train_step.lower(state, params, batch).as_text(debug_info=True)
    # The name of an operation is its path of scopes, as in "jit(train_step)/loss/.../embed/mul".
    scopes = {scope for name in re.findall(r'loc\("([^"]*)"', text) for scope in name.split("/")}
    of_the_model = {"embed", "rotary", "self_attn", "attention", "mlp", "unembed"}
    assert of_the_model | {"loss", "optimizer"} <= scopes


def test_remat_and_dropout_key_leave_the_loss_of_an_adapter_without_dropout_alone():
    model, params, _, batch = case("random tries 2")
    adapter = used_adapter(params)

    def found(model, adapter, seed):
        run = jax.jit(partial(steps.value_and_gradient, model, steps.train_adapter))
        return run(params, adapter, batch, jax.random.key(seed))

    plain = found(model, adapter, 0)
    again = found(Llama(model.config, remat=True), adapter, 1)
    assert float(plain[0]) == float(again[0])
    assert_trees_close(plain[1], again[1], 1e-6)
    dropped = lora.Adapter(adapter.weights, dataclasses.replace(adapter.spec, dropout=0.5))
    assert float(found(model, dropped, 0)[0]) != float(found(model, dropped, 1)[0])
    assert float(found(model, dropped, 0)[0]) == float(found(model, dropped, 0)[0])


def test_schedule_is_linear_then_cosine():
    rates = optimizers.schedule(1e-3, 100, 0.1)
    assert [float(rates(step)) for step in (0, 4, 9)] == pytest.approx([1e-4, 5e-4, 1e-3])
    # Step 9 + t of 91 is at the cosine of t / 91 half turns.
    assert float(rates(9 + 45)) == pytest.approx(5e-4 * (1 + np.cos(np.pi * 45 / 91)), rel=1e-4)
    assert float(rates(100)) == pytest.approx(0, abs=1e-9)


def test_scratch_initialisation_is_a_function_of_the_seed():
    first, second = (tiny.init_params(SMALL, 7, 0.1) for _ in range(2))
    assert_trees_close(first, second, 0)

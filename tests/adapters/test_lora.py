"""LoRA as a transform: identities, and PEFT's loss curve from the same start."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from befm_jax.adapters import lora
from befm_jax.adapters import peft as peft_files
from befm_jax.adapters.lora import LoraSpec
from befm_jax.data.pipeline import lay_out
from befm_jax.llama import int8
from befm_jax.llama.model import Llama
from befm_jax.training import optimizer as optimizers
from befm_jax.training import step as steps
from tests.helpers.adapters import TINY, UNEVEN, random_b
from tests.helpers.parity import carried_over, our_logits, random_tokens, reference_model
from tests.helpers.small import SMALL, random_paths, small_model


def test_a_fresh_adapter_changes_nothing():
    model, params = small_model()
    tokens = random_tokens(SMALL, 2, 20)
    attached = lora.attach(params, lora.init(jax.random.key(0), params, rank=4))
    np.testing.assert_array_equal(
        our_logits(model.config, attached, tokens), our_logits(model.config, params, tokens)
    )


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(3, 5.0),
        LoraSpec(3, 5.0, rslora=True, targets=("q_proj", "down_proj")),
        LoraSpec(3, 5.0, targets=("v_proj",)),
        UNEVEN,
    ],
)
def test_merged_equals_attached(spec):
    model, params = small_model()
    attached = lora.attach(params, random_b(lora.init_from(jax.random.key(0), params, spec)))
    merged = lora.merge(attached)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    tokens = random_tokens(SMALL, 2, 20)
    plain, with_adapter, after = (
        our_logits(model.config, tree, tokens) for tree in (params, attached, merged)
    )
    np.testing.assert_allclose(after, with_adapter, atol=2e-5)
    assert np.abs(with_adapter - plain).max() > 0.05


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_is_the_sum_in_float32_for_all_layers_and_for_one(dtype):
    _, params = small_model()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    adapter = random_b(lora.init(jax.random.key(0), params, rank=3, alpha=5))
    kernel = lora.attach(params, adapter)["layers"]["mlp"]["up_proj"]["weight"]
    base, a, b = (np.asarray(part, np.float64) for part in (kernel.base, kernel.a, kernel.b))
    expected = base + 5 / 3 * np.einsum("lfr,lrd->lfd", b, a)
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-8 * np.abs(expected).max()
    found = kernel.dense()
    assert found.dtype == dtype
    assert kernel.shape == found.shape == expected.shape
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance)
    one = jax.tree.map(lambda leaf: leaf[1], kernel)
    assert one.shape == one.dense().shape == expected.shape[1:]
    np.testing.assert_array_equal(one.dense(), found[1])


def test_an_adapter_goes_on_a_rounded_base_but_is_not_merged_into_it():
    model, params = small_model()
    packed = int8.quantize(params)
    tokens = random_tokens(SMALL, 2, 20)
    adapter = lora.init(jax.random.key(0), packed, rank=3)
    for path, weight in lora.init(jax.random.key(0), params, rank=3).weights.items():
        np.testing.assert_array_equal(adapter.weights[path]["a"], weight["a"])
    base = our_logits(model.config, packed, tokens)
    fresh = our_logits(model.config, lora.attach(packed, adapter), tokens)
    np.testing.assert_allclose(fresh, base, atol=1e-5)
    attached = lora.attach(packed, random_b(adapter))
    assert np.abs(our_logits(model.config, attached, tokens) - base).max() > 0.05
    with pytest.raises(lora.AdapterError, match=r"Int8Kernel.*original weights"):
        lora.merge(attached)


def test_a_second_adapter_on_the_same_weights_is_refused():
    _, params = small_model()
    adapter = lora.init(jax.random.key(0), params, rank=2)
    with pytest.raises(lora.AdapterError, match="merge that one first"):
        lora.attach(lora.attach(params, adapter), adapter)


def test_scaling_is_alpha_over_rank_or_its_root():
    path = "layers/self_attn/q_proj"
    assert LoraSpec(16, 32.0).per_layer(path, 2) == ((16, 16), (2.0, 2.0))
    assert LoraSpec(16, 32.0, rslora=True).per_layer(path, 2).scalings == (8.0, 8.0)


def test_ranks_that_differ_by_layer_are_padded_with_zeros():
    _, params = small_model()
    adapter = lora.init_from(jax.random.key(0), params, UNEVEN)
    ranks = {path.split("/")[-1]: adapter.per_layer(path).ranks for path in adapter.weights}
    assert ranks == {
        "q_proj": (2, 4), "o_proj": (4, 4), "down_proj": (6, 6), "up_proj": (4, 1),
        "k_proj": (0, 4),
    }  # fmt: skip
    for path, weight in adapter.weights.items():
        for layer, rank in enumerate(adapter.per_layer(path).ranks):
            rows = np.asarray(weight["a"][layer])
            assert (rows[:rank] != 0).all()
            assert not rows[rank:].any()


def test_a_starts_uniform_within_one_over_root_of_the_inputs_and_b_at_zero():
    _, params = small_model()
    adapter = lora.init(jax.random.key(0), params, rank=64)
    for path, weight in adapter.weights.items():
        bound = 1 / np.sqrt(weight["a"].shape[-1])
        assert 0.99 * bound < np.abs(weight["a"]).max() <= bound, path
        assert np.std(weight["a"]) == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert not weight["b"].any()
        assert weight["a"].dtype == weight["b"].dtype == jnp.float32


def test_gradient_has_the_adapters_tree_and_the_base_gets_none():
    model, params = small_model()
    batch, _ = lay_out(random_paths(0), slots=40, parts=2, seed=0)
    adapter = random_b(lora.init(jax.random.key(0), params, rank=2))
    run = jax.jit(partial(steps.value_and_gradient, model, steps.train_adapter))
    _, gradient = run(params, adapter, batch, jax.random.key(0))
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": ()}, "targets"),
        ({"targets": ("q_prj",)}, "did you mean q_proj"),
        ({"targets": ("q_proj", "lm_head")}, "LoRA on lm_head is not supported"),
        ({"targets": ("embed_tokens",)}, "LoRA on embed_tokens is not supported"),
        ({"targets": ("input_layernorm",)}, "input_layernorm: no linear"),
        ({"targets": r".*\.q_prj"}, "q_prj' matches no linear"),
        ({"targets": "(q_proj"}, "not a regular expression"),
    ],
)
def test_bad_options_are_named(options, message):
    _, params = small_model()
    with pytest.raises(ValueError, match=message):
        lora.init(jax.random.key(0), params, **({"rank": 4} | options))


def test_an_adapter_of_another_model_is_refused():
    _, params = small_model()
    _, other = small_model(intermediate_size=40)
    adapter = lora.init(jax.random.key(0), params, rank=2)
    with pytest.raises(ValueError, match="layers/mlp/down_proj"):
        lora.attach(other, adapter)


@pytest.mark.parametrize("spec", [LoraSpec(4, 8.0), UNEVEN])
def test_twenty_steps_follow_pefts_loss_curve_and_padding_stays_zero(tmp_path, spec):
    """Same adapter, data, AdamW and clipping; PEFT on padded sequences, ours on forests."""
    reference = reference_model(**TINY)
    config, params = carried_over(reference, tmp_path / "model")
    adapter = lora.init_from(jax.random.key(1), params, spec)
    peft_files.save(tmp_path / "adapter", adapter, "base")
    paths = random_paths(6)
    rate, steps_in_all = 5e-3, 20

    rows = [path for path in paths for _ in range(int(path.observations))]
    length = max(len(path.ids) for path in rows)
    tokens = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    for row, path in enumerate(rows):
        sequence, ((start, stop),) = torch.tensor(path.ids), path.learnt
        tokens[row, : len(sequence)] = sequence
        labels[row, start:stop] = sequence[start:stop]
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter", is_trainable=True)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    expected = []
    for _ in range(steps_in_all):
        loss = theirs(tokens, labels=labels).loss
        expected.append(loss.item())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()

    batch, _ = lay_out(paths, slots=48, parts=2, seed=0)
    optimizer = optimizers.adamw(rate, weight_decay=0.01, clip_norm=1.0)
    train_step = steps.make_train_step(Llama(config), optimizer, steps.train_adapter)
    state = steps.init_state(adapter, optimizer, seed=0)
    found = []
    for _ in range(steps_in_all):
        state, metrics = train_step(state, params, batch)
        found.append(float(metrics.loss))
    assert found[-1] < 0.85 * found[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for path, weight in state.trained.weights.items():
        for layer, rank in enumerate(state.trained.per_layer(path).ranks):
            assert not np.asarray(weight["a"][layer, rank:]).any(), path
            assert not np.asarray(weight["b"][layer, :, rank:]).any(), path

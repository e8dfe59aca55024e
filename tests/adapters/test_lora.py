"""LoRA as a transform: identities, and PEFT's loss curve from the same start."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from parity import carried_over, our_logits, random_tokens, reference_logits, reference_model
from small import SMALL, random_paths, small_model

from befm_jax.adapters import lora
from befm_jax.adapters import peft as peft_files
from befm_jax.data.pipeline import ForestBatches
from befm_jax.llama.model import Llama
from befm_jax.training import optimizer as optimizers
from befm_jax.training import step as steps

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def random_b(adapter, scale=0.1):
    noise = np.random.default_rng(5)
    for weight in adapter.weights.values():
        weight["b"] = jnp.asarray(scale * noise.standard_normal(weight["b"].shape), jnp.float32)
    return adapter


def test_a_fresh_adapter_changes_nothing():
    model, params = small_model()
    tokens = random_tokens(SMALL, 2, 20)
    attached = lora.attach(params, lora.init(jax.random.key(0), params, rank=4))
    np.testing.assert_array_equal(
        our_logits(model.config, attached, tokens), our_logits(model.config, params, tokens)
    )


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [lora.ALL_LINEAR, ("q_proj", "down_proj"), ("v_proj",)])
def test_merged_equals_attached(rslora, targets):
    model, params = small_model()
    adapter = random_b(
        lora.init(jax.random.key(0), params, rank=3, alpha=5, rslora=rslora, targets=targets)
    )
    attached = lora.attach(params, adapter)
    merged = lora.merge(attached)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    tokens = random_tokens(SMALL, 2, 20)
    plain, with_adapter, after = (
        our_logits(model.config, tree, tokens) for tree in (params, attached, merged)
    )
    np.testing.assert_allclose(after, with_adapter, atol=2e-5)
    assert np.abs(with_adapter - plain).max() > 0.05


def test_scaling_is_alpha_over_rank_or_its_root():
    assert lora.LoraSpec(16, 32.0).scaling == 2.0
    assert lora.LoraSpec(16, 32.0, rslora=True).scaling == 8.0


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
    batch = ForestBatches(random_paths(0), slots=40, rows=2, epochs=1)[0][0]
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


def in_peft(reference, directory):
    return peft.PeftModel.from_pretrained(reference, directory, is_trainable=True)


def test_peft_loads_our_adapter_to_the_same_logits_and_back(tmp_path):
    reference = reference_model(**TINY)
    config, params = carried_over(reference, tmp_path / "model")
    adapter = random_b(lora.init(jax.random.key(1), params, rank=4, alpha=12, rslora=True))
    peft_files.save(tmp_path / "adapter", adapter, "base")
    tokens = random_tokens(config, 2, 50)
    ours = our_logits(config, lora.attach(params, adapter), tokens)
    theirs = in_peft(reference, tmp_path / "adapter")
    np.testing.assert_allclose(ours, reference_logits(theirs, tokens), atol=2e-5)
    theirs.save_pretrained(tmp_path / "back")
    back = peft_files.load(tmp_path / "back")
    assert back.spec == adapter.spec
    for path, weight in adapter.weights.items():
        for part in ("a", "b"):
            np.testing.assert_array_equal(back.weights[path][part], weight[part])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_dora", True, "use_dora"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("peft_type", "IA3", "peft_type"),
        ("bias", "all", "bias"),
        ("r", 5, "r = 5"),
        ("target_modules", ["q_proj", "lm_head"], "lm_head"),
    ],
)
def test_what_an_adapter_file_can_not_be_is_named(tmp_path, field, value, message):
    import json

    _, params = small_model()
    peft_files.save(tmp_path, lora.init(jax.random.key(0), params, rank=2), "base")
    path = tmp_path / peft_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(peft_files.AdapterError, match=message):
        peft_files.load(tmp_path)


def test_twenty_steps_follow_pefts_loss_curve(tmp_path):
    """Same adapter, data, AdamW and clipping; PEFT on padded sequences, ours on forests."""
    reference = reference_model(**TINY)
    config, params = carried_over(reference, tmp_path / "model")
    adapter = lora.init(jax.random.key(1), params, rank=4, alpha=8)
    peft_files.save(tmp_path / "adapter", adapter, "base")
    paths = random_paths(6)
    rate, steps_in_all = 5e-3, 20

    rows = [path for path in paths for _ in range(int(path.weight))]
    length = max(len(path.prompt) + len(path.answer) for path in rows)
    tokens = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    for row, path in enumerate(rows):
        sequence = torch.tensor(path.prompt + path.answer)
        tokens[row, : len(sequence)] = sequence
        labels[row, len(path.prompt) : len(sequence)] = sequence[len(path.prompt) :]
    theirs = in_peft(reference, tmp_path / "adapter")
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

    batch = ForestBatches(paths, slots=48, rows=2, epochs=1)[0][0]
    optimizer = optimizers.adamw(rate, weight_decay=0.01, clip_norm=1.0)
    train_step = steps.make_train_step(Llama(config), optimizer, steps.train_adapter)
    state = steps.init_state(adapter, optimizer, seed=0)
    found = []
    for _ in range(steps_in_all):
        state, metrics = train_step(state, params, batch)
        found.append(float(metrics.loss))
    assert found[-1] < 0.85 * found[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4)

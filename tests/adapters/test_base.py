"""An adapter knows the base that it was trained on, and another one is refused."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from befm_jax.adapters import base, lora, peft
from befm_jax.adapters.lora import AdapterError
from befm_jax.llama import hf
from tests.helpers.small import SMALL, small_model


@pytest.fixture
def stored(tmp_path):
    """A model's directory, opened."""
    _, params = small_model()
    hf.save(tmp_path / "model", SMALL, params)
    return hf.open_model(tmp_path / "model")


def written(directory, fingerprint=None, named="lab/Model-8B"):
    _, params = small_model()
    adapter = lora.init(jax.random.key(0), params, rank=2)
    peft.save(directory, adapter, named, base_fingerprint=fingerprint)
    return directory


def other(directory):
    _, params = small_model(seed=1)
    hf.save(directory, SMALL, params)
    return hf.open_model(directory)


def test_an_adapter_is_for_its_own_base_alone(stored, tmp_path):
    adapter = written(tmp_path / "adapter", hf.fingerprint(stored))
    assert "was trained on" in base.check(adapter, stored, "any name")
    with pytest.raises(AdapterError) as error:
        base.check(adapter, other(tmp_path / "other"), "lab/other")
    for part in (str(adapter), "lab/Model-8B", "lab/other", "--force_base"):
        assert part in str(error.value)
    forced = base.check(adapter, other(tmp_path / "other"), "lab/other", force=True)
    assert forced.startswith("forced")


def test_a_base_saved_again_or_read_as_int8_is_the_same(stored, tmp_path):
    adapter = written(tmp_path / "adapter", hf.fingerprint(stored))
    config, params = hf.load(stored.directory)
    hf.save(tmp_path / "again", config, params, max_shard_bytes=8_000)
    assert base.check(adapter, hf.open_model(tmp_path / "again"), "x").startswith("the one")
    _, rounded = hf.load(stored.directory, quantize="int8")
    assert lora.attach(rounded, peft.load(adapter, config))


@pytest.mark.parametrize(
    ("named", "name", "outcome"),
    [
        ("meta-llama/Llama-3.1-8B", "/models/llama-3.1-8b", "the one that the adapter names"),
        ("lab/model@v2", "other/model", "the one that the adapter names"),
        ("/tmp/run/base", "lab/model", "unknown: the model is lab/model; .* '/tmp/run/base'"),
        ("", "lab/model", "unknown: .* does not say"),
    ],
)
def test_names_are_compared_where_there_is_no_fingerprint(stored, tmp_path, named, name, outcome):
    adapter = written(tmp_path / "adapter", named=named)
    assert re.fullmatch(outcome + ".*", base.check(adapter, stored, name))


def test_a_fingerprint_goes_where_the_weights_go(stored, tmp_path):
    """It is in their file: other weights in the same directory leave none behind."""
    directory = tmp_path / "adapter"
    written(directory, hf.fingerprint(stored))
    assert peft.base_of(directory) == (hf.fingerprint(stored), "lab/Model-8B")
    written(directory)
    assert peft.base_of(directory) == (None, "lab/Model-8B")
    fields = json.loads((directory / peft.CONFIG).read_text())
    del fields["base_model_name_or_path"]
    (directory / peft.CONFIG).write_text(json.dumps(fields))
    assert peft.base_of(directory) == (None, "")


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_an_adapter_that_is_not_finite_is_refused_by_its_tensor(tmp_path, value):
    _, params = small_model()
    adapter = lora.init(jax.random.key(0), params, rank=2)
    weight = adapter.weights["layers/mlp/up_proj"]
    weight["b"] = weight["b"].at[1, 3, 0].set(value)
    peft.save(tmp_path, adapter, "base")
    key = r"layers\.1\.mlp\.up_proj\.lora_B\.weight holds numbers that are not finite"
    with pytest.raises(AdapterError, match=key):
        peft.load(tmp_path, SMALL)

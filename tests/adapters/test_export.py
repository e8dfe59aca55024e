"""A tuned model taken elsewhere: transformers and PEFT read the same model there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from befm_jax import files
from befm_jax.adapters import chat_template, export, lora
from befm_jax.adapters import peft as peft_files
from befm_jax.data import games
from befm_jax.llama import config as llama_config
from befm_jax.llama import hf
from befm_jax.models import resolve_model, write_run
from befm_jax.respondents import engine, merging
from tests.helpers.small import game_tokenizer, small_model

ROOT = Path(__file__).resolve().parents[2]
GAME = "dictator"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def tuned(tmp_path_factory, request):
    """A base and an adapter on disk, with ranks that differ by layer."""
    directory = tmp_path_factory.mktemp("tuned")
    tokenizer = game_tokenizer()
    model, params = small_model(vocab_size=tokenizer.vocab_size)
    params = jax.tree.map(lambda leaf: leaf.astype(request.param), params)
    export.model(directory / "base", model.config, params, tokenizer)
    (directory / "base" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, *tokenizer.stop_ids], "temperature": 0.6})
    )
    spec = lora.LoraSpec(4, 8.0, rank_pattern=((r"layers\.1\.mlp\.up_proj", 2),))
    adapter = lora.init_from(jax.random.key(0), params, spec)
    noise = np.random.default_rng(3)
    for path, weight in adapter.weights.items():
        drawn = 0.3 * noise.standard_normal(weight["b"].shape)
        real = np.arange(weight["b"].shape[-1]) < np.array(adapter.per_layer(path).ranks)[:, None]
        weight["b"] = jnp.asarray(drawn * real[:, None, :], jnp.float32)
    peft_files.save(directory / "adapter", adapter, "base")
    chat_template.save(directory / "adapter", tokenizer.template_hash)
    return directory


def theirs(directory, ids, adapter=None):
    """transformers' logits for one prompt, with PEFT's adapter if there is one."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def command(*arguments, fails=False):
    found = subprocess.run(
        [sys.executable, "-m", "befm_jax.export", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"XLA_FLAGS": ""},
    )  # fmt: skip
    assert "Traceback" not in found.stderr, found.stderr
    assert (found.returncode != 0) == fails, found.stderr
    return found.stdout + found.stderr


def test_a_merged_model_is_base_and_adapter_to_transformers(tuned, tmp_path):
    printed = command(
        "merged", "--model", tuned / "base", "--adapter", tuned / "adapter",
        "--out", tmp_path / "merged", "--max_shard_size", "30KB", "--games", GAME,
    )  # fmt: skip
    ids = game_tokenizer().prompt(games.get(GAME).prompt())
    expected = theirs(tuned / "base", ids, tuned / "adapter")
    found = theirs(tmp_path / "merged", ids)
    stored = engine.load(tmp_path / "merged").params["norm"]["weight"].dtype
    bound = 1e-4 if stored == jnp.float32 else 0.05 * np.ptp(expected)
    assert np.abs(found - expected).max() <= bound
    assert (
        np.abs(theirs(tuned / "base", ids) - expected).max() > 10 * np.abs(found - expected).max()
    )

    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    distance = report["wasserstein"][GAME]
    assert distance["before"] != distance["after"] or stored == jnp.float32
    assert abs(distance["before"] - distance["after"]) < 1
    assert f"{distance['before']:.4f} before" in printed
    if stored == jnp.float32:
        assert report["largest_logit_difference"] < 1e-3
    assert 0 < report["largest_logit_difference"] < 0.1 * report["logit_range"]

    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors.index.json", "tokenizer.json", "config.json"} < names
    assert not any(name.startswith(".") for name in names)
    shards = list((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id[0] == 7
    back = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert back.get_chat_template() == game_tokenizer().hugging_face.get_chat_template()


def test_rounding_of_a_run_is_in_what_merging_changed(tuned, tmp_path):
    """A run is used rounded, but merged into the original weights: both are measured."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(tuned / "adapter", run / "adapter")
    about = {"model": str(tuned / "base"), "made_here": False, "adapter": "adapter"}
    moved = {}
    for quantize in ("no", "int8"):
        write_run(run, **about, dtype="float32", quantize=quantize, trained_on={})
        report = merging.merged(run, None, tmp_path / quantize, asked=[games.get(GAME)])
        moved[quantize] = report["largest_logit_difference"]
        assert report["merged"]["first_prompt"]["ids"]
    assert moved["int8"] > 1.5 * moved["no"]
    for one, other in zip(
        jax.tree.leaves(engine.load(tmp_path / "no").params),
        jax.tree.leaves(engine.load(tmp_path / "int8").params),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_nothing_is_exported_over_what_it_is_made_of(tuned, tmp_path):
    base, adapter = tuned / "base", tuned / "adapter"
    before = {path.name: path.read_bytes() for path in [*base.iterdir(), *adapter.iterdir()]}
    for out in (base, adapter):
        printed = command("merged", "--model", base, "--adapter", adapter, "--out", out, fails=True)
        assert "give another directory" in printed
    assert "give another directory" in command(
        "adapter", "--model", base, "--adapter", adapter, "--out", adapter, fails=True
    )
    after = {path.name: path.read_bytes() for path in [*base.iterdir(), *adapter.iterdir()]}
    assert after == before
    (tmp_path / "run.json").write_text("{}")
    assert "is a training run" in command(
        "merged", "--model", base, "--adapter", adapter, "--out", tmp_path, fails=True
    )
    (tmp_path / "file").write_text("")
    assert "is a file" in command(
        "merged", "--model", base, "--adapter", adapter, "--out", tmp_path / "file", fails=True
    )
    assert "--humans goes with --games" in command(
        "merged", "--model", base, "--out", tmp_path / "x", "--humans", "x.csv", fails=True
    )


def test_an_old_hash_of_a_template_does_not_stay_beside_another_adapter(tuned, tmp_path):
    shutil.copytree(tuned / "adapter", tmp_path / "unknown")
    (tmp_path / "unknown" / chat_template.FILE).unlink()
    chat_template.save(tmp_path / "out", "0" * 64)
    resolved = resolve_model(tuned / "base", tmp_path / "unknown")
    export.adapter(resolved, tmp_path / "out")
    assert chat_template.read(tmp_path / "out") is None


def test_an_exported_adapter_is_the_same_to_peft(tuned, tmp_path):
    printed = command(
        "adapter", "--model", tuned / "base", "--adapter", tuned / "adapter",
        "--out", tmp_path / "out", "--base", "lab/base-8b",
    )  # fmt: skip
    assert "adapter: " in printed
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "lab/base-8b"
    ids = list(range(5, 60))
    np.testing.assert_array_equal(
        theirs(tuned / "base", ids, tmp_path / "out"),
        theirs(tuned / "base", ids, tuned / "adapter"),
    )
    assert chat_template.read(tmp_path / "out")[0] == game_tokenizer().template_hash


def test_an_adapter_is_exported_for_its_own_base_alone(tuned, tmp_path):
    base, adapter = tuned / "base", tmp_path / "adapter"
    stored = hf.open_model(base)
    loaded = peft_files.load(tuned / "adapter", stored.config)
    fingerprint = hf.fingerprint(stored)
    peft_files.save(adapter, loaded, "base", base_fingerprint=fingerprint)
    flags = "adapter", "--model", base, "--adapter", adapter, "--out", tmp_path / "out"
    for named in ((), ("--base", base), ("--base", "lab/base-8b")):
        printed = command(*flags, *named, "--overwrite")
        unknown = "fits that base is not known: lab/base-8b: no such base directory" in printed
        assert unknown == (named[1:] == ("lab/base-8b",))
        assert peft_files.base_of(tmp_path / "out")[0] == fingerprint

    for name, seed, shape in (("wider", 0, {"intermediate_size": 64}), ("other", 1, {})):
        other, params = small_model(seed, vocab_size=stored.config.vocab_size, **shape)
        export.model(tmp_path / name, other.config, params, game_tokenizer())
    shutil.rmtree(tmp_path / "out")
    for named, reason in (
        (("--base", tmp_path / "wider"), "does not fit"),
        (("--base", tmp_path / "wider", "--force_base"), "does not fit"),
        (("--base", tmp_path / "other"), "trained on another base"),
        (("--model", tmp_path / "other"), "trained on another base"),
    ):
        assert reason in command(*flags, *named, fails=True)
    assert "--force_base" in command(
        "merged", "--model", tmp_path / "other", "--adapter", adapter, "--out", tmp_path / "out",
        fails=True,
    )  # fmt: skip
    assert not (tmp_path / "out").exists()
    command(*flags, "--base", tmp_path / "other", "--force_base")
    assert peft_files.base_of(tmp_path / "out") == (fingerprint, str(tmp_path / "other"))


def test_what_can_not_be_exported_is_said(tuned, tmp_path):
    base, out = tuned / "base", tmp_path / "out"
    assert "no adapter to export" in command("adapter", "--model", base, "--out", out, fails=True)
    assert "such as 5GB" in command(
        "merged", "--model", base, "--out", out, "--max_shard_size", "large", fails=True
    )
    assert "no such model directory" in command(
        "merged", "--model", tmp_path / "no", "--out", out, fails=True
    )
    rounded = engine.load(base, tuned / "adapter", quantize="int8")
    with pytest.raises(lora.AdapterError, match="original weights"):
        export.model(out, rounded.model.config, rounded.params, rounded.tokenizer)
    assert not out.exists() or list(out.iterdir()) == []


def test_over_several_devices_the_same_model_is_compared_and_written(tuned, tmp_path):
    names = tuned / "base", tuned / "adapter"
    written, logits = [], []
    for devices in (1, 4):
        used = engine.load(*names, dtype="float32", devices=devices)
        logits.append(merging.answer_logits(used, [games.get(GAME)], whole=True)[0])
        out = tmp_path / str(devices)
        export.model(out, used.model.config, used.params, used.tokenizer)
        written.append(engine.load(out).params)
    assert used.origin["mesh"] == "data 2 x tensor 2"
    np.testing.assert_allclose(*logits, atol=1e-4)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=1e-6, atol=1e-7
        ),
        *written,
    )


def test_a_model_without_a_generation_config_is_given_one_that_stops(tuned, tmp_path):
    loaded = engine.load(tuned / "base")
    export.model(tmp_path, loaded.model.config, loaded.params, loaded.tokenizer)
    found = GenerationConfig.from_pretrained(tmp_path)
    assert tuple(found.eos_token_id) == loaded.tokenizer.stop_ids
    assert llama_config.read(tmp_path) == loaded.model.config
    assert resolve_model(tmp_path).adapter is None


def test_a_failing_file_beside_the_weights_leaves_the_old_model(tuned, tmp_path):
    loaded = engine.load(tuned / "base")
    export.model(tmp_path, loaded.model.config, loaded.params, loaded.tokenizer)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    class Unwritable:
        def save(self, directory):
            (Path(directory) / "no" / "such" / "folder").write_text("")

    with pytest.raises(files.NotWrittenError, match="No such file"):
        export.model(tmp_path, loaded.model.config, loaded.params, Unwritable())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

"""What the tool says of rounding, against the model's own figures and a brute-force divergence."""

import json
import math
import subprocess
import sys
from pathlib import Path

import int8_quality
import jax
import numpy as np
import pytest

import befm_jax
from befm_jax.adapters import export, lora, peft
from befm_jax.data import games
from befm_jax.data.responses import Exact, Response
from befm_jax.evals.evaluate import evaluate
from befm_jax.respondents import merging
from befm_jax.tasks import sources
from tests.helpers.small import game_tokenizer, small_model

ROOT = Path(__file__).resolve().parents[2]
GAMES = "public_goods,trust_banker"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A random model whose answers differ, and an adapter that moves them."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = game_tokenizer()
    model, params = small_model(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.stop_ids)
    export.model(directory, model.config, params, tokenizer)
    adapter = lora.init(jax.random.key(0), params, rank=2)
    for weight in adapter.weights.values():
        weight["b"] = 0.1 * jax.random.normal(jax.random.key(1), weight["b"].shape)
    peft.save(directory / "adapter", adapter, "here", tokenizer.template_hash)
    return directory


@pytest.fixture(scope="module")
def report(stored, tmp_path_factory):
    out = tmp_path_factory.mktemp("figures") / "int8.json"
    found = subprocess.run(
        [sys.executable, "tools/int8_quality.py", "--model", stored, "--adapter",
         stored / "adapter", "--games", GAMES, "--resamples", "200", "--json", out],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "root mean square" in found.stdout
    assert "public_goods" in found.stdout
    return json.loads(out.read_text())


def test_both_sides_have_the_measures_of_games_with_their_intervals(stored, report):
    (everybody,) = sources.select("games", games.select(GAMES))
    items = everybody.part("test").items()
    for side, quantize in (("stored", "no"), ("int8", "int8")):
        model = befm_jax.load(stored, adapter=stored / "adapter", quantize=quantize)
        responses = {one.item: one for one in model.respond(items, Exact())}
        found = evaluate(everybody.task, items, responses, respondent="model", resamples=200)
        expected = {(one.measure, one.where.get("game", "mean")): one for one in found.figures}
        assert set(report["measures"]) == {name for name, _ in expected}
        for name, figures in report["measures"].items():
            for where, one in {"mean": figures["mean"], **figures["games"]}.items():
                theirs = expected[name, where]
                assert one[side]["value"] == pytest.approx(theirs.value, rel=1e-5, abs=1e-6)
                assert one[side]["ci95"] == pytest.approx(theirs.ci95, rel=1e-4, abs=1e-5)


def test_a_difference_is_that_of_the_sides_and_surer_than_either(report):
    moved = 0
    for figures in report["measures"].values():
        for one in (figures["mean"], *figures["games"].values()):
            difference = one["difference"]
            assert difference["value"] == pytest.approx(
                one["int8"]["value"] - one["stored"]["value"]
            )
            low, high = difference["ci95"]
            moved += difference["value"] != 0
            width = one["stored"]["ci95"][1] - one["stored"]["ci95"][0]
            assert high - low <= width + 1e-12
    assert moved > 20


def test_logit_errors_are_those_of_the_two_models(stored, report):
    chosen = games.select(GAMES)
    logits = [
        np.concatenate(
            merging.answer_logits(
                befm_jax.load(stored, adapter=stored / "adapter", quantize=quantize),
                chosen,
                whole=True,
            )
        )
        for quantize in ("no", "int8")
    ]
    error = logits[1] - logits[0]
    assert report["logit_range"] == pytest.approx(np.ptp(logits[0]), rel=1e-4)
    assert report["logit_error"]["largest"] == pytest.approx(np.abs(error).max(), rel=1e-3)
    assert report["logit_error"]["rms"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-3)
    assert 0 < report["logit_error"]["largest"] < 0.05 * report["logit_range"]


def test_divergence_counts_what_is_no_answer_as_one_more():
    stored = Response("a", np.array([0.5, 0.5, 0.0]), exact=True, outside=0.2)
    rounded = Response("a", np.array([0.25, 0.5, 0.25]), exact=True, outside=0.1)
    cells = ((0.4, 0.225), (0.4, 0.45), (0.2, 0.1))
    expected = sum(p * math.log(p / q) for p, q in cells)
    assert int8_quality.divergence(stored, rounded) == pytest.approx(expected)
    assert int8_quality.divergence(rounded, stored) == math.inf


def test_a_model_that_is_not_there_is_answered(tmp_path):
    found = subprocess.run(
        [sys.executable, "tools/int8_quality.py", "--model", tmp_path / "none"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert "no such model directory" in found.stderr

"""Model cards: what a reader on the hub learns of an export."""

import json
from pathlib import Path

from befm_jax.evals.results import Results
from befm_jax.models import ResolvedModel
from befm_jax.respondents import model_card
from tests.helpers import made_up_results

SOURCE = {
    "task": "games", "source": "mine.csv", "split": "train", "split_seed": 3,
    "fingerprint": "ab" * 32, "sketch": "",
}  # fmt: skip


def test_it_names_base_data_and_figures(tmp_path):
    made: Results = made_up_results.made_up()
    made.write(tmp_path)
    run = {"trained_on": {"sources": [SOURCE], "examples": "chats.jsonl"}}
    resolved = ResolvedModel(tmp_path, "meta-llama/Llama-3.1-8B", run=run)
    card = model_card.text(str(tmp_path), resolved, "meta-llama/Llama-3.1-8B", "peft")
    head, body = card.removeprefix("---\n").split("---\n", 1)
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    assert json.loads(fields["base_model"]) == "meta-llama/Llama-3.1-8B"
    assert fields["library_name"] == "peft"
    assert "license" in fields
    assert f"mine.csv, train split of seed 3; fingerprint `{'ab' * 32}`" in body
    assert "chats.jsonl" in body
    assert 'PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")' in body
    figure = made.figure("games", made.select("games")[0].measure, made.main)
    assert f"| games | {figure.measure} | {figure.value:.2f} |" in body


def test_of_a_model_without_a_run_it_says_how_to_load_it():
    resolved = ResolvedModel(Path(), "mine")
    card = model_card.text("mine", resolved, "mine", "transformers")
    assert 'AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")' in card
    assert "Trained on" not in card
    assert "Figures" not in card

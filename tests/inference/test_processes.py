"""Two real processes answer as one: each holds all scores and all draws."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

import befm_jax
from befm_jax.adapters import lora, peft
from befm_jax.llama import hf
from tests.helpers.small import game_tokenizer, small_model

ROOT = Path(__file__).resolve().parents[2]
ANSWER = """
import argparse, json, pathlib
import jax

parser = argparse.ArgumentParser()
parser.add_argument("--coordinator")
parser.add_argument("--processes", type=int)
parser.add_argument("--process_id", type=int)
parser.add_argument("--directory", type=pathlib.Path)
flags = parser.parse_args()
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(flags.coordinator, flags.processes, flags.process_id)

import befm_jax

directory = flags.directory
model = befm_jax.load(directory / "model", directory / "adapter", devices=jax.devices())
people = model.simulate("public_goods", 50, seed=2)
found = {
    "mesh": model.origin["mesh"],
    "distribution": model.distribution("public_goods").shares.tolist(),
    "texts": people.texts,
    "choices": people.choices,
}
(directory / f"process{flags.process_id}.json").write_text(json.dumps(found))
"""


def test_two_processes_hold_the_answers_of_one(tmp_path):
    tokenizer = game_tokenizer()
    model, params = small_model(vocab_size=tokenizer.vocab_size)
    hf.save(tmp_path / "model", model.config, params)
    tokenizer.save(tmp_path / "model")
    adapter = lora.init(jax.random.key(0), params, rank=2)
    for number, weight in enumerate(adapter.weights.values()):
        weight["b"] = 0.05 * jax.random.normal(jax.random.key(number), weight["b"].shape)
    peft.save(tmp_path / "adapter", adapter, "model", tokenizer.template_hash)

    done = subprocess.run(
        [
            *(sys.executable, ROOT / "launch" / "local_pod.py", "--processes", "2"),
            *("--devices-per-process", "2", "--", sys.executable, "-c", ANSWER),
            *("--directory", tmp_path),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (
        json.loads((tmp_path / f"process{number}.json").read_text()) for number in range(2)
    )
    assert first == second
    assert first["mesh"] == "data 2 x tensor 2"
    alone = befm_jax.load(tmp_path / "model", tmp_path / "adapter")
    assert alone.origin["mesh"] == "one device"
    people = alone.simulate("public_goods", 50, seed=2)
    assert (first["texts"], first["choices"]) == (people.texts, people.choices)
    assert len(set(people.texts)) > 40
    np.testing.assert_allclose(
        first["distribution"], alone.distribution("public_goods").shares, rtol=1e-4
    )

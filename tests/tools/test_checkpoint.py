"""What the tool says of a checkpoint, against what was put there."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from befm_jax.llama import hf
from tests.helpers.small import small_model

ROOT = Path(__file__).resolve().parents[2]


def said(*arguments):
    found = subprocess.run(
        [sys.executable, "tools/checkpoint.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in found.stderr
    return found.stdout, found.stderr


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    model, params = small_model(vocab_size=96)
    hf.save(directory, model.config, params, max_shard_bytes=30_000)
    return directory, params


def test_every_kind_is_listed_with_its_shape_and_bytes(stored):
    directory, params = stored
    printed, _ = said(directory, "--fsdp", 4, "--tensor", 2)
    row = re.search(r"model\.layers\.\*\.mlp\.up_proj\.weight +2 +48x32 +F32 +([\d,]+)", printed)
    assert row
    assert int(row[1].replace(",", "")) == params["layers"]["mlp"]["up_proj"]["weight"].nbytes
    leaves = jax.tree.leaves(params)
    numbers, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    assert f"{numbers:,} numbers, {size:,} bytes" in printed
    assert "a whole llama: 2 layers of width 32, vocabulary 96" in printed
    norms = 5 * 32 * 4
    assert f"{(size - norms) // 8 + norms:,} bytes a device at most" in printed
    assert printed.count(".safetensors: ") == len(list(directory.glob("*.safetensors")))


def test_each_tensor_is_listed_when_asked(stored):
    printed, _ = said(stored[0], "--tensors")
    for layer in range(2):
        assert f"model.layers.{layer}.self_attn.q_proj.weight" in printed


def test_mistakes_are_answered(stored, tmp_path):
    assert "no such model directory" in said(tmp_path / "none")[1]
    assert "tensor x fsdp of 5" in said(stored[0], "--tensor", 5)[1]
    (tmp_path / "model.safetensors").write_bytes(b"no")
    assert "not a readable safetensors file" in said(tmp_path)[1]

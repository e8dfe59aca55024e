"""Model directories, adapters and runs with bytes changed: read, or refused in a line.

What a run wrote is checksummed, so that of it no changed byte is read.  A directory from elsewhere
has no sums; there, nothing may end in a stack trace.
"""

import random
import re
import shutil

import jax
import numpy as np
import pytest

from befm_jax import checksums, files, models
from befm_jax.adapters import base, chat_template, lora, peft
from befm_jax.errors import UserError
from befm_jax.llama import hf
from befm_jax.models import write_run
from befm_jax.respondents.engine import fitting_tokenizer
from tests.helpers.damage import damaged
from tests.helpers.small import game_tokenizer, small_model

MUTATIONS = 12
TRAINED_ON = {"sources": [], "examples": ""}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run: a base, an adapter of it, and what `train` writes beside them."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = game_tokenizer()
    model, params = small_model(vocab_size=tokenizer.vocab_size)
    hf.save(folder / "base", model.config, params)
    tokenizer.save(folder / "base")
    adapter = lora.init(jax.random.key(0), params, rank=2)
    fingerprint = hf.fingerprint(hf.open_model(folder / "base"))
    peft.save(folder / "adapter", adapter, "base", tokenizer.rendered_hash(), fingerprint)
    write_run(
        folder, model="base", made_here=True, adapter="adapter", dtype="float32", quantize="no",
        trained_on=TRAINED_ON,
    )  # fmt: skip
    checksums.add(folder, ["run.json", "base", "adapter"])
    return folder


def read(directory, adapter):
    """Everything that is read of a model and an adapter before it answers."""
    stored = hf.open_model(directory)
    tokenizer = fitting_tokenizer(directory, stored.config)
    chat_template.check(adapter, tokenizer)
    base.check(adapter, stored, "base", force=True)
    peft.load(adapter, stored.config)
    hf.load(directory)


def files_of(folder):
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != checksums.FILE
    ]


def same_json(changed, content):
    """Whether two texts are the same JSON value: a line end between two fields is no damage."""
    try:
        return files.parse_json(changed) == files.parse_json(content)
    except ValueError:
        return False


def test_of_a_run_no_changed_byte_is_read(made, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    names = files_of(run)
    assert len(names) > 7
    for name in [*names, checksums.FILE]:
        content = (run / name).read_bytes()
        for seed in range(MUTATIONS):
            changed = damaged(content, random.Random(f"{name} {seed}"), "json" in name)
            (run / name).write_bytes(changed)
            if changed == content or (name == checksums.FILE and same_json(changed, content)):
                models.resolve_model(run)
                continue
            with pytest.raises(UserError, match=re.escape(f"{run}/{name} ")) as caught:
                models.resolve_model(run)
            assert "\n" not in str(caught.value)
        (run / name).write_bytes(content)
        (run / name).rename(run / "away")
        if name not in (checksums.FILE, "run.json"):
            with pytest.raises(UserError, match=re.escape(f"{run}/{name} is missing")):
                models.resolve_model(run)
        (run / "away").rename(run / name)
    models.resolve_model(run)


def test_a_directory_from_elsewhere_is_read_or_refused_in_a_line(made, tmp_path):
    refusals = []
    for name in files_of(made):
        if name == "run.json":
            continue
        folder = shutil.copytree(made, tmp_path / name.replace("/", "-"))
        content = (folder / name).read_bytes()
        for seed in range(MUTATIONS):
            rng = random.Random(f"{name} {seed}")
            (folder / name).write_bytes(damaged(content, rng, name.endswith(".json")))
            try:
                read(folder / "base", folder / "adapter")
            except (UserError, FileNotFoundError) as error:
                refusals.append((str(folder), str(error)))
    assert len(refusals) > MUTATIONS
    assert [line for folder, line in refusals if folder not in line or "\n" in line] == []


def test_weights_of_a_run_that_are_not_finite_are_a_changed_file(made, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    path = run / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32("nan").tobytes()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is not as it was written"):
        models.resolve_model(run)

"""A tuned model leaves: as an adapter for PEFT and vLLM, or merged, for whatever reads a Llama.

Merging adds the adapter's update to weights that may have few digits, and rounds the sum to them.
What that moved is measured on the model read back from its files: `answer_logits` before and after,
and the distances to people where asked for (`tools/export.py` does both).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from befm_jax.adapters import chat_template, peft
from befm_jax.data.games import Game
from befm_jax.inference.score import bucket
from befm_jax.llama import generation_config, hf
from befm_jax.llama.attention import ForestAttention
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama, Params, hidden_states, vocabulary_logits
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.simulator import Located, Simulator


def model(
    directory: str | Path,
    config: LlamaConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    source: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model that transformers and `befm_jax.load` read, all of it or nothing.

    Weights in shards of at most `max_shard_bytes` with an index, an adapter merged into them as
    they are written; `config.json`; the tokenizer with its chat template; and
    `generation_config.json`, that of the `source` directory where it has one.

    Raises:
        AdapterError: an adapter on a quantised base: it is merged into original weights alone.
        NotWrittenError: there is no room, or a file can't be written.
    """

    def beside(folder: Path) -> None:
        tokenizer.save(folder)
        if source is not None and (source / generation_config.FILE).is_file():
            generation_config.copy(source, folder)
        else:
            ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids)}
            (folder / generation_config.FILE).write_text(json.dumps(ends), encoding="utf-8")

    hf.save(directory, config, params, max_shard_bytes, beside)


def adapter(located: Located, config: LlamaConfig, directory: str | Path, base: str = "") -> None:
    """Writes the adapter of a located model in PEFT's format.

    `base` is the name under which others find the base model (a hub id, say); by default the one
    that it was loaded by.

    Raises:
        AdapterError: there is none, or it can't be read.
        NotWrittenError: a file can't be written.
    """
    if located.adapter is None:
        raise peft.AdapterError(f"{located.name}: has no adapter to export")
    peft.save(directory, peft.load(located.adapter, config), base or located.name)
    known = chat_template.read(located.adapter)
    if known is not None:
        chat_template.save(directory, known[0])


def answer_logits(simulator: Simulator, games: Sequence[Game]) -> list[Float32[np.ndarray, "T V"]]:
    """Logits at which each game's answers are read: from the end of its prompt through one answer.

    Of the game's first answer; one array a game.
    """
    found = []
    for game in games:
        prompt = simulator.tokenizer.prompt(*game.prompt())
        answer = simulator.tokenizer.answer(game.answers.format(int(game.values[0])))
        ids = prompt + answer[:-1]
        tokens = np.zeros((1, bucket(len(ids))), np.int32)
        tokens[0, : len(ids)] = ids
        logits = _all_logits(simulator.model)(simulator.params, tokens, len(ids))
        found.append(np.asarray(logits)[0, len(prompt) - 1 : len(ids)])
    return found


@lru_cache(maxsize=4)
def _all_logits(model: Llama) -> Any:
    def run(params: Params, tokens: Any, length: Any) -> Any:
        slots = jnp.arange(tokens.shape[1])[None, :]
        end = jnp.where(slots < length, length - 1, slots)
        hidden, _ = hidden_states(model, params, tokens, slots, ForestAttention(end))
        return vocabulary_logits(model, params, hidden)

    return jax.jit(run)

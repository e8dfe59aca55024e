"""A model merged with its adapter, and what merging moved.

Merging adds the adapter's update to weights that may have few digits, and rounds the sum to them.
What that moved is measured on the model read back from its files: logits where answers are read,
and, where asked for, the distances to people.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from befm_jax.adapters import export
from befm_jax.data.games import Game
from befm_jax.data.responses import Exact
from befm_jax.evals.evaluate import evaluate
from befm_jax.inference.score import bucket
from befm_jax.llama import linear
from befm_jax.llama.attention import ForestAttention
from befm_jax.llama.model import Llama, Params, hidden_states, vocabulary_logits
from befm_jax.models import resolve_model
from befm_jax.respondents.engine import Engine, load
from befm_jax.tasks.games import item_of
from befm_jax.tasks.sources import Source


def merged(
    name: str | Path,
    adapter: str | Path | None,
    directory: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    asked: Sequence[Game],
    people: Source | None = None,
    force_template: bool = False,
) -> dict[str, Any]:
    """Writes a model with its adapter merged (`model`), reads it back, and says what changed.

    `name` and `adapter` are those of `befm_jax.load`; logits are compared on the prompts of the
    `asked` games, distances to `people` (of the task "games") where they are given.  What is
    compared is the model as it is used: where a run rounds its base to int8, the difference of the
    rounding is in it, since an adapter is merged into the original weights.

    Returns a dictionary: `merged` (what it was made of), `largest_logit_difference`, `logit_range`,
    `wasserstein` (game -> before and after).

    Raises:
        FileNotFoundError, UserError: as `befm_jax.load` and `model`; `directory` is one of the
            model's own.
    """
    resolved = resolve_model(name, adapter)
    export.check_out(Path(directory), resolved)
    used = load(name, adapter, force_template=force_template)
    logits, before = answer_logits(used, asked), _distances(used, people)
    origin, dtype = (
        used.describe() | {"first_prompt": used.first_prompt([item_of(game) for game in asked])},
        jnp.dtype(used.model.dtype).name,
    )
    if used.origin["quantize"] != "no":
        del used
        used = load(name, adapter, quantize="no", force_template=force_template)
    export.model(
        directory,
        used.model.config,
        used.params,
        used.tokenizer,
        source=resolved.directory,
        max_shard_bytes=max_shard_bytes,
    )
    del used  # its memory is needed for the model that was written
    written = load(directory, dtype=dtype)
    moved = max(
        float(np.abs(one - other).max())
        for one, other in zip(answer_logits(written, asked), logits, strict=True)
    )
    after = _distances(written, people)
    return {
        "merged": origin,
        "largest_logit_difference": moved,
        "logit_range": max(float(np.ptp(one)) for one in logits),
        "wasserstein": {game: {"before": before[game], "after": after[game]} for game in before},
    }


def _distances(engine: Engine, people: Source | None) -> dict[str, float | None]:
    """Each game's Wasserstein distance to people (its range is 100), and the mean."""
    if people is None:
        return {}
    items = people.items()
    responses = {one.item: one for one in engine.respond(items, Exact())}
    found = evaluate(people.task, items, responses, respondent="model", resamples=100)
    return {
        figure.where.get("game", "mean"): figure.value
        for figure in found.figures
        if figure.measure == "wasserstein"
    }


def answer_logits(
    simulator: Engine, games: Sequence[Game], whole: bool = False
) -> list[Float32[np.ndarray, "T V"]]:
    """Logits at which each game's answers are read: from the end of its prompt through one answer.

    Of the game's first answer; one array a game.  With `whole`, from the prompt's first token on.
    """
    found = []
    for game in games:
        prompt = simulator.tokenizer.prompt(game.prompt())
        answer = simulator.tokenizer.answer(game.answers.written[0])
        ids = prompt + answer[:-1]
        # Every device that shares rows has one; all are the same.
        rows = linear.parts(simulator.model.layout, "rows")
        tokens = np.zeros((rows, bucket(len(ids))), np.int32)
        tokens[:, : len(ids)] = ids
        logits = _all_logits(simulator.model)(simulator.params, tokens, len(ids))
        found.append(np.asarray(logits)[0, 0 if whole else len(prompt) - 1 : len(ids)])
    return found


@lru_cache(maxsize=4)
def _all_logits(model: Llama) -> Any:
    def run(params: Params, tokens: Any, length: Any) -> Any:
        slots = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        end = jnp.where(slots < length, length - 1, slots)
        hidden, _ = hidden_states(model, params, tokens, slots, ForestAttention(end, model.layout))
        return vocabulary_logits(model, params, hidden)

    return jax.jit(run)

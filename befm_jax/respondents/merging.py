"""Merges a model with its adapter, and measures the rounding error of merging.

Merging rounds the sum of weights and the adapter's update to the dtype of the weights.  The error
is measured on the model loaded from the written files: differences of logits at the answers, and,
optionally, of distances to people.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
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
from befm_jax.inference import checks
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
    force_base: bool = False,
) -> dict[str, Any]:
    """Writes a model with its adapter merged, loads it, and returns what changed.

    `name` and `adapter` are those of `befm_jax.load`; logits are compared on the prompts of the
    `asked` games, distances to `people` (of the task "games") where given.  Where a run quantises
    its base to int8, the differences include the quantisation error, since the adapter is merged
    into the original weights.

    Returns a dictionary: `merged` (metadata of the model and adapter),
    `largest_logit_difference`, `logit_range`, `wasserstein` (game -> before and after).

    Raises:
        FileNotFoundError, UserError: as `befm_jax.load` and `export.model`; `directory` is one of
            the model's own.
    """
    resolved = resolve_model(name, adapter)
    export.check_out(Path(directory), resolved)
    loaded = partial(load, name, adapter, force_template=force_template, force_base=force_base)
    engine = loaded()
    logits, before = answer_logits(engine, asked), _distances(engine, people)
    first_prompt = engine.first_prompt([item_of(game) for game in asked])
    origin = engine.describe() | {"first_prompt": first_prompt}
    dtype = jnp.dtype(engine.model.dtype).name
    if engine.origin["quantize"] != "no":
        del engine
        engine = loaded(quantize="no")
    export.model(
        directory,
        engine.model.config,
        engine.params,
        engine.tokenizer,
        source=resolved.directory,
        max_shard_bytes=max_shard_bytes,
    )
    del engine  # frees memory for the written model
    written = load(directory, dtype=dtype)
    difference = max(
        float(np.abs(new - old).max())
        for new, old in zip(answer_logits(written, asked), logits, strict=True)
    )
    after = _distances(written, people)
    return {
        "merged": origin,
        "largest_logit_difference": difference,
        "logit_range": max(float(np.ptp(array)) for array in logits),
        "wasserstein": {game: {"before": before[game], "after": after[game]} for game in before},
    }


def _distances(engine: Engine, people: Source | None) -> dict[str, float | None]:
    """Each game's Wasserstein distance to people (its range is 100), and the mean."""
    if people is None:
        return {}
    items = people.items()
    responses = {response.item: response for response in engine.respond(items, Exact())}
    evaluation = evaluate(people.task, items, responses, respondent="model", resamples=100)
    return {
        figure.where.get("game", "mean"): figure.value
        for figure in evaluation.figures
        if figure.measure == "wasserstein"
    }


def answer_logits(
    simulator: Engine, games: Sequence[Game], whole: bool = False
) -> list[Float32[np.ndarray, "T V"]]:
    """Logits that predict each game's first answer, one array per game.

    With `whole`, logits from the prompt's first token on.  Raises NonFiniteError where one is not
    finite.
    """
    by_game = []
    for game in games:
        prompt = simulator.tokenizer.prompt(game.prompt())
        answer = simulator.tokenizer.answer(game.answers.written[0])
        ids = prompt + answer[:-1]
        # The same row once per data-parallel device.
        rows = linear.parts(simulator.model.layout, "rows")
        tokens = np.zeros((rows, bucket(len(ids))), np.int32)
        tokens[:, : len(ids)] = ids
        logits = _all_logits(simulator.model)(simulator.params, tokens, len(ids))
        read = np.asarray(logits)[0, 0 if whole else len(prompt) - 1 : len(ids)]
        if not np.isfinite(read).all():
            raise checks.non_finite(simulator.params)
        by_game.append(read)
    return by_game


@lru_cache(maxsize=4)
def _all_logits(model: Llama) -> Any:
    def run(params: Params, tokens: Any, length: Any) -> Any:
        slots = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        end = jnp.where(slots < length, length - 1, slots)
        hidden, _ = hidden_states(model, params, tokens, slots, ForestAttention(end, model.layout))
        return vocabulary_logits(model, params, hidden)

    return jax.jit(run)

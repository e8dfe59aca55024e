"""A model on this machine's devices as a respondent: `befm_jax.load(...)`.

It answers items exactly, every answer scored, or by draws; `.distribution(game)` and
`.simulate(game, n)` ask it for one game.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from befm_jax import models
from befm_jax.adapters import chat_template, lora, peft
from befm_jax.config import DTYPES
from befm_jax.data import games
from befm_jax.data.games import Game
from befm_jax.data.items import AnswerSet, FreeText, Item
from befm_jax.data.responses import Exact, How, Response, Sampled
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed import transfer
from befm_jax.errors import DataError, UserError
from befm_jax.inference import sample, score
from befm_jax.inference.next_token import Sampling
from befm_jax.inference.sample import Draws, Request
from befm_jax.llama import config as llama_config
from befm_jax.llama import generation_config, hf
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama, Params
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.models import ResolvedModel, resolve_model


@dataclass(frozen=True)
class Simulation:
    """What a simulated population answered in one game.

    `choices`: one a participant, in the game's unit (a named action by its number); None where the
    text held no answer of the set.  `texts`: what they wrote, untrusted text of a model.
    `response`: the counts.
    """

    game: str
    choices: list[float | None]
    texts: list[str]
    response: Response


@dataclass(frozen=True)
class Engine:
    """A model with its tokenizer, ready to answer (a `data.responses.Respondent`).

    `origin` says what was loaded, for output files; `resolved` is where its files are; `cache` is
    what sampling keeps keys and values in ("full" or "int8").
    """

    model: Llama
    params: Params
    tokenizer: Tokenizer
    origin: dict[str, Any]
    resolved: ResolvedModel
    cache: str = "full"

    @property
    def name(self) -> str:
        """What it was loaded by."""
        return str(self.origin["path"])

    @property
    def device(self) -> str:
        """The number and kind of the devices that share the model, in words."""
        return meshes.devices_in_words(jax.tree.leaves(self.params)[0].sharding.device_set)

    def describe(self) -> dict[str, Any]:
        """What was loaded: path, commit, adapter, template, dtype, mesh."""
        return self.origin | ({"cache": self.cache} if self.cache != "full" else {})

    def respond(self, items: Sequence[Item], how: How) -> Iterator[Response]:
        """A response to every item.

        Exact: in the items' order, packed; what their prompts share is computed once, and what else
        is asked moves a response by float rounding at most.  Sampled: each as it is done; the seed
        of `how` and an item's id say who its participants are, whatever else is asked.

        Raises:
            DataError: free text cannot be scored.
            RowTooShortError: a prompt with an answer is longer than `score.LONGEST_ROW` tokens.
        """
        return self._exact(items) if isinstance(how, Exact) else self._sampled(items, how)

    def _exact(self, items: Sequence[Item]) -> Iterator[Response]:
        encoded = lru_cache(maxsize=None)(self.tokenizer.answer)

        def question(item: Item) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
            if isinstance(item.answers, FreeText):
                raise DataError(f"item {item.id}: free text has no distribution; draw it instead")
            return self.tokenizer.prompt(item.prompt), [encoded(a) for a in item.answers.written]

        scored = score.each_answers(self.model, self.params, map(question, items))
        for item, found in zip(items, scored, strict=True):
            yield Response(
                item.id,
                found.probabilities,
                exact=True,
                outside=found.outside,
                ends_after_answer=found.ends_after_answer,
            )

    def _sampled(self, items: Sequence[Item], how: Sampled) -> Iterator[Response]:
        # Items of one length of answers together: the loop goes on until the longest is done.
        by_length: dict[int, list[Item]] = {}
        for item in items:
            free = isinstance(item.answers, FreeText)
            length = item.answers.max_tokens if free else how.max_tokens  # type: ignore[union-attr]
            by_length.setdefault(length, []).append(item)
        for length, together in by_length.items():
            requests = [
                Request(self.tokenizer.prompt(item.prompt), how.n, _seed(how.seed, item.id))
                for item in together
            ]
            populations = sample.each_population(
                self.model,
                self.params,
                requests,
                stop_ids=self.tokenizer.stop_ids,
                sampling=Sampling(how.temperature, how.top_k, how.top_p, length, self.cache),
            )
            for number, draws in populations:
                yield self._response(together[number], draws)

    def _response(self, item: Item, draws: Draws) -> Response:
        rows = [
            tuple(row[:length].tolist())
            for row, length in zip(draws.tokens, draws.lengths, strict=True)
        ]
        texts = tuple(self.tokenizer.decode(row) for row in rows)
        if isinstance(item.answers, FreeText):
            return Response(item.id, None, exact=False, draws=len(texts), texts=texts)
        answers: AnswerSet = item.answers
        parsed = [answers.parse(text) for text in texts]
        positions = [one.position for one in parsed if one.position is not None]
        # Of those who began with an answer as it is written, who left it at that?
        stems = {self.tokenizer.answer(text)[:-1] for text in answers.written}
        lengths = {len(stem) for stem in stems}
        left_at_that = [
            bool(stopped) and row in stems
            for row, stopped in zip(rows, draws.stopped, strict=True)
            if any(row[:length] in stems for length in lengths)
        ]
        return Response.from_counts(
            item.id,
            np.bincount(positions, minlength=len(answers)),
            unread=sum(one.reason == "no answer" for one in parsed),
            not_allowed=sum(one.reason == "outside the answer set" for one in parsed),
            texts=texts,
            ends_after_answer=float(np.mean(left_at_that)) if left_at_that else None,
        )

    def distribution(self, game: str | Game) -> Response:
        """The model's exact distribution over a game's answers, and the mass outside them.

        Not a sample: every answer is scored.  Raises DataError for an unknown game.
        """
        return next(self.respond([_item(game)], Exact()))

    def simulate(
        self, game: str | Game, n: int, seed: int = 0, how: Sampled | None = None
    ) -> Simulation:
        """`n` participants answer a game, each by a draw of their own.

        The same seed gives the same participants; different games draw independently of each
        other.  Raises DataError for an unknown game, or `n` below 1.
        """
        chosen = games.get(game) if isinstance(game, str) else game
        asked = replace(how or Sampled(), n=n, seed=seed)
        response = next(self.respond([_item(chosen)], asked))
        positions = [chosen.answers.parse(text).position for text in response.texts]
        values = chosen.values.tolist()
        choices = [None if at is None else values[at] for at in positions]
        return Simulation(chosen.id, choices, list(response.texts), response)

    def first_prompt(self, items: Sequence[Item]) -> dict[str, Any]:
        """The first item's prompt as the model reads it, for output files.

        `item`, the token `ids`, and their `text`: decoded from the ids, special tokens written out.
        """
        if not items:
            return {}
        ids = list(self.tokenizer.prompt(items[0].prompt))
        return {"item": items[0].id, "ids": ids, "text": self.tokenizer.decode(ids, special=True)}


def load(
    model: str | Path,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    force_template: bool = False,
    devices: int | Sequence[jax.Device] | None = None,
    cache: str = "full",
) -> Engine:
    """Loads a training run, a Hugging Face directory or a hub id, optionally with an adapter.

    `dtype` ("float32" or "bfloat16") is what the layers compute in and `quantize` ("no" or "int8")
    what the base is rounded to; by default what a run was trained with, and for other models what
    the weights are stored in, not rounded.  An adapter that was trained with another chat template
    than the model's tokenizer has is taken only with `force_template`.

    `devices` share the weights, as far as the model's heads allow, and beyond that the prompts and
    participants: so many of this process's, or those given (of other processes too, where all load
    the same).  By default all accelerators of this process, or one CPU device.  A population is the
    same on any number of them, to the token, but for the rounding of float32.  `cache`: what
    sampling keeps keys and values in, the dtype of the layers ("full") or "int8".

    Raises:
        FileNotFoundError: a directory or a file in it is missing.
        UserError: a model, tokenizer or adapter that can't be used, or more devices than there
            are; the message says why.
    """
    chosen = _devices(devices)
    resolved = resolve_model(model, adapter)
    origin: dict[str, Any] = {"path": str(model)}
    if resolved.run:
        origin["trained_on"] = resolved.run["trained_on"]
    commit = models.commit_of(resolved.directory)
    if commit is not None:
        origin["commit"] = commit
    # All that can be wrong is said before the weights are read.
    config = llama_config.read(resolved.directory)
    tokenizer = fitting_tokenizer(resolved.directory, config)
    origin |= text_metadata(resolved.directory, tokenizer)
    tuned = None
    if resolved.adapter is not None:
        origin["adapter"] = str(resolved.adapter if adapter is None else adapter)
        origin["chat_template"]["adapter"] = chat_template.check(
            resolved.adapter, tokenizer.template_hash, force_template
        )
        tuned = peft.load(resolved.adapter, config)
    quantize = quantize or resolved.run.get("quantize", "no")
    mesh = meshes.answering_mesh(config, chosen)
    _, params = hf.load(resolved.directory, meshes.over(mesh), quantize=quantize)
    if tuned is not None:
        params = lora.attach(params, tuned)
        params = transfer.place(params, meshes.shardings(params, mesh))
    stored = params["embed_tokens"]["weight"].dtype.name
    fitting = stored if stored in DTYPES else "float32"
    compute = jnp.dtype(dtype or resolved.run.get("dtype", fitting))
    origin |= {"dtype": compute.name, "quantize": quantize, "mesh": meshes.in_words(mesh)}
    answering = Llama(config, dtype=compute, layout=meshes.layout_over(mesh))
    return Engine(answering, params, tokenizer, origin, resolved, cache)


def _devices(devices: int | Sequence[jax.Device] | None) -> list[jax.Device]:
    """The devices that `load` is told of.

    Raises UserError where this process has not so many, or none is given.
    """
    own = jax.local_devices()
    if devices is None:
        return own[:1] if own[0].platform == "cpu" else own
    if isinstance(devices, int):
        if not 1 <= devices <= len(own):
            kind = f"{own[0].device_kind} ({own[0].platform})"
            raise UserError(f"devices is {devices}; there are {len(own)} here: {kind}")
        return own[:devices]
    if not devices:
        raise UserError("devices is empty; a model needs at least one")
    return list(devices)


def fitting_tokenizer(directory: Path, config: LlamaConfig) -> Tokenizer:
    """The tokenizer of a model's directory; all ids that its configs end a text with stop.

    Raises UserError where it has more tokens than the model: their embeddings don't exist.
    """
    stop_ids = (*config.eos_token_id, *generation_config.read(directory).stop_ids)
    tokenizer = Tokenizer.load(directory, stop_ids)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{config.vocab_size} (vocab_size in config.json)"
        )
    return tokenizer


def text_metadata(directory: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `origin` says of a model's chat template, and of sampling settings that it ignores."""
    ignored = generation_config.read(directory).ignored
    return {"chat_template": {"sha256": tokenizer.template_hash}} | (
        {"ignored_generation_config": dict(ignored)} if ignored else {}
    )


def _item(game: str | Game) -> Item:
    chosen = games.get(game) if isinstance(game, str) else game
    return Item(chosen.id, chosen.prompt(), chosen.answers, labels={"game": chosen.id})


def _seed(seed: int, item: str) -> int:
    """A seed for each item, so that a participant's draws in one say nothing of another."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{item}".encode()).digest()[:4], "big")

"""A model on this machine's devices as a respondent: `befm_jax.load(...)`.

It answers items exactly, by scoring every answer, or by draws; `.distribution(game)` and
`.simulate(game, n)` are for one game.
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
from befm_jax.adapters import base as bases
from befm_jax.adapters import chat_template, lora, peft
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
from befm_jax.llama import generation_config, hf
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama, Params
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.models import DTYPES, ResolvedModel, resolve_model

# Prompts whose texts the tokenizer encodes in one call.
_ENCODED_TOGETHER = 256


@dataclass(frozen=True)
class Simulation:
    """A simulated population's answers in one game.

    `choices`: one per participant, in the game's unit (a named action by its index); None where the
    text has no answer of the set.  `texts`: the generated texts, untrusted.  `response`: the
    counts.
    """

    game: str
    choices: list[float | None]
    texts: list[str]
    response: Response

    def __repr__(self) -> str:
        return f"<Simulation of {self.game}: {self.response.summary}>"

    def _repr_html_(self) -> str:
        """In a notebook: the summary and a small picture."""
        return self.response._repr_html_()

    def to_pandas(self) -> Any:
        """A DataFrame of game, participant, choice (NaN: no answer) and text; needs pandas."""
        import pandas

        choices = np.array(self.choices, np.float64)
        columns = {"participant": range(len(choices)), "choice": choices}
        return pandas.DataFrame({"game": self.game, **columns, "text": self.texts})

    def plot(self) -> Any:
        """How many participants chose what, as bars; matplotlib's axes."""
        from matplotlib import pyplot

        chosen = [choice for choice in self.choices if choice is not None]
        axes = pyplot.figure().subplots()
        axes.bar(*np.unique(chosen, return_counts=True))
        axes.set(title=self.game, xlabel="choice", ylabel="participants")
        return axes


@dataclass(frozen=True)
class Engine:
    """A model with its tokenizer, ready to answer (a `data.responses.Respondent`).

    `origin` is metadata of what was loaded, for output files; `resolved` are its files; `cache` is
    the key-value cache of sampling ("full" or "int8").
    """

    model: Llama
    params: Params
    tokenizer: Tokenizer
    origin: dict[str, Any]
    resolved: ResolvedModel
    cache: str = "full"

    def __repr__(self) -> str:
        config = self.model.config
        return (
            f"<Engine of {self.name}: {config.model_type}, {config.num_hidden_layers} layers of "
            f"width {config.hidden_size}, {self.model.dtype}, on {self.device}>"
        )

    @property
    def name(self) -> str:
        """The name that it was loaded by."""
        return str(self.origin["path"])

    @property
    def device(self) -> str:
        """The number and kind of the model's devices, as a text."""
        return meshes.devices_in_words(jax.tree.leaves(self.params)[0].sharding.device_set)

    def describe(self) -> dict[str, Any]:
        """Metadata of what was loaded: path, commit, adapter, template, dtype, mesh."""
        return self.origin | ({"cache": self.cache} if self.cache != "full" else {})

    def respond(self, items: Sequence[Item], how: How) -> Iterator[Response]:
        """A response to every item.

        Exact: in the items' order, packed; shared prefixes of prompts are computed once, and the
        other items change a response by float rounding at most.  Sampled: each as it is done; the
        draws depend on the seed of `how` and the item's id, not on the other items.

        Raises:
            DataError: free text cannot be scored; a prompt is longer than the model's positions.
            RowTooShortError: a prompt with an answer is longer than `score.LONGEST_ROW` tokens.
            NonFiniteError: the model's numbers are NaN or infinite.
        """
        return self._exact(items) if isinstance(how, Exact) else self._sampled(items, how)

    def _exact(self, items: Sequence[Item]) -> Iterator[Response]:
        encoded = lru_cache(maxsize=None)(self.tokenizer.answer)

        def questions() -> Iterator[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
            for start in range(0, len(items), _ENCODED_TOGETHER):
                batch = items[start : start + _ENCODED_TOGETHER]
                prompts = self.tokenizer.prompt_batch([item.prompt for item in batch])
                for item, prompt in zip(batch, prompts, strict=True):
                    if isinstance(item.answers, FreeText):
                        raise DataError(
                            f"item {item.id}: free text has no distribution; draw it instead"
                        )
                    answers = [encoded(text) for text in item.answers.written]
                    yield self._fitting(item, prompt, max(map(len, answers))), answers

        distributions = score.each_answers(self.model, self.params, questions())
        for item, distribution in zip(items, distributions, strict=True):
            yield Response(
                item.id,
                distribution.probabilities,
                exact=True,
                outside=distribution.outside,
                ends_after_answer=distribution.ends_after_answer,
            )

    def _sampled(self, items: Sequence[Item], how: Sampled) -> Iterator[Response]:
        # Items with the same maximum length are one batch: decoding runs until the longest is done.
        by_length: dict[int, list[Item]] = {}
        for item in items:
            free = isinstance(item.answers, FreeText)
            length = item.answers.max_tokens if free else how.max_tokens  # type: ignore[union-attr]
            by_length.setdefault(length, []).append(item)
        for length, batch in by_length.items():
            prompts = self.tokenizer.prompt_batch([item.prompt for item in batch])
            requests = [
                Request(self._fitting(item, ids, length), how.n, _seed(how.seed, item.id))
                for item, ids in zip(batch, prompts, strict=True)
            ]
            populations = sample.each_population(
                self.model,
                self.params,
                requests,
                stop_ids=self.tokenizer.stop_ids,
                sampling=Sampling(how.temperature, how.top_k, how.top_p, length, self.cache),
            )
            for number, draws in populations:
                yield self._response(batch[number], draws)

    def _fitting(self, item: Item, ids: tuple[int, ...], answer: int) -> tuple[int, ...]:
        """The ids of an item's prompt.

        Raises DataError where an answer of that many tokens is at positions beyond the model's.
        """
        positions = self.model.config.max_position_embeddings
        # The last token is predicted alone.
        if len(ids) + answer - 1 > positions:
            raise DataError(
                f"item {item.id}: the prompt has {len(ids)} tokens, and an answer up to {answer}; "
                f"the model has {positions} positions (max_position_embeddings in config.json)"
            )
        return ids

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
        positions = [answer.position for answer in parsed if answer.position is not None]
        # Of the draws that begin with an answer's tokens, those that end there.
        stems = {self.tokenizer.answer(text)[:-1] for text in answers.written}
        lengths = {len(stem) for stem in stems}
        ends_there = [
            bool(stopped) and row in stems
            for row, stopped in zip(rows, draws.stopped, strict=True)
            if any(row[:length] in stems for length in lengths)
        ]
        return Response.from_counts(
            item.id,
            np.bincount(positions, minlength=len(answers)),
            unread=sum(answer.reason == "no answer" for answer in parsed),
            not_allowed=sum(answer.reason == "outside the answer set" for answer in parsed),
            texts=texts,
            ends_after_answer=float(np.mean(ends_there)) if ends_there else None,
        )

    def distribution(self, game: str | Game) -> Response:
        """The model's exact distribution within a game's answer set, and the mass outside it.

        Not a sample: every answer is scored.  `weights` and `shares` sum to 1; the unconditional
        probabilities, those of a `distribution.csv`, are `shares * (1 - outside)`.  Raises
        DataError for an unknown game.
        """
        return next(self.respond([_item(game)], Exact()))

    def simulate(
        self, game: str | Game, n: int, seed: int = 0, how: Sampled | None = None
    ) -> Simulation:
        """The answers of `n` participants in a game, one draw each.

        The same seed gives the same participants; different games draw independently of each
        other.  Raises DataError for an unknown game, or `n` below 1.
        """
        game = games.get(game) if isinstance(game, str) else game
        response = next(self.respond([_item(game)], replace(how or Sampled(), n=n, seed=seed)))
        positions = [game.answers.parse(text).position for text in response.texts]
        values = game.values.tolist()
        choices = [None if at is None else values[at] for at in positions]
        return Simulation(game.id, choices, list(response.texts), response)

    def first_prompt(self, items: Sequence[Item]) -> dict[str, Any]:
        """The first item's prompt, for output files.

        `item`, the token `ids`, and their `text`, decoded with special tokens.
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
    force_base: bool = False,
) -> Engine:
    """Loads a training run, a Hugging Face directory or a hub id, optionally with an adapter.

    `dtype` ("float32" or "bfloat16") is the dtype of activations and `quantize` ("no" or "int8")
    the quantisation of the base; the defaults are those of the run, and for other models the stored
    dtype without quantisation.  `force_template` accepts an adapter that was trained with another
    chat template than the tokenizer's, `force_base` one that was trained on another base model.

    `devices`: a number of this process's devices, or a list (of other processes too, where all load
    the same).  By default all accelerators of this process, or one CPU device.  Weights are sharded
    as far as the model's heads allow, and beyond that prompts and participants.  Draws are the same
    on any number of devices, but for float32 rounding.  `cache`: the dtype of the key-value cache
    in sampling, that of the layers ("full") or "int8".

    Raises:
        FileNotFoundError: a directory or a file in it is missing.
        UserError: a model, tokenizer or adapter that can't be used, or too many devices.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype is {dtype!r}; it must be {' or '.join(DTYPES)}")
    selected = _devices(devices)
    resolved = resolve_model(model, adapter)
    origin: dict[str, Any] = {"path": str(model)}
    if resolved.run:
        origin["trained_on"] = resolved.run["trained_on"]
    commit = models.commit_of(resolved.directory)
    if commit is not None:
        origin["commit"] = commit
    # Everything is checked before the weights are read.
    stored = hf.open_model(resolved.directory)
    config = stored.config
    tokenizer = fitting_tokenizer(resolved.directory, config)
    origin |= text_metadata(resolved.directory, tokenizer)
    tuned_adapter = None
    if resolved.adapter is not None:
        origin["adapter"] = str(resolved.adapter if adapter is None else adapter)
        origin["chat_template"]["adapter"] = chat_template.check(
            resolved.adapter, tokenizer, force_template
        )
        tuned_adapter = peft.load(resolved.adapter, config)
        origin["adapter_base"] = bases.check(resolved.adapter, stored, resolved.name, force_base)
    quantize = quantize or resolved.run.get("quantize", "no")
    mesh = meshes.answering_mesh(config, selected)
    _, params = hf.load(resolved.directory, meshes.over(mesh), quantize=quantize)
    if tuned_adapter is not None:
        params = lora.attach(params, tuned_adapter)
        params = transfer.place(params, meshes.shardings(params, mesh))
    stored_dtype = params["embed_tokens"]["weight"].dtype.name
    default = stored_dtype if stored_dtype in DTYPES else "float32"
    compute = jnp.dtype(dtype or resolved.run.get("dtype", default))
    origin |= {"dtype": compute.name, "quantize": quantize, "mesh": meshes.in_words(mesh)}
    llama = Llama(config, dtype=compute, layout=meshes.layout_over(mesh))
    return Engine(llama, params, tokenizer, origin, resolved, cache)


def _devices(devices: int | Sequence[jax.Device] | None) -> list[jax.Device]:
    """The devices that `load` uses.

    Raises UserError where this process has fewer, or the list is empty.
    """
    own = jax.local_devices()
    if devices is None:
        return own[:1] if own[0].platform == "cpu" else own
    if isinstance(devices, int):
        if not 1 <= devices <= len(own):
            kind = f"{own[0].device_kind} ({own[0].platform})"
            raise UserError(f"devices is {devices}; it must be 1 to {len(own)}: {kind}")
        return own[:devices]
    if not devices:
        raise UserError("devices is empty; it must have at least one")
    return list(devices)


def fitting_tokenizer(directory: Path, config: LlamaConfig) -> Tokenizer:
    """The tokenizer of a model's directory, with the stop ids of its configs.

    Raises UserError where a conversation can have ids for which the model has no embedding.
    """
    stop_ids = (*config.eos_token_id, *generation_config.read(directory).stop_ids)
    # What the model has no logit for is never drawn.
    tokenizer = Tokenizer.load(directory, [i for i in stop_ids if i < config.vocab_size])
    if tokenizer.largest_id >= config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has ids up to {tokenizer.largest_id}; the model has "
            f"embeddings of {config.vocab_size} (vocab_size in config.json)"
        )
    return tokenizer


def text_metadata(directory: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The metadata in `origin` of a model's chat template, and of its ignored sampling settings."""
    ignored = generation_config.read(directory).ignored
    template = {"sha256": tokenizer.template_hash}
    if tokenizer.refuses_system:
        template["system"] = f"before the user's first text, since {tokenizer.refuses_system}"
    return {"chat_template": template} | (
        {"ignored_generation_config": dict(ignored)} if ignored else {}
    )


def _item(game: str | Game) -> Item:
    game = games.get(game) if isinstance(game, str) else game
    return Item(game.id, game.prompt(), game.answers, labels={"game": game.id})


def _seed(seed: int, item: str) -> int:
    """A seed for each item, so that draws of different items are independent."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{item}".encode()).digest()[:4], "big")

"""A model as a population: `befm_jax.load(...)`, `.distribution(game)`, `.simulate(game, n)`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed import transfer
from befm_jax.errors import UserError
from befm_jax.evals.answers import Answers
from befm_jax.inference import sample, score
from befm_jax.inference.sample import Draws, Request, Sampling
from befm_jax.llama import config as llama_config
from befm_jax.llama import generation_config, hf
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama, Params
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.models import ResolvedModel, resolve_model


@dataclass(frozen=True)
class Simulation:
    """What a simulated population answered in one game.

    `choices`: one a participant, in the game's unit; None where the text held no answer of the
    set.  `texts`: what they wrote, untrusted text of a model.  `answers`: the counts, for scoring.
    """

    game: str
    choices: list[int | None]
    texts: list[str]
    answers: Answers


@dataclass(frozen=True)
class Simulator:
    """A model with its tokenizer, ready to answer.

    `origin` says what was loaded, for output files; `resolved` is where its files are.
    """

    model: Llama
    params: Params
    tokenizer: Tokenizer
    origin: dict[str, Any]
    resolved: ResolvedModel

    @property
    def device(self) -> str:
        """The number and kind of the devices that share the model, in words."""
        return meshes.devices_in_words(jax.tree.leaves(self.params)[0].sharding.device_set)

    def distribution(self, game: str | Game) -> Answers:
        """The model's exact distribution over a game's answers, and the mass outside them.

        Not a sample: every answer is scored.  Raises DataError for an unknown game.
        """
        return next(self.distribution_each([game]))

    def distribution_each(self, asked: Sequence[str | Game]) -> Iterator[Answers]:
        """`distribution` for several games, in their order.

        While one is computed the next is made ready; none moves a bit of another's.
        """
        chosen = [_game(game) for game in asked]
        for found in score.each_answers(self.model, self.params, map(self._question, chosen)):
            yield Answers(
                found.probabilities,
                exact=True,
                outside=found.outside,
                total=None,
                ends_after_answer=found.ends_after_answer,
            )

    def _question(self, game: Game) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Ids of a game's prompt, and of each of its answers."""
        answers = game.answers
        written = [self.tokenizer.answer(answers.format(value)) for value in answers.values]
        return self.tokenizer.prompt(*game.prompt()), written

    def simulate(
        self, game: str | Game, n: int, seed: int = 0, sampling: Sampling | None = None
    ) -> Simulation:
        """`n` participants answer a game, each by a draw of their own.

        The same seed gives the same participants; different games draw independently of each
        other.  Raises DataError for an unknown game, ValueError for `n` below 1.
        """
        return next(self.simulate_each([game], n, seed, sampling))

    def simulate_each(
        self, asked: Sequence[str | Game], n: int, seed: int = 0, sampling: Sampling | None = None
    ) -> Iterator[Simulation]:
        """`simulate` for several games, whose prompts are computed together.

        Yields each when it is done, not in the order asked.
        """
        chosen = [_game(game) for game in asked]
        requests = [
            Request(self.tokenizer.prompt(*game.prompt()), n, _seed(seed, game)) for game in chosen
        ]
        populations = sample.each_population(
            self.model,
            self.params,
            requests,
            stop_ids=self.tokenizer.stop_ids,
            sampling=sampling,
        )
        for number, draws in populations:
            yield self._simulation(chosen[number], draws)

    def _simulation(self, game: Game, draws: Draws) -> Simulation:
        rows = [
            tuple(row[:length].tolist())
            for row, length in zip(draws.tokens, draws.lengths, strict=True)
        ]
        texts = [self.tokenizer.decode(row) for row in rows]
        parsed = [game.answers.parse(text) for text in texts]
        choices = [one.value for one in parsed]
        values, numbers = np.unique([c for c in choices if c is not None], return_counts=True)
        counts = np.zeros(len(game.values), np.int64)
        counts[np.searchsorted(game.values, values)] = numbers
        # Of those who began with an answer as the game writes it, who left it at that?
        stems = {self.tokenizer.answer(game.answers.format(int(v)))[:-1] for v in game.values}
        lengths = {len(stem) for stem in stems}
        left_at_that = [
            bool(stopped) and row in stems
            for row, stopped in zip(rows, draws.stopped, strict=True)
            if any(row[:length] in stems for length in lengths)
        ]
        answers = Answers.from_counts(
            counts,
            unparsed=sum(one.reason == "no answer" for one in parsed),
            out_of_set=sum(one.reason == "outside the answer set" for one in parsed),
            ends_after_answer=float(np.mean(left_at_that)) if left_at_that else None,
        )
        return Simulation(game.id, choices, texts, answers)

    def described(self, asked: Sequence[Game]) -> dict[str, Any]:
        """`origin`, and the first of these games' prompts as the model reads it.

        `first_prompt` has the `game`, the token `ids`, and their `text`: decoded from the ids,
        special tokens written out.
        """
        if not asked:
            return self.origin
        ids = list(self.tokenizer.prompt(*asked[0].prompt()))
        text = self.tokenizer.decode(ids, special=True)
        return self.origin | {"first_prompt": {"game": asked[0].id, "ids": ids, "text": text}}


def load(
    model: str | Path,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    force_template: bool = False,
    devices: int | Sequence[jax.Device] | None = None,
) -> Simulator:
    """Loads a training run, a Hugging Face directory or a hub id, optionally with an adapter.

    `dtype` ("float32" or "bfloat16") is what the layers compute in and `quantize` ("no" or "int8")
    what the base is rounded to; by default what a run was trained with, and for other models what
    the weights are stored in, not rounded.  An adapter that was trained with another chat template
    than the model's tokenizer has is taken only with `force_template`.

    `devices` share the weights, as far as the model's heads allow, and beyond that the prompts and
    participants: so many of this process's, or those given (of other processes too, where all load
    the same).  By default all accelerators of this process, or one CPU device.  A population is the
    same on any number of them, to the token, but for the rounding of float32.

    Raises:
        FileNotFoundError: a directory or a file in it is missing.
        UserError: a model, tokenizer or adapter that can't be used, or more devices than there
            are; the message says why.
    """
    chosen = _chosen(devices)
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
    origin |= said_of_text(resolved.directory, tokenizer)
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
    return Simulator(answering, params, tokenizer, origin, resolved)


def _chosen(devices: int | Sequence[jax.Device] | None) -> list[jax.Device]:
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


def said_of_text(directory: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `origin` says of a model's chat template, and of sampling settings that it ignores."""
    ignored = generation_config.read(directory).ignored
    return {"chat_template": {"sha256": tokenizer.template_hash}} | (
        {"ignored_generation_config": dict(ignored)} if ignored else {}
    )


def _game(game: str | Game) -> Game:
    return games.get(game) if isinstance(game, str) else game


def _seed(seed: int, game: Game) -> int:
    """A seed for each game, so that a participant's draws in one say nothing of another."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{game.id}".encode()).digest()[:4], "big")

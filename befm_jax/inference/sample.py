"""Populations: every prompt is computed once, then all who answer it write side by side.

Every participant draws with a key of their own, made from the seed of their request and their
number: an answer does not depend on who else is asked, nor (but for float rounding) on how many
at a time, nor on when others were done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int32

from befm_jax.data import forest as forests
from befm_jax.data.forest import Encoded, Forest
from befm_jax.inference import decode
from befm_jax.inference.batching import BatchSlots, power_of_two, shrunk
from befm_jax.inference.decode import Answers, Asked, Programs, Prompts
from befm_jax.inference.next_token import Sampling, next_token
from befm_jax.inference.score import bucket
from befm_jax.llama import linear
from befm_jax.llama.model import Llama, Params, Unstacked

# Participants who are decoded together.
AT_A_TIME = 1024
# Prompts that are computed together, and whose participants are.
PROMPTS_AT_A_TIME = 64
# Tokens of the prompts that are computed together; a longer prompt is alone.
PROMPT_TOKENS_AT_A_TIME = 16_384
# Tokens that are drawn between two looks of a caller's `ended`.
LOOK_EVERY = 16
# Slots that a suffix begins with, and how many times more it gets when they are full.
FIRST_ROOM, MORE_ROOM = 16, 4
# Slots of a row of prompts, more for a longer prompt.  Long rows share more and have less padding:
# against rows of 512, 48 prompts of 140 to 360 tokens that share nothing take 0.7 of the time, 48
# of 150 that share instructions 0.7, 0.9 or 1.1 (three samples, 2 CPU cores); from 1,024 to 2,048
# nothing is gained.
_ROW = 1024


class Request(NamedTuple):
    """A prompt as token ids, how many answer it, and the seed of their draws."""

    prompt: Sequence[int]
    participants: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Draws:
    """Sampled continuations.

    `tokens` [n, T] int32; `lengths` [n]: how many of a row are the answer, without the stop
    token; `stopped` [n]: false where the answer ran into `max_new_tokens`.  An answer that `ended`
    closed is stopped too, behind the last token that was drawn when it was looked at.
    """

    tokens: Int32[np.ndarray, "n T"]
    lengths: Int32[np.ndarray, " n"]
    stopped: Bool[np.ndarray, " n"]


def population(
    model: Llama,
    params: Params,
    prompt: Sequence[int],
    participants: int,
    *,
    seed: int = 0,
    **options: Any,
) -> Draws:
    """`participants` answers to one prompt; options and errors are those of `each_population`."""
    request = Request(prompt, participants, seed)
    return populations(model, params, [request], **options)[0]


def populations(
    model: Llama, params: Params, requests: Sequence[Request], **options: Any
) -> list[Draws]:
    """The draws of every request, in order; options and errors are those of `each_population`."""
    found = dict(each_population(model, params, requests, **options))
    return [found[number] for number in range(len(requests))]


def each_population(
    model: Llama,
    params: Params,
    requests: Sequence[Request],
    *,
    stop_ids: Sequence[int],
    sampling: Sampling | None = None,
    ended: Callable[[int, Sequence[int]], bool] | None = None,
    prompts: int = PROMPTS_AT_A_TIME,
) -> Iterator[tuple[int, Draws]]:
    """Draws answers; yields a request's number and its draws when all its participants are done.

    Prompts that are computed together, no more at a time than `prompts` says, are one token
    forest: what they share at their beginning is computed once.  Those who answer them are decoded
    together, up to `AT_A_TIME`.

    `ended` is shown the number of a request and the tokens of an answer so far, every `LOOK_EVERY`
    tokens, and says whether the answer is over: for ends that no single token marks.  The draws
    are the same with and without it, up to where it saw an end.

    Where memory allows it, the layers' weights are copied for as long as this runs
    (`decode.weights_for_decoding`).

    Raises:
        ValueError: an empty prompt, no participants, or no stop token.
    """
    if not stop_ids or any(not one.prompt or one.participants < 1 for one in requests):
        raise ValueError("a prompt, at least one participant and at least one stop id are needed")
    sampling = sampling or Sampling()
    stops, steps = tuple(sorted(set(stop_ids))), sampling.max_new_tokens
    decoder, weights = decode.weights_for_decoding(model, params)
    engine = _Engine(
        weights,
        # Programs of another length are the same.
        _programs(decoder, replace(sampling, max_new_tokens=1), stops),
        sampling,
        np.stack([jax.random.key_data(jax.random.key(one.seed)) for one in requests]),
        ended,
        linear.parts(decoder.layout, "rows"),
        linear.parts(decoder.layout, "rows_to_draw"),
    )
    tokens = [np.full((one.participants, steps), stops[0], np.int32) for one in requests]
    to_come = [one.participants for one in requests]
    numbers_of: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        numbers_of.setdefault(tuple(request.prompt), []).append(number)
    for window in _windows(sorted(numbers_of), prompts):
        people = [
            np.asarray(
                [
                    (number, participant)
                    for number in numbers_of[prompt]
                    for participant in range(requests[number].participants)
                ]
            )
            for prompt in window
        ]
        computed = _computed(model, params, window)
        for batch in _batches(people, [len(prompt) for prompt in window]):
            for (number, participant), answer in engine.answers(computed, batch):
                tokens[number][participant, : len(answer)] = answer
                to_come[number] -= 1
                if not to_come[number]:
                    yield number, _draws(tokens[number], stops)


class _Window(NamedTuple):
    """Prompts, computed as one forest.

    `paths`: for each prompt, its slots, counted through all rows of the forest.
    """

    prompts: Prompts
    paths: list[np.ndarray]


class _Batch(NamedTuple):
    """Some of a window's prompts, and the `(request, participant)` [n, 2] who answer each."""

    prompts: list[int]
    people: list[np.ndarray]


def _windows(prompts: Sequence[tuple[int, ...]], at_a_time: int) -> Iterator[list[tuple[int, ...]]]:
    """Cuts sorted prompts, of which neighbours share most, into those computed together."""
    window: list[tuple[int, ...]] = []
    tokens = 0
    for prompt in prompts:
        tokens += bucket(len(prompt))
        if window and (len(window) == at_a_time or tokens > PROMPT_TOKENS_AT_A_TIME):
            yield window
            window, tokens = [], bucket(len(prompt))
        window.append(prompt)
    if window:
        yield window


def _computed(model: Llama, params: Params, prompts: Sequence[tuple[int, ...]]) -> _Window:
    """Lays prompts out as a forest and computes it."""
    # A read is asked for at the end of every prompt; which token's does not matter here.
    slots = max(_ROW, bucket(max(map(len, prompts)) + 1))
    built = forests.build([Encoded.of(prompt, (0,)) for prompt in prompts], slots)
    parent = built.forest.parent
    lines = []
    for prompt, place in zip(prompts, built.places, strict=True):
        assert place is not None, "every prompt fits in a row"
        slot = built.reads.slots[place.row, built.reads.column[place.row, place.reads[-1]]]
        line = np.empty(len(prompt), np.int32)
        for depth in reversed(range(len(prompt))):
            line[depth] = slot
            slot = parent[place.row, slot]
        lines.append((place.row, line))
    length = bucket(1 + max(int(line[-1]) for _, line in lines))
    forest = Forest(*(array[:, :length] for array in built.forest))
    forest = forest._replace(end=np.minimum(forest.end, length - 1))
    # A device has a power of two, or 1.5 times that: a row of padding costs as much as any other.
    parts = linear.parts(model.layout, "rows")
    needed = -(-len(parent) // parts)
    rows = power_of_two(needed)
    rows = rows * 3 // 4 if rows * 3 // 4 >= needed else rows
    added = forests.empty(rows * parts - len(parent), length)
    forest = Forest(*(np.concatenate(pair) for pair in zip(forest, added, strict=True)))
    return _Window(
        decode.prefill(model)(params, forest), [row * length + line for row, line in lines]
    )


def _batches(people: Sequence[np.ndarray], lengths: Sequence[int]) -> Iterator[_Batch]:
    """Cuts those who answer a window's prompts into batches of at most `AT_A_TIME`.

    In a batch every prompt has room for as many as answer the first, so prompts that far fewer
    answer stand in another.
    """
    rest = []
    for prompt, everyone in enumerate(people):
        whole = len(everyone) // AT_A_TIME * AT_A_TIME
        for start in range(0, whole, AT_A_TIME):
            yield _Batch([prompt], [everyone[start : start + AT_A_TIME]])
        if whole < len(everyone):
            rest.append((prompt, everyone[whole:]))
    rest.sort(key=lambda one: (-len(one[1]), lengths[one[0]]))
    batch = _Batch([], [])
    for prompt, some in rest:
        if batch.prompts:
            most = len(batch.people[0])
            in_all = sum(map(len, batch.people)) + len(some)
            lanes = power_of_two(most) * power_of_two(len(batch.prompts) + 1)
            if in_all > AT_A_TIME or lanes > 2 * AT_A_TIME or most > 4 * len(some):
                yield batch
                batch = _Batch([], [])
        batch.prompts.append(prompt)
        batch.people.append(some)
    if batch.prompts:
        yield batch


@dataclass(frozen=True)
class _Engine:
    """What all batches of a call share.

    `seeds` [requests, ...]: the data of their random keys.  Rows are in `blocks` blocks, and
    `draws` devices draw for them (see `BatchSlots`).
    """

    weights: Params | Unstacked
    programs: Programs
    sampling: Sampling
    seeds: np.ndarray
    ended: Callable[[int, Sequence[int]], bool] | None
    blocks: int
    draws: int

    def answers(self, window: _Window, batch: _Batch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Decodes a batch; yields `(request, participant)` and their tokens as they are done."""
        steps = self.sampling.max_new_tokens
        people = np.concatenate(batch.people)
        done = np.zeros(len(people), bool)
        seats, asked, answers = self._begun(window, batch)
        while True:
            room, written = answers.tokens.shape[1], int(answers.written)
            limit = min(steps, room)
            if self.ended is not None:
                limit = min(limit, (written // LOOK_EVERY + 1) * LOOK_EVERY)
            over = seats.spread(done, True)
            answers = self.programs.go_on(
                self.weights, asked, answers, over, np.int32(limit), np.int32(seats.few)
            )
            written = int(answers.written)
            done = np.asarray(answers.done)[seats.row]
            tokens = np.asarray(answers.tokens)[seats.row, :written]
            if self.ended is not None and written % LOOK_EVERY == 0 and written < steps:
                for one in np.flatnonzero(~done):
                    done[one] = self.ended(int(people[one, 0]), tokens[one].tolist())
            if written == steps or done.all():
                yield from zip(people, tokens, strict=True)
                return
            left = np.flatnonzero(~done)
            if seats.fullest(left) <= seats.few:
                yield from zip(people[done], tokens[done], strict=True)
                seats, asked, answers = self._fewer(seats, asked, answers, left)
                people, done = people[left], done[left]
            if written == room:
                answers = self.programs.with_capacity(answers, room * MORE_ROOM)

    def _begun(self, window: _Window, batch: _Batch) -> tuple[BatchSlots, Asked, Answers]:
        """A batch with everyone's first token drawn."""
        prompts, people = batch.prompts, np.concatenate(batch.people)
        prompt = np.repeat(np.arange(len(prompts)), [len(some) for some in batch.people])
        seats = BatchSlots.dealt(prompt, self.blocks, self.draws)
        groups = power_of_two(len(prompts))
        lengths = np.ones(groups, np.int32)
        lengths[: len(prompts)] = [len(window.paths[one]) for one in prompts]
        paths = np.zeros((groups, bucket(int(lengths.max()))), np.int32)
        for at, one in enumerate(prompts):
            paths[at, : lengths[at]] = window.paths[one]
        # As many as the devices share evenly.
        ends = np.zeros(-(-groups // self.blocks) * self.blocks, np.int32)
        ends[:groups] = paths[np.arange(groups), lengths - 1]
        keys = self.programs.keys(
            seats.spread(self.seeds[people[:, 0]]), seats.spread(people[:, 1])
        )
        rows = seats.rows(groups, power_of_two(seats.most()))
        shared = self.weights.shared if isinstance(self.weights, Unstacked) else self.weights
        answers = self.programs.begin(
            {name: leaf for name, leaf in shared.items() if name != "layers"},
            window.prompts.hidden,
            ends,
            keys,
            rows.prompt,
            seats.spread(np.ones(len(people), bool)),
            FIRST_ROOM,
        )
        prefix = self.programs.prefixes(window.prompts.keys_values, paths)
        return seats, Asked(prefix, lengths, rows, keys), answers

    def _fewer(
        self, seats: BatchSlots, asked: Asked, answers: Answers, left: np.ndarray
    ) -> tuple[BatchSlots, Asked, Answers]:
        """A batch of some of its people alone."""
        seats, kept = seats.compacted(left)
        keys, answers = self.programs.fewer(asked.keys, answers, kept)
        prefix, lengths = asked.prefix, asked.lengths
        prompts, renumbered = np.unique(seats.prompt, return_inverse=True)
        groups = 1 if len(prompts) == 1 else shrunk(len(lengths), len(prompts))
        if groups < len(lengths):
            padded = np.zeros(groups, np.int32)
            padded[: len(prompts)] = prompts
            prefix, lengths = self.programs.of_prompts(prefix, padded), lengths[padded]
            seats = replace(seats, prompt=renumbered)
        rows = seats.rows(groups, shrunk(asked.rows.lanes.shape[2], seats.most()))
        return seats, Asked(prefix, lengths, rows, keys), answers


def _draws(tokens: Int32[np.ndarray, "n T"], stops: tuple[int, ...]) -> Draws:
    stop = np.isin(tokens, stops)
    stopped = np.any(stop, axis=1)
    lengths = np.where(stopped, stop.argmax(axis=1), tokens.shape[1]).astype(np.int32)
    return Draws(tokens, lengths, stopped)


@lru_cache(maxsize=8)
def _programs(model: Llama, sampling: Sampling, stop_ids: tuple[int, ...]) -> Programs:
    def draw(logits: Array, keys: Array) -> Array:
        return next_token(logits, keys, sampling)

    return decode.programs(model, draw, stop_ids, int8=sampling.cache == "int8")

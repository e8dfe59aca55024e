"""Samples populations: every prompt is prefilled once, then its participants decode in parallel.

Every participant has their own random key, derived from the request's seed and the participant's
number: an answer does not depend on the other requests, nor (but for float rounding) on the batch
size, nor on when others finish.
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
from befm_jax.inference import checks, decode
from befm_jax.inference.batching import BatchSlots, power_of_two, shrunk
from befm_jax.inference.decode import DecodeInputs, DecodeState, Programs, Prompts
from befm_jax.inference.next_token import NOT_FINITE, Sampling, next_token
from befm_jax.inference.score import bucket
from befm_jax.llama import linear
from befm_jax.llama.model import Llama, Params, Unstacked

# Participants per decoding batch.
AT_A_TIME = 1024
# Prompts per prefill.
PROMPTS_AT_A_TIME = 64
# Tokens per prefill; a longer prompt is prefilled alone.
PROMPT_TOKENS_AT_A_TIME = 16_384
# Tokens that are drawn between two calls of a caller's `ended`.
LOOK_EVERY = 16
# Initial capacity of a suffix in slots, and the factor by which it grows.
FIRST_ROOM, MORE_ROOM = 16, 4
# Slots per row of prompts, more for a longer prompt.  Long rows share more and have less padding:
# relative to rows of 512, 48 prompts of 140 to 360 tokens that share nothing take 0.7 times as
# long, 48 of 150 that share instructions 0.7, 0.9 or 1.1 times (three samples, 2 CPU cores); rows
# of 2,048 gain nothing more.
_ROW = 1024


class Request(NamedTuple):
    """A prompt as token ids, its number of participants, and the seed of their draws."""

    prompt: Sequence[int]
    participants: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Draws:
    """Sampled continuations.

    `tokens` [n, T] int32; `lengths` [n]: an answer's tokens, without the stop token; `stopped` [n]:
    false where the answer reached `max_new_tokens`.  An answer that `ended` ended is stopped too,
    after the last token drawn before that call.
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
    by_request = dict(each_population(model, params, requests, **options))
    return [by_request[number] for number in range(len(requests))]


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
    """Draws answers; yields a request's index and its draws when all its participants are done.

    Up to `prompts` prompts are prefilled at a time as one token forest, in which shared prefixes
    are computed once.  Their participants are decoded in batches of up to `AT_A_TIME`.

    `ended(request, tokens)` is called every `LOOK_EVERY` tokens with a request's index and the
    tokens of an answer so far, and returns whether the answer is over: for ends that no single
    token marks.  Draws up to that end are the same with and without it.

    Where memory allows it, the layers' weights are copied for the duration of the call
    (`decode.weights_for_decoding`).

    Raises:
        ValueError: an empty prompt, no participants, no stop token, or a seed of more than 32 bits.
        UserError: a token without an embedding, or logits that are not finite.
    """
    if not stop_ids or any(not request.prompt or request.participants < 1 for request in requests):
        raise ValueError("a prompt, at least one participant and at least one stop id are required")
    for request in requests:
        if not 0 <= request.seed < 2**32:
            raise ValueError(f"seed is {request.seed}; it must be from 0 to 4,294,967,295")
        checks.check_ids(np.asarray(request.prompt), model.config.vocab_size)
    sampling = sampling or Sampling()
    stops, steps = tuple(sorted(set(stop_ids))), sampling.max_new_tokens
    decoder, weights = decode.weights_for_decoding(model, params)
    engine = _Engine(
        weights,
        # max_new_tokens is an argument of the programs: one cache entry for all values.
        _programs(decoder, replace(sampling, max_new_tokens=1), stops),
        sampling,
        np.stack([jax.random.key_data(jax.random.key(request.seed)) for request in requests]),
        ended,
        linear.parts(decoder.layout, "rows"),
        linear.parts(decoder.layout, "rows_to_draw"),
    )
    tokens = [np.full((request.participants, steps), stops[0], np.int32) for request in requests]
    remaining = [request.participants for request in requests]
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
        prefilled = _computed(model, params, window)
        for batch in _batches(people, [len(prompt) for prompt in window]):
            for (number, participant), answer in engine.answers(prefilled, batch):
                tokens[number][participant, : len(answer)] = answer
                remaining[number] -= 1
                if not remaining[number]:
                    yield number, _draws(tokens[number], stops)


class _Window(NamedTuple):
    """Prompts, prefilled as one forest.

    `paths`: each prompt's slots, as indices into the forest's flattened rows.
    """

    prompts: Prompts
    paths: list[np.ndarray]


class _Batch(NamedTuple):
    """Some of a window's prompts, and the `(request, participant)` pairs [n, 2] of each."""

    prompts: list[int]
    people: list[np.ndarray]


def _windows(prompts: Sequence[tuple[int, ...]], at_a_time: int) -> Iterator[list[tuple[int, ...]]]:
    """Splits sorted prompts, of which neighbours share most, into those prefilled together."""
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
    """Packs prompts into a forest and prefills it."""
    # One read per prompt keeps the slot of its last token; the read's token is not used.
    slots = max(_ROW, bucket(max(map(len, prompts)) + 1))
    built = forests.build([Encoded.of(prompt, (0,)) for prompt in prompts], slots)
    parent = built.forest.parent
    paths = []
    for prompt, place in zip(prompts, built.places, strict=True):
        assert place is not None, "every prompt fits in a row"
        slot = built.reads.slots[place.row, built.reads.column[place.row, place.reads[-1]]]
        path = np.empty(len(prompt), np.int32)
        for depth in reversed(range(len(prompt))):
            path[depth] = slot
            slot = parent[place.row, slot]
        paths.append((place.row, path))
    length = bucket(1 + max(int(path[-1]) for _, path in paths))
    forest = Forest(*(array[:, :length] for array in built.forest))
    forest = forest._replace(end=np.minimum(forest.end, length - 1))
    # Rows per device are a power of two or 1.5 times that, since padding rows cost compute.
    parts = linear.parts(model.layout, "rows")
    needed = -(-len(parent) // parts)
    rows = power_of_two(needed)
    rows = rows * 3 // 4 if rows * 3 // 4 >= needed else rows
    added = forests.empty(rows * parts - len(parent), length)
    forest = Forest(*(np.concatenate(pair) for pair in zip(forest, added, strict=True)))
    return _Window(
        decode.prefill(model)(params, forest), [row * length + path for row, path in paths]
    )


def _batches(people: Sequence[np.ndarray], lengths: Sequence[int]) -> Iterator[_Batch]:
    """Splits the participants of a window's prompts into batches of at most `AT_A_TIME`.

    In a batch every prompt has the capacity of the first, so prompts with far fewer participants
    go to another batch.
    """
    rest = []
    for prompt, everyone in enumerate(people):
        full = len(everyone) // AT_A_TIME * AT_A_TIME
        for start in range(0, full, AT_A_TIME):
            yield _Batch([prompt], [everyone[start : start + AT_A_TIME]])
        if full < len(everyone):
            rest.append((prompt, everyone[full:]))
    rest.sort(key=lambda pair: (-len(pair[1]), lengths[pair[0]]))
    batch = _Batch([], [])
    for prompt, some in rest:
        if batch.prompts:
            most = len(batch.people[0])
            total = sum(map(len, batch.people)) + len(some)
            lanes = power_of_two(most) * power_of_two(len(batch.prompts) + 1)
            if total > AT_A_TIME or lanes > 2 * AT_A_TIME or most > 4 * len(some):
                yield batch
                batch = _Batch([], [])
        batch.prompts.append(prompt)
        batch.people.append(some)
    if batch.prompts:
        yield batch


@dataclass(frozen=True)
class _Engine:
    """Decodes the batches of a call.

    `seeds` [requests, ...]: the data of the requests' random keys.  Rows are in `blocks` blocks,
    and `draws` devices draw for them (see `BatchSlots`).
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
        slots, asked, state = self._begun(window, batch)
        while True:
            capacity, written = state.tokens.shape[1], int(state.written)
            limit = min(steps, capacity)
            if self.ended is not None:
                limit = min(limit, (written // LOOK_EVERY + 1) * LOOK_EVERY)
            over = slots.spread(done, True)
            state = self.programs.go_on(
                self.weights, asked, state, over, np.int32(limit), np.int32(slots.few)
            )
            written = int(state.written)
            done = np.asarray(state.done)[slots.row]
            tokens = np.asarray(state.tokens)[slots.row, :written]
            if (tokens == NOT_FINITE).any():
                raise checks.non_finite(self.weights)
            if self.ended is not None and written % LOOK_EVERY == 0 and written < steps:
                for index in np.flatnonzero(~done):
                    done[index] = self.ended(int(people[index, 0]), tokens[index].tolist())
            if written == steps or done.all():
                yield from zip(people, tokens, strict=True)
                return
            unfinished = np.flatnonzero(~done)
            if slots.fullest(unfinished) <= slots.few:
                yield from zip(people[done], tokens[done], strict=True)
                slots, asked, state = self._fewer(slots, asked, state, unfinished)
                people, done = people[unfinished], done[unfinished]
            if written == capacity:
                state = self.programs.with_capacity(state, capacity * MORE_ROOM)

    def _begun(
        self, window: _Window, batch: _Batch
    ) -> tuple[BatchSlots, DecodeInputs, DecodeState]:
        """The state of a batch after every participant's first token."""
        prompts, people = batch.prompts, np.concatenate(batch.people)
        prompt = np.repeat(np.arange(len(prompts)), [len(some) for some in batch.people])
        slots = BatchSlots.dealt(prompt, self.blocks, self.draws)
        groups = power_of_two(len(prompts))
        lengths = np.ones(groups, np.int32)
        lengths[: len(prompts)] = [len(window.paths[number]) for number in prompts]
        paths = np.zeros((groups, bucket(int(lengths.max()))), np.int32)
        for at, number in enumerate(prompts):
            paths[at, : lengths[at]] = window.paths[number]
        # Padded to a multiple of the blocks.
        ends = np.zeros(-(-groups // self.blocks) * self.blocks, np.int32)
        ends[:groups] = paths[np.arange(groups), lengths - 1]
        keys = self.programs.keys(
            slots.spread(self.seeds[people[:, 0]]), slots.spread(people[:, 1])
        )
        rows = slots.rows(groups, power_of_two(slots.most()))
        shared = self.weights.shared if isinstance(self.weights, Unstacked) else self.weights
        state = self.programs.begin(
            {name: leaf for name, leaf in shared.items() if name != "layers"},
            window.prompts.hidden,
            ends,
            keys,
            rows.prompt,
            slots.spread(np.ones(len(people), bool)),
            FIRST_ROOM,
        )
        prefix = self.programs.prefixes(window.prompts.keys_values, paths)
        return slots, DecodeInputs(prefix, lengths, rows, keys), state

    def _fewer(
        self, slots: BatchSlots, asked: DecodeInputs, state: DecodeState, unfinished: np.ndarray
    ) -> tuple[BatchSlots, DecodeInputs, DecodeState]:
        """Compacts a batch to its unfinished participants."""
        slots, kept = slots.compacted(unfinished)
        keys, state = self.programs.fewer(asked.keys, state, kept)
        prefix, lengths = asked.prefix, asked.lengths
        prompts, renumbered = np.unique(slots.prompt, return_inverse=True)
        groups = 1 if len(prompts) == 1 else shrunk(len(lengths), len(prompts))
        if groups < len(lengths):
            padded = np.zeros(groups, np.int32)
            padded[: len(prompts)] = prompts
            prefix, lengths = self.programs.of_prompts(prefix, padded), lengths[padded]
            slots = replace(slots, prompt=renumbered)
        rows = slots.rows(groups, shrunk(asked.rows.of_prompt.shape[2], slots.most()))
        return slots, DecodeInputs(prefix, lengths, rows, keys), state


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

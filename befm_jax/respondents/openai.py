"""A model of a server that speaks the OpenAI protocol as a respondent: `--model openai:MODEL`.

*By draws*: each simulated participant is a request of its own, with a seed of its own, so that no
server can give a population one cached answer.  Temperature and top-p are sent, 1 unless told
otherwise; other servers than OpenAI's are also told to do without what a model's generation config
or the server itself may set (top-k, min-p, a repetition penalty), and a note says what they refuse.
Answers are read as `AnswerSet.parse` says; those that can't be are counted, and their texts kept.

*Exactly*, where the server gives the log-probability of whole answers:

- `prompt_logprobs` of a chat that ends with the answer (vLLM): the server's own chat template;
- `echo` with `logprobs` of a completion (vLLM, llama-cpp-python): the chat template of `tokenizer`;
- `logprobs` of a chat's first token, where each answer of the set is one token and among the
  twenty likeliest.

Another server is refused with the reason.  The probability of an answer is that of its text,
whatever follows: none of these says where a turn ends, whose probability the engine counts in.  So
answers of which one begins another (`A`, `AB`) are refused, too.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from befm_jax.data.items import AnswerSet, FreeText, Item, Message
from befm_jax.data.responses import Exact, How, Response, Sampled
from befm_jax.errors import DataError, UserError
from befm_jax.models import resolve_model
from befm_jax.respondents.requests import (
    OPENAI,
    Client,
    RefusedError,
    Request,
    Spending,
    UnsupportedError,
)

PREFIX = "openai:"
# Answers of one token are looked for among so many: the protocol's most.
_TOP = 20
# Seeds are below this: some servers take 32 bits with a sign.
_SEEDS = 2**31
# Probabilities of the answers sum to a little more than 1 where a server computes in 16 bits.
_ROUNDING = 0.02
# What a server may set by itself, switched off.
_UNCHANGED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class _Way(NamedTuple):
    """A way to score answers: the request of an item's answer, and how its reply is read.

    `whole`: a request scores one answer, whose log-probability is read; else one request scores
    all, whose probabilities are read.
    """

    request: Callable[[Item, int], Request]
    read: Callable[[Mapping[str, Item], Request, Mapping[str, Any]], Any]
    whole: bool = True

    def requests(self, item: Item) -> Iterator[Request]:
        """What scores all answers of an item."""
        return (self.request(item, at) for at in (_places(item) if self.whole else range(1)))


class OpenAI:
    """A server's model (a `data.responses.Respondent`).

    Attributes:
        client: what asks the server.
        name: `openai:MODEL`.
    """

    def __init__(self, client: Client, tokenizer: str = "") -> None:
        """Prepares to ask; nothing is sent yet.

        Args:
            client: what asks the server.
            tokenizer: a model's directory or hub id with the server's tokenizer and chat template,
                for exact distributions by `echo`; "": those of the server itself alone.
        """
        self.client = client
        self.name = f"{PREFIX}{client.model}"
        self._tokenizer = tokenizer
        self._loaded: Any = None
        echo = [_Way(self._echo, _echoed_log_probability)] if tokenizer else []
        self._ways = [
            _Way(_in_chat, _prompt_log_probability),
            *echo,
            _Way(_first_token, _first_tokens, whole=False),
        ]
        self._found: tuple[_Way, list[str]] | None = None
        self._admitted: set[tuple[str, str, How]] = set()

    def describe(self) -> dict[str, Any]:
        """The server's address, the model, and the tokenizer where one is given."""
        told = {"path": self.name, "base_url": self.client.base_url, "model": self.client.model}
        return told | ({"tokenizer": self._tokenizer} if self._tokenizer else {})

    def first_prompt(self, items: Sequence[Item]) -> dict[str, Any]:
        """The first item's prompt, for output files.

        `item`; the messages as a `text`; `left_out`, the fields that the server refused, if any.
        """
        if not items:
            return {}
        text = "\n\n".join(f"{message.role}: {message.text}" for message in items[0].prompt)
        left_out = {"left_out": sorted(self.client.left_out)} if self.client.left_out else {}
        return {"item": items[0].id, "text": text} | left_out

    def admit(self, asked: Sequence[tuple[Sequence[Item], How]]) -> None:
        """Says what it costs at most to ask items, before any is asked.

        Raises:
            UserError: that is above a limit, or nothing says that it may be spent.
        """
        self.client.admit(
            request
            for items, how in asked
            for request in (
                self._draws(items, how)
                if isinstance(how, Sampled)
                # Whole answers, the dearest of the three ways.
                else (
                    _in_chat(item, at)
                    for item in items
                    if not any(self._has(way, [item]) for way in self._ways)
                    for at in _places(item)
                )
            )
        )
        self._admitted |= {
            (item.id, item.fingerprint, how) for items, how in asked for item in items
        }

    def respond(self, items: Sequence[Item], how: How) -> Iterator[Response]:
        """A response to every item, as the last of its answers comes.

        A draw depends on the seed of `how`, the item's id and the participant's number.  What it
        costs is said first, unless `admit` was called for the same items.

        Raises:
            DataError: free text, answers of which one begins another, or a server without the
                log-probabilities are asked exactly.
            UserError: as `Client.admit` and `Client.each`.
        """
        new = [i for i in items if (i.id, i.fingerprint, how) not in self._admitted]
        if new:
            self.admit([(new, how)])
        return self._exact(items) if isinstance(how, Exact) else self._sampled(items, how)

    def _sampled(self, items: Sequence[Item], how: Sampled) -> Iterator[Response]:
        by_id = {item.id: item for item in items}
        texts: dict[str, dict[int, str]] = {}
        requests = self._draws(items, how)
        for request, text in self.client.each(requests, text_of, refusable=True):
            drawn = texts.setdefault(request.item, {})
            drawn[request.number] = text or ""
            if len(drawn) == how.n:
                del texts[request.item]
                yield _response(by_id[request.item], [drawn[number] for number in range(how.n)])

    def _draws(self, items: Sequence[Item], how: Sampled) -> Iterator[Request]:
        """A request for each participant of each item."""
        changed = {"top_k": how.top_k} if how.top_k else {}
        # OpenAI's own server has none of these, and knows no name of them.
        unchanged = {} if self.client.base_url.startswith(OPENAI) else _UNCHANGED
        optional = {name: value for name, value in unchanged.items() if name not in changed}
        for item in items:
            free = isinstance(item.answers, FreeText)
            most = item.answers.max_tokens if free else how.max_tokens  # type: ignore[union-attr]
            instead: dict[str, dict[str, Any]] = {name: {} for name in optional}
            instead["max_tokens"] = {"max_completion_tokens": most}
            body = {
                "messages": _messages(item.prompt),
                "max_tokens": most,
                "temperature": how.temperature,
                "top_p": how.top_p,
                **changed,
                **optional,
            }
            for participant in range(how.n):
                seed = (_seed(how.seed, item.id) + participant) % _SEEDS
                yield Request(item.id, participant, body | {"seed": seed}, instead)

    def _exact(self, items: Sequence[Item]) -> Iterator[Response]:
        for item in items:
            if isinstance(item.answers, FreeText):
                raise DataError(f"item {item.id}: free text has no distribution; draw it instead")
            # Sorted, what begins another is right before one that it begins.
            for one, other in itertools.pairwise(sorted(item.answers.written)):
                if other.startswith(one):
                    raise DataError(
                        f"item {item.id}: {one} also begins {other}, and a server does not say "
                        "where an answer ends; draw answers instead (--sampled)"
                    )
        if not items:
            return
        by_id = {item.id: item for item in items}
        way, reasons = self._way(items)
        found: dict[str, dict[int, Any]] = {}
        requests = (request for item in items for request in way.requests(item))
        try:
            for request, read in self.client.each(requests, partial(way.read, by_id)):
                logs = found.setdefault(request.item, {})
                logs[request.number] = read
                places = _places(by_id[request.item])
                if not way.whole:
                    yield _response_of(request.item, read)
                elif len(logs) == len(places):
                    del found[request.item]
                    yield _response_of(request.item, [math.exp(logs[place]) for place in places])
        except (RefusedError, UnsupportedError) as error:
            if way.whole:
                raise
            raise DataError(
                f"{self.name} has no exact distributions; draw answers instead (--sampled). "
                f"{'; '.join((*reasons, str(error)))}"
            ) from None

    def _has(self, way: _Way, items: Sequence[Item]) -> bool:
        """Whether all answers of items in a way are kept; of free text there are none."""
        return all(
            isinstance(item.answers, AnswerSet) and all(map(self.client.has, way.requests(item)))
            for item in items
        )

    def _way(self, items: Sequence[Item]) -> tuple[_Way, list[str]]:
        """How this server scores answers, and why not in the ways before; the last is not tried.

        Where all answers of the items are kept nothing is asked.
        """
        for way in self._ways:
            if self._has(way, items):
                return way, []
        if self._found is None:
            reasons: list[str] = []
            for way in self._ways[:-1]:
                try:
                    probe = partial(way.read, {items[0].id: items[0]})
                    list(self.client.each([way.request(items[0], 0)], probe))
                except (RefusedError, UnsupportedError) as error:
                    reasons.append(str(error))
                else:
                    break
            else:
                way = self._ways[-1]
            self._found = way, reasons
        return self._found

    def _echo(self, item: Item, position: int) -> Request:
        """A completion of the prompt in the tokenizer's chat template, and an answer after it."""
        prompt = self._rendered(item.prompt) + _closed(item).written[position]
        body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 1.0}
        return Request(item.id, position, body, path="/completions")

    def _rendered(self, prompt: tuple[Message, ...]) -> str:
        """A prompt in the tokenizer's chat template, without the token that servers put first."""
        if self._loaded is None:
            from befm_jax.llama.tokenizer import Tokenizer

            self._loaded = Tokenizer.load(resolve_model(self._tokenizer).directory)
        ids = self._loaded.prompt(prompt)
        ids = ids[1:] if ids[0] == self._loaded.bos_id else ids
        return str(self._loaded.decode(ids, special=True))


def client_from(flags: Any, kept: Path) -> Client:
    """The client of the flags of `cli.define_server_flags` and `--model`.

    Raises:
        UserError: see `Client` and `Spending`; prices that are not two numbers.
    """
    prices = None
    if flags.prices is not None:
        try:
            read, written = map(float, flags.prices)
        except ValueError:
            given = ",".join(flags.prices)
            raise UserError(f"prices is {given}; it must be two numbers: 2.5,10") from None
        prices = (read, written)
    return Client(
        flags.model.removeprefix(PREFIX),
        flags.base_url,
        kept,
        Spending(prices, flags.budget, flags.budget_tokens, flags.yes),
        flags.concurrency,
        flags.timeout,
    )


def text_of(request: Request, reply: Mapping[str, Any]) -> str:
    """The text of a reply; "" where there is none, as after a refusal.

    Raises:
        KeyError, IndexError, TypeError: the reply is no chat completion.
    """
    text = reply["choices"][0]["message"]["content"]
    if not isinstance(text, str | None):
        raise TypeError(f"content is a {type(text).__name__}")
    return text or ""


def _messages(prompt: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text} for message in prompt]


def _closed(item: Item) -> AnswerSet:
    assert isinstance(item.answers, AnswerSet)  # `_exact` refuses others
    return item.answers


def _places(item: Item) -> range:
    """The positions of an item's answers; one of free text, which is refused later."""
    return range(1 if isinstance(item.answers, FreeText) else len(item.answers))


def _in_chat(item: Item, position: int) -> Request:
    """A chat that ends with an answer whose turn is left open, as vLLM names that."""
    written = "" if isinstance(item.answers, FreeText) else item.answers.written[position]
    body = {
        "messages": [*_messages(item.prompt), {"role": "assistant", "content": written}],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "prompt_logprobs": 1,
        "max_tokens": 1,
        "temperature": 1.0,
    }
    return Request(item.id, position, body)


def _prompt_log_probability(
    items: Mapping[str, Item], request: Request, reply: Mapping[str, Any]
) -> float:
    """The log-probability of the answer with which a chat ended."""
    tokens = reply.get("prompt_logprobs")
    if not isinstance(tokens, list):
        raise UnsupportedError("chats: its replies have no prompt_logprobs")
    # By token: its own entry first, then likelier ones; the first token has none.
    own = [next(iter(token.values())) for token in tokens if token]
    pairs = [(token["decoded_token"], token["logprob"]) for token in own]
    return _of_ending(_closed(items[request.item]).written[request.number], pairs)


def _echoed_log_probability(
    items: Mapping[str, Item], request: Request, reply: Mapping[str, Any]
) -> float:
    """The log-probability of the answer with which an echoed prompt ends."""
    found = reply["choices"][0].get("logprobs")
    if not isinstance(found, dict) or "token_logprobs" not in found:
        raise UnsupportedError("completions: its replies have no log-probabilities of the prompt")
    # The last token is the one that was drawn after the prompt.
    pairs = list(zip(found["tokens"], found["token_logprobs"], strict=True))[:-1]
    return _of_ending(_closed(items[request.item]).written[request.number], pairs)


def _of_ending(answer: str, tokens: Sequence[tuple[str, float]]) -> float:
    """The log-probability of the last tokens, those that spell an answer.

    Raises:
        UnsupportedError: none do, as where the answer's first token begins before it.
    """
    text, total = "", 0.0
    for token, log_probability in reversed(tokens):
        text, total = token + text, total + _log(log_probability)
        # A first token may begin with a space; a line feed would be part of what is answered.
        if text.lstrip(" ") == answer:
            return total
        if len(text.lstrip(" ")) > len(answer):
            break
    raise UnsupportedError(f"the last tokens of its prompts spell {text!r}, not {answer!r}")


def _log(value: float) -> float:
    """A log-probability; raises ValueError for a number that is none."""
    if not value <= 1e-3:  # NaN, too
        raise ValueError(f"a log-probability is {value}")
    return float(value)


def _first_token(item: Item, position: int) -> Request:
    """A chat's first token with its likeliest alternatives."""
    body = {
        "messages": _messages(item.prompt),
        "max_tokens": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "logprobs": True,
        "top_logprobs": _TOP,
    }
    return Request(item.id, position, body, {"max_tokens": {"max_completion_tokens": 1}})


def _first_tokens(
    items: Mapping[str, Item], request: Request, reply: Mapping[str, Any]
) -> list[float]:
    """`[A]`: the probability of each answer as the first token."""
    found = reply["choices"][0].get("logprobs")
    if not found or not found.get("content"):
        raise UnsupportedError("chats: its replies have no logprobs")
    mass: dict[str, float] = {}
    for token in found["content"][0]["top_logprobs"]:
        text = token["token"].strip(" ")
        mass[text] = mass.get(text, 0.0) + math.exp(_log(token["logprob"]))
    for written in _closed(items[request.item]).written:
        if written not in mass:
            raise UnsupportedError(
                f"item {request.item}: {written} is not one of the {len(mass)} first tokens that "
                "it gives; an answer must be one token"
            )
    return [mass[written] for written in _closed(items[request.item]).written]


def _response_of(item: str, mass: Sequence[float]) -> Response:
    """The exact response of these probabilities.

    Raises:
        DataError: they sum to more than 1 by more than 16 bits round.
    """
    total = math.fsum(mass)
    if total > 1.0 + _ROUNDING:
        raise DataError(
            f"item {item}: the probabilities of its answers sum to {total:.4f}; they must sum to 1 "
            "at most"
        )
    return Response.from_mass(item, np.asarray(mass) / max(1.0, total))


def _response(item: Item, texts: Sequence[str]) -> Response:
    """The response of texts, one a participant."""
    if isinstance(item.answers, FreeText):
        blank = sum(not text.strip() for text in texts)
        outside = blank / len(texts)
        return Response(item.id, None, False, outside, len(texts), blank, tuple(texts))
    parsed = [item.answers.parse(text) for text in texts]
    positions = [answer.position for answer in parsed if answer.position is not None]
    return Response.from_counts(
        item.id,
        np.bincount(positions, minlength=len(item.answers)),
        unread=sum(answer.reason == "no answer" for answer in parsed),
        not_allowed=sum(answer.reason == "outside the answer set" for answer in parsed),
        texts=texts,
    )


def _seed(seed: int, item: str) -> int:
    """The seed of an item's first participant; the others' follow it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{item}".encode()).digest()[:4], "big")

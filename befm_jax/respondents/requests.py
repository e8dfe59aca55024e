"""Requests to a server that speaks the OpenAI protocol: many at once, every answer kept in a file.

The `openai` package (extra `api`) sends them.  After 408, 409, 429, 5xx, a time-out or a cut
connection a request is sent again: after as many seconds as `Retry-After` says, ten minutes at
most, else after a growing and jittered pause.  So is one whose reply is damaged.  Each answer is
written to the file before its place is given to the next request, so that a run that is killed at
any moment asks again only for what was under way.

The key is read from the environment.  It is in no file, and is replaced by `***` wherever a server
repeats it.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import os
import queue
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from befm_jax import files
from befm_jax.errors import DataError, UserError, printable

OPENAI = "https://api.openai.com/v1"
# The environment variable of the key.
KEY = "OPENAI_API_KEY"
# A key has this many characters or more; what is shorter stands in for one at a server without.
_SHORTEST_KEY = 8
# How often a request that fails is sent again, and how often at most one whose reply is damaged.
_RETRIES, _DAMAGED = 10, 5
# Seconds before the second try; twice as many each time, to the longest.
_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
# The most seconds that are waited because a server says so.
_LONGEST_ASKED = 600.0
# Status codes after which a request is sent again, as after all from 500.
_AGAIN = (408, 409, 429)
# Failures, as httpx names them, after which a server can't have got a request.
_NOT_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")
# Status codes by which a server says that it will not serve this request, and those that can be
# about this prompt alone: it is too long, or its content is not wanted.
_REFUSED, _OF_PROMPT = (400, 404, 405, 413, 415, 422), (400, 413, 422)
# A prompt that no server refuses; its reply is not looked at.
_HARMLESS = "Hello."
# A token of text has three bytes or more, nearly always; a message has some tokens around it.
_BYTES_A_TOKEN, _TOKENS_A_MESSAGE = 3, 10


class RefusedError(DataError):
    """A request that the server will not serve, with the status and all that it said."""

    def __init__(self, message: str, status: int, said: str) -> None:
        super().__init__(message)
        self.status, self.said = status, said


class UnsupportedError(DataError):
    """A reply without what was asked for, of a server that does not have it."""


class Tokens(NamedTuple):
    """Numbers of tokens, of prompts (read) and of answers (written)."""

    read: int = 0
    written: int = 0

    def and_of(self, other: Tokens) -> Tokens:
        """The sums of both."""
        return Tokens(self.read + other.read, self.written + other.written)


_NOTHING = Tokens()


@dataclass(frozen=True)
class Spending:
    """What may be spent; without a limit, `unlimited` says that this is meant.

    Attributes:
        prices: of a million tokens read and a million written, in any currency; None: unknown.
        money: the most that may be spent, in the currency of the prices.
        tokens: the most tokens that may be read and written.
        unlimited: whether to ask without a limit.

    Raises:
        UserError: a limit of money without prices, or a number that is not finite or below 0.
    """

    prices: tuple[float, float] | None = None
    money: float | None = None
    tokens: int | None = None
    unlimited: bool = False

    def __post_init__(self) -> None:
        for name, number in (
            *(("prices", price) for price in self.prices or ()),
            ("budget", self.money or 0.0),
            ("budget_tokens", self.tokens or 0),
        ):
            if not (math.isfinite(number) and number >= 0):
                raise UserError(f"{name} is {number}; it must be a finite number, 0 or more")
        if self.money is not None and self.prices is None:
            raise UserError("budget: needs prices, those of a million tokens read and written")

    def cost(self, tokens: Tokens) -> float:
        """What tokens cost, in the currency of the prices; 0 without prices."""
        read, written = self.prices or (0.0, 0.0)
        return (tokens.read * read + tokens.written * written) / 1e6

    def allows(self, tokens: Tokens) -> bool:
        """Whether these tokens are within the limits; without one, whether that is meant."""
        if self.money is None and self.tokens is None:
            return self.unlimited
        within = self.tokens is None or tokens.read + tokens.written <= self.tokens
        return within and (self.money is None or self.cost(tokens) <= self.money)

    def in_words(self, tokens: Tokens) -> str:
        """Numbers of tokens and, where prices are known, what they cost."""
        cost = "" if self.prices is None else f", which cost {self.cost(tokens):,.2f}"
        return f"{tokens.read:,} tokens read and {tokens.written:,} written{cost}"


class Request(NamedTuple):
    """One request.

    Attributes:
        item: the item that it asks.
        number: which request of the item: the participant, or the position of an answer.
        body: the JSON object that is sent, without the model; its `max_tokens` are the most that
            can be written.
        instead: fields that are left out where the server refuses them, each with what is sent in
            its place.
        path: where it is sent to, below the base URL.
    """

    item: str
    number: int
    body: Mapping[str, Any]
    instead: Mapping[str, Mapping[str, Any]] = {}
    path: str = "/chat/completions"

    @property
    def most(self) -> Tokens:
        """How many tokens are read and written: nearly always fewer."""
        asked = self.body.get("messages") or [{"content": self.body.get("prompt", "")}]
        # Whatever else is to be read, such as a schema.
        rest = json.dumps(self.body.get("response_format", ""))
        size = sum(len(message["content"].encode()) for message in asked) + len(rest)
        read = math.ceil(size / _BYTES_A_TOKEN) + _TOKENS_A_MESSAGE * (len(asked) + 1)
        return Tokens(read, self.body["max_tokens"])


Read = Callable[[Request, Mapping[str, Any]], Any]


@dataclass
class Client:
    """Asks a model of a server, several requests at a time.

    Attributes:
        model: its name at the server.
        base_url: the server's address with the version: `http://localhost:8000/v1`.
        kept: the JSON Lines file of the answers, which is gone on with; None: kept in memory alone.
        spending: what may be spent.
        concurrency: the most requests at a time.
        timeout: seconds after which a request is tried again.
        left_out: optional fields that the server refused, in earlier runs with `kept` too.
        spent: what the replies have read and written so far, those of `kept` and damaged ones
            included; a request that was sent and lost counts as `Request.most`.

    Raises:
        UserError: the openai package is not installed, an address that can't be one or that holds
            a password, or a number out of its range.
        DataError: the file of answers is damaged, with the line.
    """

    model: str
    base_url: str = OPENAI
    kept: Path | None = None
    spending: Spending = Spending()
    concurrency: int = 16
    timeout: float = 120.0
    spent: Tokens = field(default=_NOTHING, init=False)
    left_out: set[str] = field(default_factory=set, init=False)
    _answers: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _reserved: Tokens = field(default=_NOTHING, init=False, repr=False)
    # What is spent and in no line of the file yet.
    _unkept: Tokens = field(default=_NOTHING, init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            import openai  # noqa: F401
        except ImportError:
            raise UserError(
                "a model of a server needs openai; install it with pip install 'befm_jax[api]'"
            ) from None
        self.base_url = _address(self.base_url)
        if self.concurrency < 1 or not 0 < self.timeout < math.inf:
            raise UserError("concurrency must be at least 1, and timeout above 0 seconds")
        if not (_key().isascii() and _key().isprintable()):
            raise UserError(f"{KEY} is not a key: it has characters that no header can hold")
        if self.kept is not None and self.kept.is_file() and self.kept.stat().st_size:
            self._read_answers(self.kept)

    def has(self, request: Request) -> bool:
        """Whether the answer of a request is kept."""
        return self._name(request) in self._answers

    def missing(self, requests: Iterable[Request]) -> tuple[int, Tokens]:
        """How many of the requests have no answer yet, and the most that these can take."""
        number, tokens = 0, _NOTHING
        for request in requests:
            if not self.has(request):
                number, tokens = number + 1, tokens.and_of(request.most)
        return number, tokens

    def admit(self, requests: Iterable[Request]) -> None:
        """Prints on standard error what the requests can cost at most, before any is sent.

        Raises:
            UserError: it is above a limit, or there is no limit and `unlimited` is not set.
        """
        number, tokens = self.missing(requests)
        said = f"{number:,} requests, at most {self.spending.in_words(tokens)}"
        print(f"{printable(self.model)} at {self.base_url}: {said}", file=sys.stderr)
        if not number:
            return
        if self.spending.allows(self.spent.and_of(tokens)):
            return
        limit = _limit(self.spending)
        if not limit:
            raise UserError(
                f"nothing was asked: {said}; add --yes to ask, or a limit, --budget_tokens N or "
                "--budget MONEY"
            )
        before = f"; spent before: {self.spending.in_words(self.spent)}" if any(self.spent) else ""
        raise UserError(f"nothing was asked: {said}, which is above the limit ({limit}){before}")

    def each(
        self, requests: Iterable[Request], read: Read, refusable: bool = False
    ) -> Iterator[tuple[Request, Any]]:
        """Every request with its answer, each as it comes.

        Those whose answers are kept are not sent.  `requests` is gone through in another thread.
        When this iterator is closed, requests under way are given up.

        Args:
            requests: what to ask.
            read: makes an answer, a JSON value, of a request and its reply.  Where it raises
                KeyError, IndexError, TypeError or ValueError the reply is damaged; a UserError ends
                everything.
            refusable: whether the answer is None where a server refuses a request because of its
                prompt, that is, serves it with a harmless one; these come last.

        Raises:
            RefusedError: the server will not serve a request; with `refusable`, any request.
            UserError: no answer after all retries, a key that is not accepted, a limit that is
                reached.  Requests that are under way are waited for, and their answers kept.
        """
        results: queue.SimpleQueue[tuple[Request, Any] | BaseException | None] = queue.SimpleQueue()
        started: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

        async def work() -> None:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            started.put(lambda: loop.call_soon_threadsafe(task.cancel))
            await self._work(iter(requests), read, refusable, lambda *pair: results.put(pair))

        def run() -> None:
            try:
                asyncio.run(work())
                results.put(None)
            except BaseException as error:
                results.put(error)

        # A loop in a thread of its own: a notebook has one running in this.
        thread = threading.Thread(target=run, name="requests", daemon=True)
        thread.start()
        cancel = started.get()
        try:
            while (result := results.get()) is not None:
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            with suppress(RuntimeError):  # the loop has ended
                cancel()
            thread.join()

    async def _work(
        self,
        requests: Iterator[Request],
        read: Read,
        refusable: bool,
        done: Callable[[Request, Any], None],
    ) -> None:
        """Asks all requests; after a failure those under way alone are waited for."""
        import openai

        failed: list[Exception] = []
        refused: list[tuple[Request, RefusedError]] = []

        async def probe(client: openai.AsyncOpenAI, request: Request) -> None:
            """Fails where the server refuses a request with a harmless prompt, too."""
            body = dict(request.body) | {"messages": [{"role": "user", "content": _HARMLESS}]}
            harmless = request._replace(body=body)
            try:
                self._check(harmless.most)
                self._take(_tokens(await self._send(client, harmless), harmless.most))
            except Exception as error:
                failed.append(error)

        async def ask(client: openai.AsyncOpenAI) -> None:
            while not failed and (request := next(requests, None)) is not None:
                try:
                    if (name := self._name(request)) not in self._answers:
                        await self._ask(client, request, name, read)
                    done(request, self._answers[name])
                except RefusedError as error:
                    if not refusable or error.status not in _OF_PROMPT:
                        failed.append(error)
                    elif not refused:
                        await probe(client, request)
                    refused.append((request, error))
                except Exception as error:
                    failed.append(error)

        async with openai.AsyncOpenAI(
            # A server of one's own needs no key, the package does.
            api_key=_key() or "none",
            base_url=self.base_url,
            timeout=self.timeout,
            max_retries=0,  # it would send again what no limit counts
        ) as client:
            await asyncio.gather(*(ask(client) for _ in range(self.concurrency)))
            if refused and not failed:  # an account may have run out since
                await probe(client, refused[0][0])
        if failed:
            if any(self._unkept):  # no answer, but it counts
                self._keep(Request("", 0, {}), "", None, "")
            raise failed[0]
        reasons = {request.item: error for request, error in refused}
        numbers = Counter(request.item for request, _ in refused)
        for item, error in reasons.items():
            print(f"note: {numbers[item]} answers are none: {error}", file=sys.stderr)
        for request, _ in refused:
            self._keep(request, self._name(request), None, "")
            done(request, None)

    async def _ask(self, client: Any, request: Request, name: str, read: Read) -> None:
        """Asks until a reply can be read, and keeps its answer."""
        problem = ""
        for attempt in range(_DAMAGED):
            if attempt:
                await asyncio.sleep(_pause(attempt))
            most = request.most
            self._check(most)
            self._reserved = self._reserved.and_of(most)
            try:
                reply = await self._send(client, request)
            finally:
                self._reserved = self._reserved.and_of(Tokens(-most.read, -most.written))
            self._take(_tokens(reply, most))
            try:
                if not isinstance(reply, dict):
                    raise TypeError("not a JSON object")
                if reply.get("error"):  # with status 200, as gateways send it
                    raise ValueError(reply["error"])
                answer = read(request, reply)
            except UserError:
                raise
            except (KeyError, IndexError, TypeError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                self._keep(request, name, answer, str(reply.get("model", "")))
                return
        raise UserError(
            f"item {request.item}: {_DAMAGED} replies of {self.base_url} are damaged "
            f"({_without_key(problem)}); answers are kept, and the same command goes on"
        )

    def _take(self, tokens: Tokens) -> None:
        self.spent, self._unkept = self.spent.and_of(tokens), self._unkept.and_of(tokens)

    def _check(self, more: Tokens = _NOTHING) -> None:
        """Raises UserError where more tokens than those under way are above the limit."""
        if not self.spending.allows(self.spent.and_of(self._reserved).and_of(more)):
            raise UserError(
                f"the limit ({_limit(self.spending) or 'none, and no --yes'}) is reached: "
                f"{self.spending.in_words(self.spent)}; answers are kept, and the same command "
                "with a higher limit goes on"
            )

    async def _send(self, client: Any, request: Request) -> Any:
        """The reply to a request, without the fields that the server refuses; None: not JSON.

        Raises as `each` does.
        """
        left_out = set(self.left_out)
        while True:
            try:
                reply = await self._post(client, request, left_out)
            except RefusedError as error:
                optional = {name for name in request.instead if name not in left_out}
                named = {name for name in optional if name in error.said}
                # A server that names none may mean any, but for the one that all need.
                more = named or optional - {"max_tokens"}
                if not more:
                    raise
                left_out |= more
            else:
                break
        for name in sorted(left_out - self.left_out):
            print(f"note: {self.base_url} refuses {name}: left out", file=sys.stderr)
        self.left_out |= left_out
        return reply

    async def _post(self, client: Any, request: Request, left_out: set[str]) -> Any:
        import openai

        body: dict[str, Any] = {"model": self.model}
        for name, value in request.body.items():
            out = name in left_out and name in request.instead
            body |= request.instead[name] if out else {name: value}
        where = f"item {request.item}: {self.base_url}"
        go_on = "answers are kept, and the same command goes on"
        for attempt in itertools.count(1):
            pause = _pause(attempt)
            try:
                return await client.post(request.path, body=body, cast_to=object)
            except (ValueError, RecursionError):
                return None
            except openai.APIStatusError as error:
                status, said = error.status_code, _without_key(error.message)
                if status in (401, 403):
                    key = "the key in" if _key() else "there is no key in"
                    raise UserError(f"{where} answers {status} ({key} {KEY}): {said}") from None
                if status in _REFUSED:
                    raise RefusedError(f"{where} answers {status}: {said}", status, said) from None
                headers = error.response.headers
                again = status in _AGAIN or status >= 500
                if attempt > _RETRIES or not again or headers.get("x-should-retry") == "false":
                    raise UserError(f"{where} answers {status}: {said}; {go_on}") from None
                pause = _asked_pause(headers) or pause
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                if type(cause).__name__ not in _NOT_SENT:
                    self._take(request.most)  # the server may count it
                if attempt > _RETRIES:
                    what = f"no connection ({_without_key(str(cause))})"
                    if isinstance(error, openai.APITimeoutError):
                        what = f"no answer within {self.timeout:g} seconds, again and again"
                    raise UserError(f"{where}: {what}; {go_on}") from None
                self._check()
            await asyncio.sleep(pause)

    def _name(self, request: Request) -> str:
        """What identifies a request and its answer: also participants whose bodies are equal."""
        sent = (self.base_url, self.model, request.path, dict(request.body))
        asked = json.dumps((request.item, request.number, sent), sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:32]

    def _keep(self, request: Request, name: str, answer: Any, model: str) -> None:
        record = {
            "request": name,
            "item": request.item,
            "number": request.number,
            "answer": _without_key(answer) if isinstance(answer, str) else answer,
            "model": _without_key(model),
            # With what failed before: the sum over the lines is what was spent.
            "tokens": self._unkept,
            "left_out": sorted(self.left_out),
        }
        line = json.dumps(record)
        if self.kept is not None:
            with files.writing(self.kept):
                self.kept.parent.mkdir(parents=True, exist_ok=True)
                self.kept.touch()
                size = self.kept.stat().st_size
                try:
                    with self.kept.open("a", encoding="ascii") as file:
                        file.write(line + "\n")
                except OSError:
                    # Half a line would damage the next, which may fit.
                    os.truncate(self.kept, size)
                    raise
        self._answers[name] = json.loads(line)["answer"]
        self._unkept = _NOTHING

    def _read_answers(self, path: Path) -> None:
        """Reads the answers of a file, what they took, and what the server refused.

        A last line that was cut off is dropped.
        """
        content = files.read_bytes(path)
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                record = files.parse_json(line)
                self._answers[str(record["request"])] = _checked(record["answer"])
                read, written = map(int, record["tokens"])
                self.left_out |= set(map(str, record["left_out"]))
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise DataError(f"{path}:{number}: not a kept answer ({error!r})") from None
            self.spent = self.spent.and_of(Tokens(read, written))
        if whole < len(content):
            with files.writing(path):
                os.truncate(path, whole)


def _checked(answer: Any) -> Any:
    """A kept answer; raises TypeError unless it is a text, a number, numbers or null."""
    numbers = answer if isinstance(answer, list) else [answer]
    if not isinstance(answer, str | None) and not all(type(n) in (int, float) for n in numbers):
        raise TypeError(f"answer is {answer!r:.40}")
    return answer


def _limit(limits: Spending) -> str:
    money = [] if limits.money is None else [f"--budget {limits.money:g}"]
    tokens = [] if limits.tokens is None else [f"--budget_tokens {limits.tokens}"]
    return ", ".join(money + tokens)


def _pause(attempt: int) -> float:
    """Seconds to wait after the first, second, ... try."""
    return min(_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.uniform(0.75, 1)


def _asked_pause(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, or until the date that it names; 0: it says neither."""
    said = headers.get("Retry-After", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(seconds, _LONGEST_ASKED) if seconds > 0 else 0.0


def _address(url: str) -> str:
    """A base URL without a last slash.

    Raises UserError where it can't be one, or holds what is not to be in files.
    """
    if any(sign in url for sign in "@?#") or _holds_key(url):
        raise UserError(
            f"base_url must hold no name, password, query or key; the key is that of {KEY}"
        )
    try:
        parts = urlsplit(url)
        _ = parts.port  # ValueError where it is none
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"base_url is {url!r}; it must be http(s)://HOST[:PORT]/v1")
    return url.rstrip("/")


def _key() -> str:
    return os.environ.get(KEY, "").strip()


def _holds_key(text: str) -> bool:
    """Whether a text holds the key; a placeholder such as `1` or `EMPTY` is none."""
    return len(_key()) >= _SHORTEST_KEY and _key() in text


def _without_key(text: str) -> str:
    return text.replace(_key(), "***") if _holds_key(text) else text


def _tokens(reply: Any, most: Tokens) -> Tokens:
    """What a reply says that it took; as much as it could where it says nothing."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    said = usage if isinstance(usage, dict) else {}
    counts = [said.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return Tokens(
        *(
            count if isinstance(count, int) and count >= 0 else estimate
            for count, estimate in zip(counts, most, strict=True)
        )
    )

"""Responses: what a respondent answered to items, how it was asked, and the file that keeps both.

`responses.jsonl` is the seam between models and statistics: everything after it runs again without
a model.  Its first line says who answered and how; every further line is one response, written when
it is done, so that a run that is killed goes on from the lines that are there.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float64

from befm_jax import files
from befm_jax.data.items import Item
from befm_jax.errors import DataError

SCHEMA = "befm_jax.responses/1"
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Exact:
    """Every answer of the set is scored: the respondent's whole distribution, nothing drawn."""


@dataclass(frozen=True)
class Sampled:
    """Answers are drawn, `n` to an item.

    The default draws from the model's own distribution.  A `temperature` below 1, `top_k` or
    `top_p` narrow a population and so measure themselves.

    Raises:
        DataError: a field out of its range.
    """

    n: int = 1000
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 16

    def __post_init__(self) -> None:
        for name, holds, right in (
            ("n", self.n >= 1, "at least 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
        ):
            if not holds:
                raise DataError(f"{name} is {getattr(self, name)!r}; it must be {right}")


How = Exact | Sampled


def how_as_dict(how: How) -> dict[str, Any]:
    """How a respondent was asked, as it stands in every output file."""
    return {"mode": "exact" if isinstance(how, Exact) else "sampled", **asdict(how)}


def how_from_dict(settings: Mapping[str, Any]) -> How:
    """The inverse of `how_as_dict`; settings that are missing have their defaults.

    Raises:
        DataError: a setting that is no number, or is out of its range.
    """
    if settings.get("mode") == "exact":
        return Exact()
    given = {one.name: settings[one.name] for one in fields(Sampled) if one.name in settings}
    for name, value in given.items():
        whole = isinstance(getattr(Sampled, name), int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            number = "a whole number" if whole else "a number"
            raise DataError(f"{name} is {value!r:.40}; it must be {number}")
    return Sampled(**given)


@dataclass(frozen=True, eq=False)
class Response:
    """What a respondent answered to one item.

    Attributes:
        item: the item's id.
        weights: `[A]` float64 within the answer set, read-only.  Exact: shares that sum to 1.
            Sampled: counts of draws.  All 0 only where nothing answered is in the set.  None for
            free text.
        exact: whether the weights are the whole distribution, not draws from it.
        outside: probability (exact) or share of draws (sampled) outside the answer set.
        draws: how many answers were drawn; 0 if exact.
        unread: draws in which no answer could be read; the others outside were not allowed.
        texts: what was written, where that is kept: untrusted text of a model.
        ends_after_answer: how often the turn ends right there, once an answer of the set is
            written: a probability, or a share of draws; None where nobody knows.
        asked: `Item.fingerprint` of what was asked; "" where it was not recorded.

    Raises:
        ValueError: weights that are not finite and non-negative numbers, an exact distribution that
            does not sum to 1, counts that are not whole or do not add up, a share beyond 0 to 1.
    """

    item: str
    weights: Float64[np.ndarray, " A"] | None
    exact: bool
    outside: float = 0.0
    draws: int = 0
    unread: int = 0
    texts: tuple[str, ...] = field(default=(), repr=False)
    ends_after_answer: float | None = None
    asked: str = ""

    def __post_init__(self) -> None:
        for name in ("outside", "ends_after_answer"):
            share = getattr(self, name)
            if share is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"{self.item}: {name} is {share}; a share is between 0 and 1")
        if self.weights is None:
            return
        weights = np.array(self.weights, np.float64)  # a copy: the caller's array stays theirs
        weights.setflags(write=False)
        object.__setattr__(self, "weights", weights)
        if weights.ndim != 1 or len(weights) < 2:
            raise ValueError(f"{self.item}: weights of shape {weights.shape}; one an answer")
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(f"{self.item}: weights must be finite and not negative")
        if self.empty and self.outside < 1.0 - _TOLERANCE:
            raise ValueError(f"{self.item}: weights are all 0, but only {self.outside} is outside")
        if self.exact:
            if not self.empty and abs(weights.sum() - 1.0) > _TOLERANCE:
                raise ValueError(f"{self.item}: an exact distribution sums to {weights.sum():.6g}")
        elif (weights != np.floor(weights)).any():
            raise ValueError(f"{self.item}: counts of answers must be whole numbers")
        elif abs(self.draws * (1.0 - self.outside) - weights.sum()) > _TOLERANCE * self.draws:
            raise ValueError(
                f"{self.item}: {weights.sum():g} of {self.draws} draws are in the set, but "
                f"{self.outside} is outside"
            )

    @property
    def summary(self) -> str:
        """How it was asked, and how much is outside the answer set, in words."""
        how = "exact" if self.exact else f"{self.draws:,} draws"
        return f"{how}, {self.outside:.2%} outside the answer set, {self.unread:,} unreadable"

    def __repr__(self) -> str:
        return f"<Response to {self.item}: {self.summary}>"

    def _repr_html_(self) -> str:
        """In a notebook: the summary, and a bar of each answer's share."""
        text = html.escape(repr(self))
        if self.weights is None or self.empty:
            return text
        shares = self.shares
        bars = "".join(
            f'<rect x="{at}" width="0.9" y="{1 - share / shares.max():.4f}" '
            f'height="{share / shares.max():.4f}"><title>answer {at}: {share:.2%}</title></rect>'
            for at, share in enumerate(shares)
        )
        size = 'width="320" height="60" preserveAspectRatio="none"'
        return f'{text}<br><svg {size} viewBox="0 0 {len(shares)} 1">{bars}</svg>'

    @property
    def empty(self) -> bool:
        """Whether nothing that was answered is in the set."""
        return self.weights is not None and not self.weights.any()

    @property
    def shares(self) -> Float64[np.ndarray, " A"]:
        """`[A]` shares of the answers within the set; all 0 if there are none.

        Raises:
            ValueError: free text has none.
        """
        if self.weights is None:
            raise ValueError(f"{self.item}: free text has no shares")
        return self.weights if self.empty else self.weights / self.weights.sum()

    @classmethod
    def from_mass(
        cls, item: str, mass: Sequence[float] | np.ndarray, ends_after_answer: float | None = None
    ) -> Response:
        """The exact response of a model with this probability on each of the `[A]` answers.

        What the masses lack to 1 is `outside`; what is there is normalised.

        Raises:
            ValueError: negative or non-finite mass, or more than 1 in all.
        """
        weights = np.asarray(mass, np.float64)
        inside = float(weights.sum())
        if inside > 1.0 + _TOLERANCE:
            raise ValueError(f"{item}: mass sums to {inside:.8g}; a model has no more than 1")
        shares = weights / inside if inside > 0.0 else weights
        outside = max(0.0, 1.0 - inside)
        return cls(item, shares, True, outside, ends_after_answer=ends_after_answer)

    @classmethod
    def from_counts(
        cls,
        item: str,
        counts: Sequence[float] | np.ndarray,
        unread: int = 0,
        not_allowed: int = 0,
        texts: Iterable[str] = (),
        ends_after_answer: float | None = None,
    ) -> Response:
        """A sampled response from the number on each of the `[A]` answers and those left out.

        Raises:
            ValueError: no draws at all, or counts that can't be.
        """
        weights = np.asarray(counts, np.float64)
        if min(unread, not_allowed) < 0:
            raise ValueError(f"{item}: counts of draws are not negative")
        draws = int(weights.sum()) + unread + not_allowed
        if draws == 0:
            raise ValueError(f"{item}: no draws")
        outside = (unread + not_allowed) / draws
        written = tuple(texts)
        return cls(item, weights, False, outside, draws, unread, written, ends_after_answer)


class Respondent(Protocol):
    """Whoever answers items: the engine, a server, recorded answers, a baseline."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def respond(self, items: Sequence[Item], how: How) -> Iterator[Response]:
        """A response to every item, each as it is done, in any order.

        Raises:
            DataError: an item, or a way of asking, that this respondent can't serve; says why.
        """

    def describe(self) -> dict[str, Any]:
        """Where it comes from, for every output: path, commit, adapter, template, dtype."""


class ResponseFile:
    """A `responses.jsonl`: read as far as it is whole, and appended to response by response.

    `respondent` and `how` are those of the first line; `responses` what is there, by item.
    """

    def __init__(self, path: str | Path, respondent: Mapping[str, Any], how: How) -> None:
        """Opens a file to go on with, or begins one; a last line that was cut off is dropped.

        Raises:
            DataError: the file is of another respondent, asked otherwise, or damaged.
        """
        self.path = Path(path)
        head = {"schema": SCHEMA, "respondent": dict(respondent), "how": how_as_dict(how)}
        # As JSON keeps it: tuples are lists there.
        self._head: dict[str, Any] = json.loads(json.dumps(head))
        self.responses: dict[str, Response] = {}
        if self.path.is_file() and self.path.stat().st_size:
            found, responses, whole = _read(self.path)
            differing = [name for name in self._head if found.get(name) != self._head[name]]
            if differing and responses:
                raise DataError(
                    f"{self.path}: was written for another {' and another '.join(differing)}; "
                    "name another file, or delete this one"
                )
            self.responses = responses
            os.truncate(self.path, whole)
        # Without a response yet, a file is as good as none.
        if not self.responses:
            files.write(self.path, (json.dumps(self._head) + "\n").encode())

    def append(self, response: Response) -> None:
        """Writes one response; it is in the file before this returns.

        Raises:
            NotWrittenError: the disk is full, say.
        """
        # In ASCII: a model's text may hold what ends a line elsewhere, or half a character.
        line = json.dumps(_as_dict(response)) + "\n"
        with files.writing(self.path), self.path.open("a", encoding="ascii") as file:
            file.write(line)
        self.responses[response.item] = response

    def complete(
        self, respondent: Respondent, items: Sequence[Item], how: How
    ) -> Iterator[Response]:
        """Asks for what is missing; yields every response, those that were there first.

        Raises:
            DataError: two items of one id, an item that was asked otherwise before (in another
                wording), or as `Respondent.respond`.
        """
        ids = [item.id for item in items]
        if len(set(ids)) < len(ids):
            twice = next(id for id, times in Counter(ids).items() if times > 1)
            raise DataError(f"two items have the id {twice!r}; ids are unique in a task")
        asked = {item.id: item.fingerprint for item in items}
        for id in ids:
            if id in self.responses and self.responses[id].asked not in ("", asked[id]):
                raise DataError(
                    f"{self.path}: item {id} was asked otherwise, in another wording or with other "
                    "answers; name another file, or delete this one"
                )
        yield from (self.responses[id] for id in ids if id in self.responses)
        missing = [item for item in items if item.id not in self.responses]
        if missing:
            for response in respondent.respond(missing, how):
                self.append(replace(response, asked=asked[response.item]))
                yield response


def read_responses(path: str | Path) -> tuple[dict[str, Any], dict[str, Response]]:
    """The first line of a `responses.jsonl`, and its responses by item.

    A last line that was cut off is passed over.

    Raises:
        DataError: no such file, or a damaged one, with the line.
    """
    files.read_bytes(path)
    head, responses, _ = _read(Path(path), with_last=True)
    return head, responses


def _read(path: Path, with_last: bool = False) -> tuple[dict[str, Any], dict[str, Response], int]:
    """The head, the responses, and how many bytes are whole lines.

    `with_last`: a last line without its end is read, too, if it is not cut off.
    """
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = files.decode(content[:whole], path).split("\n")[:-1]
    if with_last and _is_json(content[whole:]):
        lines.append(files.decode(content[whole:], path, len(lines) + 1))
    head: dict[str, Any] = {}
    responses: dict[str, Response] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = files.parse_json(line)
            if number == 1 and isinstance(record, dict):
                head = record
            else:
                response = _from_dict(record)
                if response.item in responses:
                    raise ValueError(f"a second one to {response.item!r}")
                responses[response.item] = response
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise DataError(f"{path}:{number}: not a response ({error})") from None
    if head.get("schema") != SCHEMA:
        raise DataError(f"{path}:1: schema is {head.get('schema')!r}; it must be {SCHEMA!r}")
    for name in ("respondent", "how"):
        if not isinstance(head.get(name), dict):
            raise DataError(f"{path}:1: {name} is {head.get(name)!r:.40}; it must be a JSON object")
    return head, responses, whole


def _is_json(content: bytes) -> bool:
    try:
        files.parse_json(content)
    except ValueError:
        return False
    return True


def _as_dict(response: Response) -> dict[str, Any]:
    weights = None if response.weights is None else response.weights.tolist()
    return {
        "item": response.item,
        "weights": weights,
        "exact": response.exact,
        "outside": response.outside,
        "draws": response.draws,
        "unread": response.unread,
        "texts": list(response.texts),
        "ends_after_answer": response.ends_after_answer,
        "asked": response.asked,
    }


_KINDS = {"exact": bool, "draws": int, "unread": int, "texts": list}


def _from_dict(record: Mapping[str, Any]) -> Response:
    weights = record["weights"]
    for name, kind in _KINDS.items():
        if not isinstance(record[name], kind):
            raise TypeError(f"{name} is {record[name]!r:.40}; it must be a {kind.__name__}")
    return Response(
        item=str(record["item"]),
        weights=None if weights is None else np.asarray(weights, np.float64),
        exact=bool(record["exact"]),
        outside=float(record["outside"]),
        draws=int(record["draws"]),
        unread=int(record["unread"]),
        texts=tuple(map(str, record["texts"])),
        ends_after_answer=record["ends_after_answer"],
        asked=str(record.get("asked", "")),
    )

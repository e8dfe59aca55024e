"""Items and examples: what is asked, which answers there are, and what is learnt of a conversation.

An `Item` is one question as it is asked, with the answers it allows and what was observed.  An
`Example` is a conversation of which some characters are learnt.  Both speak of messages; token ids
come later (`Tokenizer.encode`).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float64

from befm_jax.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# With several right letters, n letters make 2^n - 1 answers.
MOST_LETTERS_TOGETHER = 8

_NUMBER = r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"
# "[33]", "[$33]", "[ 33 dollars ]"; a percentage is of something else, so "[50%]" is not one.
# No two parts can take the same space: a long row of them would be tried in every division.
_BRACKETED_NUMBER = re.compile(rf"\[\s*(?:\$\s*)?({_NUMBER})(?:\s*[A-Za-z]+)?\s*\]")
# Not inside a word or after a point: the 4 of "GPT4" and the 5 of "v1.5" are no answers. A sign
# counts only where no word stands before it: "20-30" starts with 20.
_BARE_NUMBER = re.compile(rf"(?<![\w.]){_NUMBER}")
_COMMA = ": it has a comma; write 1000 or 0.5"
_BRACKETED_TEXT = re.compile(r"\[([^\[\]]+)\]")


class Message(NamedTuple):
    """One message of a conversation: who speaks, and what."""

    role: Role
    text: str


class Parsed(NamedTuple):
    """What was read from a text: an answer's position in its set, or None and the reason.

    The reasons of `AnswerSet.parse` are "no answer" and "outside the answer set"; those of
    `AnswerSet.parse_cell` are its own.
    """

    position: int | None
    reason: str = ""


@dataclass(frozen=True)
class AnswerSet:
    """A closed set of `A` answers; everything else speaks of their positions, 0 to A-1.

    `numbers`, `labels` and `letters` make one.

    Attributes:
        written: how each answer is written: `[33]`, `[$33]`, `[Push]`, `[BC]`, `BC`.
        values: places on a scale, ascending; None where the answers have no order.
        unit: what the values count, in the plural ("dollars"); "" for bare numbers and names.
        kind: how texts are read back.
        nearest: of numbers, whether one between or beyond the values is read as the nearest value.

    Raises:
        DataError: fewer than two answers, one written twice, or values that do not ascend.
    """

    written: tuple[str, ...]
    values: tuple[float, ...] | None = None
    unit: str = ""
    kind: Literal["numbers", "labels", "letters"] = "labels"
    nearest: bool = False

    def __post_init__(self) -> None:
        if len(self.written) < 2:
            raise DataError(f"answers: {len(self.written)}; a question has two answers or more")
        if len({text.casefold() for text in self.written}) < len(self.written):
            raise DataError("answers: one is written twice")
        if self.values is not None:
            if len(self.values) != len(self.written):
                raise DataError(
                    f"answers: {len(self.values)} values for {len(self.written)} answers"
                )
            if not all(low < high for low, high in itertools.pairwise(self.values)):
                raise DataError("answers: values must ascend, each once")

    @classmethod
    def numbers(cls, values: Iterable[float], unit: str = "") -> AnswerSet:
        """Numbers in square brackets, such as `range(101)` in "dollars".

        Raises:
            DataError: values that are not finite numbers, or do not ascend.
        """
        try:
            places = tuple(float(value) for value in values)
        except (TypeError, ValueError):
            raise DataError("answers: values must be numbers") from None
        if not all(map(math.isfinite, places)):
            raise DataError("answers: values must be finite")
        return cls(tuple(f"[{_shown(value)}]" for value in places), places, unit, "numbers")

    @classmethod
    def labels(cls, *names: str, values: Sequence[float] | None = None) -> AnswerSet:
        """Named answers in square brackets: "Push", "Pull"; `values` where they have an order.

        Raises:
            DataError: a name that does not start with a letter, or holds brackets.
        """
        if any(not re.fullmatch(r"[^\W\d_](?:[^\[\]]*\w)?", name) for name in names):
            raise DataError("answers: a label starts with a letter and holds no brackets")
        places = None if values is None else tuple(map(float, values))
        return cls(tuple(f"[{name}]" for name in names), places, kind="labels")

    @classmethod
    def letters(cls, number: int, several: bool = False) -> AnswerSet:
        """The letters of a multiple-choice question: `[A]`, `[B]`, ...

        Args:
            number: how many options the question has.
            several: whether several letters may be right together: then every set of letters is an
                answer, `[A]`, `[B]`, `[AB]`, ..., shorter ones first.

        Raises:
            DataError: too few or too many options.
        """
        most = MOST_LETTERS_TOGETHER if several else len(LETTERS)
        if not 2 <= number <= most:
            raise DataError(f"answers: {number} options; a question has 2 to {most}")
        sizes = range(1, number + 1 if several else 2)
        sets = itertools.chain.from_iterable(
            itertools.combinations(LETTERS[:number], size) for size in sizes
        )
        return cls(tuple(f"[{''.join(letters)}]" for letters in sets), kind="letters")

    def __len__(self) -> int:
        """How many answers there are: `A`."""
        return len(self.written)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The answers without brackets and dollar signs: "33", "Push", "BC"."""
        return tuple(text.strip("[$]") for text in self.written)

    @cached_property
    def request(self) -> str:
        """The sentence that asks for exactly one answer in the form that `parse` reads."""
        if self.kind == "letters":
            several = any(len(name) > 1 for name in self.names)
            what = "the letters of all right options" if several else "the letter of one option"
            # Of several letters one pair shows the form.
            shown = next(text for text in self.written if len(text) == (4 if several else 3))
            return f"Answer with {what} in square brackets, such as {shown}."
        if self.kind == "labels":
            return f"Answer with exactly one word in square brackets: {' or '.join(self.written)}."
        # A value about a third of the way up stands for the form.
        shown = self.written[len(self.written) // 3]
        number = f"whole number of {self.unit}" if self.unit else "whole number"
        if not all(float(name).is_integer() for name in self.names):
            number = number.removeprefix("whole ")
        return (
            f"Answer with exactly one {number} from {self.names[0]} to {self.names[-1]}, "
            f"written in square brackets, such as {shown}."
        )

    @property
    def in_words(self) -> str:
        """The set as a person would say it: "0 to 100 dollars", "Push, Pull"."""
        if self.kind == "numbers":
            return f"{self.names[0]} to {self.names[-1]} {self.unit}".rstrip()
        return ", ".join(self.names)

    def position(self, value: float) -> int:
        """The position of a value.

        Raises:
            DataError: the set does not hold it.
        """
        if value not in self._position_of_value:
            raise DataError(f"{_shown(value)} is not in the answer set, {self.in_words}")
        return self._position_of_value[value]

    def parse_cell(self, cell: str) -> Parsed:
        """The answer in a cell of a table: its name, in brackets or not, or its value.

        Unlike `parse`, which looks for an answer in a respondent's text, this takes the whole cell
        or nothing.  Upper and lower case are the same.  The reasons are "no answer" (an empty
        cell), "not a number" (with a hint where a comma makes it none), "not finite", "not a whole
        number" and "outside ", followed by the set in words.
        """
        text = cell.strip()
        if text.startswith("[") and text.endswith("]"):
            text = text[1:-1].strip()
        if not text:
            return Parsed(None, "no answer")
        if (position := self._position_of_name.get(text.casefold())) is not None:
            return Parsed(position)
        number = _as_number(text)
        if number is not None and (position := self._position_of_value.get(number)) is not None:
            return Parsed(position)
        if self.kind == "numbers":
            if number is None:
                # A decimal comma, or one of thousands: nothing says which.
                comma = _as_number(text.replace(",", ".", 1)) is not None
                return Parsed(None, f"not a number{_COMMA if comma else ''}")
            if not math.isfinite(number):
                return Parsed(None, "not finite")
            if not number.is_integer() and all(map(float.is_integer, self._position_of_value)):
                return Parsed(None, "not a whole number")
        return Parsed(None, f"outside {self.in_words}")

    def read_cell(self, cell: str) -> int:
        """The position of the answer in a cell of a table: see `parse_cell`.

        Raises:
            DataError: it holds none, with the reason.
        """
        position, reason = self.parse_cell(cell)
        if position is None:
            raise DataError(reason)
        return position

    @cached_property
    def _position_of_name(self) -> dict[str, int]:
        return {name.casefold(): position for position, name in enumerate(self.names)}

    @cached_property
    def _position_of_value(self) -> dict[float, int]:
        places = range(len(self)) if self.values is None else self.values
        return {float(value): position for position, value in enumerate(places)}

    def value_of(self, position: int) -> str:
        """How a table holds an answer: its value, or its name where the answers have no order.

        `parse_cell` reads it back.
        """
        return self.names[position] if self.values is None else _shown(self.values[position])

    def one(self, position: int) -> Float64[np.ndarray, " A"]:
        """One observation of an answer: 1 at its position, 0 elsewhere."""
        # range: None would be every position, and -1 the last.
        target = np.zeros(len(self))
        target[range(len(self)).index(position)] = 1.0
        return target

    def parse(self, text: str) -> Parsed:
        """The answer in a text.

        Numbers: the last one in brackets (`[33]`, `[$33]`, `[1,000]`, `[33.0]`, `[33 dollars]`),
        else the first number in the text.  Labels and letters: the last bracketed one, else the
        last one in the text; of labels upper and lower case are the same.  Letters may come with
        commas, spaces or "and" between them, in any order; without brackets `BC` is read where it
        is all of the text.
        """
        if self.kind == "numbers":
            return self._parse_number(text)
        return self._parse_letters(text) if self.kind == "letters" else self._parse_label(text)

    def _parse_number(self, text: str) -> Parsed:
        number = number_in(text)
        if number is None:
            return Parsed(None, "no answer")
        values = self.values or ()
        if self.nearest:
            inside = min(max(number, values[0]), values[-1])
            return Parsed(min(range(len(self)), key=lambda at: abs(values[at] - inside)))
        if number not in values:
            return Parsed(None, "outside the answer set")
        return Parsed(values.index(number))

    def _parse_label(self, text: str) -> Parsed:
        words = [name.casefold() for name in self.names]
        bracketed = [
            inside.strip().casefold()
            for inside in _BRACKETED_TEXT.findall(text)
            if any(character.isalpha() for character in inside)
        ]
        if bracketed:
            if bracketed[-1] not in words:
                return Parsed(None, "outside the answer set")
            return Parsed(words.index(bracketed[-1]))
        # The longer label first, where one begins with another.
        longest_first = sorted(words, key=len, reverse=True)
        pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
        bare = re.findall(pattern, text.casefold())
        return Parsed(words.index(bare[-1])) if bare else Parsed(None, "no answer")

    def _parse_letters(self, text: str) -> Parsed:
        bracketed = _BRACKETED_TEXT.findall(text)
        # Capitals alone: "a" is a word. In brackets nothing else is meant.
        bare = re.findall(r"(?<!\w)[A-Z](?:(?:\s*,\s*|\s+and\s+|\s*&\s*)[A-Z])*(?!\w)", text)
        alone = re.findall(r"^\W*([A-Z]+)\W*$", text)
        if not bracketed and not bare and not alone:
            return Parsed(None, "no answer")
        chosen = (bracketed or alone or bare)[-1].upper()
        name = "".join(sorted(set(re.sub(r"\bAND\b|[\s,&]", "", chosen))))
        if name not in self.names:
            return Parsed(None, "outside the answer set")
        return Parsed(self.names.index(name))


@dataclass(frozen=True)
class FreeText:
    """An answer in words of the respondent's own, of at most so many tokens."""

    max_tokens: int = 256


@dataclass(frozen=True)
class Example:
    """A conversation of which some characters are learnt.

    Attributes:
        messages: the conversation, in order.
        spans: what is learnt, `(message, start, stop)` by characters of the message's text, in
            order, none overlapping another.  A span that reaches the end of an assistant's message
            has its end of turn, too.  (): the whole last message and its end of turn.
        weight: how many observations this is; a finite number above 0.
        family: which kind of data it is of, for the mixture.

    Raises:
        DataError: no message, text that is not valid Unicode or holds a NUL, a last message that is
            blank where it is all that is learnt, spans that do not fit, a weight that can't be.
    """

    messages: tuple[Message, ...]
    spans: tuple[tuple[int, int, int], ...] = ()
    weight: float = 1.0
    family: str = ""

    def __post_init__(self) -> None:
        if not self.messages:
            raise DataError("messages: none; a conversation has one or more")
        for message in self.messages:
            if message.role not in ROLES:
                raise DataError(f"role: {message.role!r}; it must be one of {', '.join(ROLES)}")
            if "\0" in message.text or not _is_unicode(message.text):
                raise DataError(
                    f"{message.role}: not valid Unicode text, or it holds a NUL character"
                )
        if not self.spans:
            if len(self.messages) < 2 or self.messages[-1].role != "assistant":
                raise DataError("messages: the last one is learnt; it must be an assistant's reply")
            if not self.messages[-1].text.strip():
                raise DataError("assistant: blank; there would be nothing to learn")
        before = (0, 0)
        for place, start, stop in self.spans:
            inside = 0 <= place < len(self.messages)
            if not inside or not 0 <= start < stop <= len(self.messages[place].text):
                raise DataError(f"spans: ({place}, {start}, {stop}) is not in the conversation")
            if (place, start) < before:
                raise DataError("spans: must be in order, and must not overlap")
            before = (place, stop)
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"weight: {self.weight!r} is not a finite number above 0")

    @classmethod
    def of(
        cls, system: str, user: str, answer: str, weight: float = 1.0, family: str = ""
    ) -> Example:
        """One question and its answer; an empty `system` leaves that message out.

        Raises:
            DataError: a blank question, or as the class does.
        """
        if not user.strip():
            raise DataError("user: blank; a prompt is needed")
        given = (Message("system", system),) if system else ()
        told = (*given, Message("user", user), Message("assistant", answer))
        return cls(told, (), weight, family)


@dataclass(frozen=True, eq=False)
class Item:
    """One question as it is asked, its possible answers, and what was observed.

    Attributes:
        id: unique in its task: "bomb", "131099/bomb", "118/E4".
        prompt: the messages before the answer, several turns where there were several.
        answers: a closed set, or free text.
        target: over a closed set, `[A]` observations: a histogram, one person's answer as 1 and 0,
            the key of a question.  Of free text, reference texts.  None where nobody knows.
        labels: what figures are grouped, averaged and clustered by: game, person, sex, statement.
        notes: what else a measure needs and a model never sees: equilibrium, payoffs, effect size.

    Raises:
        DataError: no id, a prompt that does not end with a user's message, or a target that does
            not fit the answers.
    """

    id: str
    prompt: tuple[Message, ...]
    answers: AnswerSet | FreeText
    target: Float64[np.ndarray, " A"] | tuple[str, ...] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            raise DataError("item: an id is needed")
        if not self.prompt or self.prompt[-1].role != "user":
            raise DataError(f"item {self.id}: the prompt must end with a user's message")
        if self.target is None:
            return
        if isinstance(self.answers, FreeText):
            if not isinstance(self.target, tuple):
                raise DataError(f"item {self.id}: the target of free text is reference texts")
            return
        target = np.array(self.target, np.float64)  # a copy: the caller's array stays theirs
        target.setflags(write=False)
        if target.shape != (len(self.answers),) or not np.isfinite(target).all():
            raise DataError(
                f"item {self.id}: a target of shape {target.shape} for {len(self.answers)} answers"
            )
        if (target < 0).any():
            raise DataError(f"item {self.id}: a target counts observations; none is below 0")
        object.__setattr__(self, "target", target)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the prompt and the answers to choose from."""
        answers = () if isinstance(self.answers, FreeText) else self.answers.written
        return hashlib.sha256(repr((self.prompt, answers)).encode()).hexdigest()[:16]

    def examples(self, family: str = "") -> Iterator[Example]:
        """What there is to learn: an example an answer that was given, weighted by how often."""
        if self.target is None:
            return
        if isinstance(self.answers, FreeText):
            answered: Iterable[tuple[str, float]] = ((str(text), 1.0) for text in self.target)
        else:
            answered = zip(self.answers.written, np.asarray(self.target).tolist(), strict=True)
        for text, weight in answered:
            if weight > 0:
                yield Example((*self.prompt, Message("assistant", text)), (), weight, family)


def examples_of(items: Iterable[Item], family: str = "") -> Iterator[Example]:
    """What there is to learn of items, in order, with one conversation's answers in one example.

    Where an item's prompt goes on from the one before and its answer, both are learnt in one
    conversation: a person's fifty answers are encoded once and not fifty times.
    """
    messages: tuple[Message, ...] = ()
    spans: list[tuple[int, int, int]] = []
    weight = 0.0

    def conversation() -> Example:
        return Example(messages, tuple(spans) if len(spans) > 1 else (), weight, family)

    for example in itertools.chain.from_iterable(item.examples(family) for item in items):
        longer = len(example.messages) > len(messages)
        goes_on = longer and example.messages[: len(messages)] == messages
        if messages and not (goes_on and example.weight == weight):
            yield conversation()
            spans = []
        messages, weight = example.messages, example.weight
        spans.append((len(messages) - 1, 0, len(messages[-1].text)))
    if messages:
        yield conversation()


def number_in(text: str) -> float | None:
    """The number that a respondent's text answers with; None where it has none.

    The last one in brackets (`[33]`, `[$33]`, `[1,000]`), else the first one.
    """
    bracketed = _BRACKETED_NUMBER.findall(text)
    bare = None if bracketed else _BARE_NUMBER.search(text)
    if not bracketed and bare is None:
        return None
    # float, not int: thousands of digits become inf instead of an exception.
    return float((bracketed[-1] if bare is None else bare[0]).replace(",", ""))


def _shown(value: float) -> str:
    """A number as it is written in a text: without a point where it is whole."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _as_number(text: str) -> float | None:
    """The number that a text is; None where it is something else."""
    # float() reads "1_000" and other scripts' digits as well, which no table means as a number.
    if "_" in text or not text.isascii():
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

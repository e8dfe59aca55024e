"""Answer sets: which answers a question allows, how each is written, and how text is read back."""

import itertools
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from befm_jax.errors import DataError

_NUMBER = r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"
# "[33]", "[$33]", "[ 33 dollars ]"; a percentage is of something else, so "[50%]" is not one.
_BRACKETED_NUMBER = re.compile(rf"\[\s*\$?\s*({_NUMBER})\s*[A-Za-z]*\s*\]")
# Not inside a word or after a point: the 4 of "GPT4" and the 5 of "v1.5" are no answers. A sign
# counts only where no word stands before it: "20-30" starts with 20.
_BARE_NUMBER = re.compile(rf"(?<![\w.]){_NUMBER}")
_BRACKETED_TEXT = re.compile(r"\[([^\[\]]+)\]")


@dataclass(frozen=True)
class Parsed:
    """What was read from a text.

    Attributes:
        value: the answer, or None.
        reason: why there is none: no answer was found, or one that the set does not hold.
    """

    value: int | None
    reason: Literal["", "no answer", "outside the answer set"] = ""


@dataclass(frozen=True)
class AnswerSet:
    """The answers that a question allows.

    Attributes:
        values: whole numbers, ascending; any sequence, e.g. `range(101)`.
        unit: what they count, in the plural, e.g. "dollars"; for axes and sentences; "" where
            they are bare numbers.
        labels: for named actions, one word for each value, written instead of the number.

    Raises:
        DataError: no values, values out of order or not whole, labels that do not match them.
    """

    values: Sequence[int]
    unit: str
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            values = tuple(operator.index(value) for value in self.values)
        except TypeError:
            raise DataError("answers: values must be whole numbers") from None
        if not values:
            raise DataError("answers: no values; one or more is needed")
        if any(low >= high for low, high in itertools.pairwise(values)):
            raise DataError("answers: values must ascend, each once")
        object.__setattr__(self, "values", values)
        if self.labels:
            words = {label.casefold() for label in self.labels}
            if len(words) != len(values) or len(self.labels) != len(values):
                raise DataError(f"answers: {len(values)} values need as many different labels")
            if any(not re.fullmatch(r"[^\W\d_](?:[^\[\]]*\w)?", label) for label in self.labels):
                raise DataError("answers: a label starts with a letter and holds no brackets")

    @property
    def request(self) -> str:
        """The sentence that asks for exactly one answer in the form that `parse` reads."""
        if self.labels:
            choices = " or ".join(f"[{label}]" for label in self.labels)
            return f"Answer with exactly one word in square brackets: {choices}."
        low, high = self.values[0], self.values[-1]
        # A value about a third of the way up stands for the form.
        shown = self.format(self.values[len(self.values) // 3])
        number = f"whole number of {self.unit}" if self.unit else "whole number"
        return (
            f"Answer with exactly one {number} from {low} to {high}, "
            f"written in square brackets, such as {shown}."
        )

    def format(self, value: int) -> str:
        """How an answer is written: `[33]`, or `[Push]` for a named action.

        Raises:
            DataError: the set does not hold the value.
        """
        if value not in self.values:
            raise DataError(f"{value!r} is not in the answer set, {self.range_in_words}")
        return f"[{self.labels[self.values.index(value)] if self.labels else value}]"

    def parse(self, text: str) -> Parsed:
        """The answer in a text.

        Numbers: the last one in brackets (`[33]`, `[$33]`, `[1,000]`, `[33.0]`, `[33 dollars]`),
        else the first number in the text. Labels: the last bracketed word, else the last label
        in the text; upper and lower case are the same.
        """
        return self._parse_label(text) if self.labels else self._parse_number(text)

    @property
    def range_in_words(self) -> str:
        """The set as a person would say it: "0 to 100 dollars", "Push, Pull"."""
        if self.labels:
            return ", ".join(self.labels)
        return f"{self.values[0]} to {self.values[-1]} {self.unit}".rstrip()

    def _parse_number(self, text: str) -> Parsed:
        bracketed = _BRACKETED_NUMBER.findall(text)
        bare = None if bracketed else _BARE_NUMBER.search(text)
        if not bracketed and bare is None:
            return Parsed(None, "no answer")
        # float, not int: thousands of digits become inf instead of an exception.
        number = float((bracketed[-1] if bare is None else bare[0]).replace(",", ""))
        if not number.is_integer() or int(number) not in self.values:
            return Parsed(None, "outside the answer set")
        return Parsed(int(number))

    def _parse_label(self, text: str) -> Parsed:
        words = [label.casefold() for label in self.labels]
        bracketed = [
            found.strip().casefold()
            for found in _BRACKETED_TEXT.findall(text)
            if any(character.isalpha() for character in found)
        ]
        if bracketed:
            if bracketed[-1] not in words:
                return Parsed(None, "outside the answer set")
            return Parsed(self.values[words.index(bracketed[-1])])
        # The longer label first, where one begins with another.
        longest_first = sorted(words, key=len, reverse=True)
        pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
        bare = re.findall(pattern, text.casefold())
        return Parsed(self.values[words.index(bare[-1])]) if bare else Parsed(None, "no answer")

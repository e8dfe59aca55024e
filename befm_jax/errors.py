"""Errors that a person can cause and mend, and their usual wordings."""

import difflib
from collections.abc import Iterable

_MOST_NAMED = 40
_LONGEST = 2000  # characters of a message


def printable(text: str) -> str:
    """A text as one line for a terminal: what is not printable is escaped, the middle left out.

    Files, templates and models' answers may hold sequences that a terminal obeys.
    """
    line = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
    if len(line) <= _LONGEST:
        return line
    half = (_LONGEST - 5) // 2
    return f"{line[:half]} ... {line[-half:]}"


class UserError(ValueError):
    """Something the person who started the program can put right.

    The message alone says where (file, line, field), what is wrong and what would be right; the
    entry points and notebooks print it without a stack trace.  It is one line, `printable`.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in the place of a stack trace."""
        return [f"{type(self).__name__}: {self}"]


class InUseError(UserError):
    """Something that another process uses, and may be free another time."""


class NoModelError(UserError, FileNotFoundError):
    """A name of a model or adapter where there is none."""


class DataError(UserError):
    """Bad input by a person: a file, a field, a name, a value.

    The message alone says where (file, line, field), what is wrong and what would be right:
    entry points print it without a stack trace.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> DataError:
    """The error for a name that does not exist, with the near ones first.

    Args:
        kind: what the name was meant for, e.g. "game".
        name: what was asked for.
        known: every name that would have been right.
    """
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return DataError(f"unknown {kind} {name!r}: {hint}known: {listed(choices) or 'none'}")


def listed(names: Iterable[str]) -> str:
    """Names for a message, separated by commas; of very many the first, and how many there are."""
    known = list(names)
    more = f", ... ({len(known):,} in all)" if len(known) > _MOST_NAMED else ""
    return ", ".join(known[:_MOST_NAMED]) + more

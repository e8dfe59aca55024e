"""Rows as texts: every field of a dataclass is a text, or JSON where it is something else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Row = TypeVar("Row")
# The types of a class's fields, by name.
_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def texts_of(row: Any) -> dict[str, str]:
    """The fields of a row by name, those that are no texts as JSON."""
    hints = _hints(type(row))
    return {
        name: value if hints[name] is str else json.dumps(value, default=_plain, ensure_ascii=False)
        for name, value in _plain(row).items()
    }


def row_of(kind: type[Row], texts: Mapping[str, str]) -> Row:
    """The row of this class whose `texts_of` these are.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: they are those of no such row.
    """
    hints = _hints(kind)
    values = {
        name: texts[name] if hints[name] is str else json.loads(texts[name]) for name in texts
    }
    return _typed(kind, values)


def _plain(value: Any) -> dict[str, Any]:
    """What JSON knows of a value that it does not know."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(value)


def _typed(hint: Any, value: Any) -> Any:
    """A value of JSON as what the hint says."""
    kind, inside = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        hints = _hints(hint)
        return hint(**{name: _typed(hints[name], one) for name, one in value.items()})
    if kind is UnionType:  # of one type and None
        (kept,) = (one for one in inside if one is not type(None))
        return None if value is None else _typed(kept, value)
    if kind is tuple:
        each = inside[:1] * len(value) if inside[-1] is ... else inside
        return tuple(_typed(one, part) for one, part in zip(each, value, strict=True))
    if kind is Mapping:
        return {name: _typed(inside[1], one) for name, one in value.items()}
    return value

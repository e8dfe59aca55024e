"""Wordings: the texts of tasks, by name, apart from the code that fills them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from befm_jax.data.items import Message
from befm_jax.errors import DataError, unknown

_ENVIRONMENT = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)


class Template(NamedTuple):
    """A system and a user message with `{{ fields }}` to fill in; "" for no system message."""

    system: str
    user: str


class Wording:
    """Templates by the name of a task's question; called with a name and its fields."""

    def __init__(self, templates: Mapping[str, Template]) -> None:
        self.templates = dict(templates)

    def __call__(self, name: str, **fields: object) -> tuple[Message, ...]:
        """The messages of a question.

        Raises:
            DataError: no template of that name, one that is not valid, or a field that is missing.
        """
        if name not in self.templates:
            raise unknown("wording", name, self.templates)
        system, user = (self._filled(name, text, fields) for text in self.templates[name])
        given = (Message("system", system),) if system else ()
        return (*given, Message("user", user))

    def _filled(self, name: str, text: str, fields: Mapping[str, object]) -> str:
        try:
            return _ENVIRONMENT.from_string(text).render(**fields)
        except jinja2.TemplateError as error:
            raise DataError(f"wording {name!r}: {error}") from None


DEFAULT = Wording({})

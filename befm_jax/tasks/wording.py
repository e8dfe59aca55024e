"""Wordings: templates of tasks' texts, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from befm_jax.data.items import Message
from befm_jax.errors import DataError, unknown

_ENVIRONMENT = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)


class Template(NamedTuple):
    """A system and a user message as Jinja templates; "" for no system message."""

    system: str
    user: str


class Wording:
    """Templates by name; callable with a name and the fields to render."""

    def __init__(self, templates: Mapping[str, Template]) -> None:
        self.templates = dict(templates)

    def __call__(self, name: str, **fields: object) -> tuple[Message, ...]:
        """The messages of a template.

        Raises:
            DataError: an unknown name, an invalid template, or a missing field.
        """
        if name not in self.templates:
            raise unknown("wording", name, self.templates)
        system, user = (self._filled(name, text, fields) for text in self.templates[name])
        before = (Message("system", system),) if system else ()
        return (*before, Message("user", user))

    def _filled(self, name: str, text: str, fields: Mapping[str, object]) -> str:
        try:
            return _ENVIRONMENT.from_string(text).render(**fields)
        except jinja2.TemplateError as error:
            raise DataError(f"wording {name!r}: {error}") from None


DEFAULT = Wording({})

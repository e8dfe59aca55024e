"""Wordings: templates of tasks' texts, by name.

Those of the package are in `wording.toml` beside this file; a file of a user's own, in the same
form, replaces some or all of them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from befm_jax import files
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

    @classmethod
    def read(cls, path: str | Path) -> Wording:
        """The package's wording with the templates of a TOML file in the place of its own.

        Raises:
            DataError: no such file, a damaged one, or an entry that is no template of the package.
        """
        read = _templates(files.decode(files.read_bytes(path), path), str(path))
        for name in read:
            if name not in DEFAULT.templates:
                raise DataError(f"{path}: {unknown('wording', name, DEFAULT.templates)}")
        return cls(DEFAULT.templates | read)

    def __call__(self, name: str, **fields: object) -> tuple[Message, ...]:
        """The messages of a template.

        Raises:
            DataError: an unknown name, an invalid template, or a missing field.
        """
        if name not in self.templates:
            raise unknown("wording", name, self.templates)
        system, user = (text and self._filled(name, text, fields) for text in self.templates[name])
        before = (Message("system", system),) if system else ()
        return (*before, Message("user", user))

    def _filled(self, name: str, text: str, fields: Mapping[str, object]) -> str:
        try:
            return _compiled(text).render(**fields).strip()
        except jinja2.TemplateError as error:
            raise DataError(f"wording {name!r}: {error}") from None


@lru_cache(maxsize=256)
def _compiled(text: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(text)


def _templates(text: str, path: str) -> dict[str, Template]:
    """The templates of a TOML text.

    Raises:
        DataError: it is not TOML, or an entry has other fields than `system` and `user`.
    """
    try:
        entries = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: not valid TOML ({error})") from None
    templates = {}
    for name, entry in entries.items():
        fields = entry if isinstance(entry, dict) else {}
        if "user" not in fields or not set(fields) <= {"system", "user"}:
            raise DataError(f"{path}: {name}: it must have a user's text, and may have a system's")
        if not all(isinstance(value, str) for value in fields.values()):
            raise DataError(f"{path}: {name}: system and user must be texts")
        templates[name] = Template(fields.get("system", ""), fields["user"])
    return templates


_PACKAGED = resources.files("befm_jax.tasks").joinpath("wording.toml")
DEFAULT = Wording(_templates(_PACKAGED.read_text(encoding="utf-8"), "wording.toml"))

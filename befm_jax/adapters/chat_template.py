"""Which chat template an adapter was trained with, kept beside it as a hash.

A template is a part of what an adapter has learnt: under another one, its scores and answers are
those of prompts that it has never seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from befm_jax import files
from befm_jax.adapters.spec import AdapterError
from befm_jax.llama.tokenizer import hash_of

# Ours.  Beside it, or instead of it, transformers' own files may hold a template.
FILE = "chat_template_hash.json"
_TEMPLATE, _TOKENIZER = "chat_template.jinja", "tokenizer_config.json"


def save(directory: str | Path, template_hash: str) -> None:
    """Writes the hash of the template that an adapter was trained with into its directory."""
    files.write_object(Path(directory) / FILE, {"sha256": template_hash})


def read(directory: str | Path) -> tuple[str, Path] | None:
    """The hash of an adapter's template and the file that says so; None where none does.

    Ours comes first, then a `chat_template.jinja`, then `chat_template` in `tokenizer_config.json`.

    Raises AdapterError for a damaged file.
    """
    directory = Path(directory)
    ours, template, tokenizer = (directory / name for name in (FILE, _TEMPLATE, _TOKENIZER))
    if ours.is_file():
        found = files.read_object(ours, AdapterError).get("sha256")
        if not isinstance(found, str):
            raise AdapterError(f"{ours}: sha256 is {found!r}; the hash of a template is needed")
        return found, ours
    if template.is_file():
        try:
            return hash_of(template.read_text(encoding="utf-8")), template
        except ValueError as error:
            raise AdapterError(f"{template}: not a text in UTF-8 ({error})") from error
    if tokenizer.is_file():
        held = files.read_object(tokenizer, AdapterError).get("chat_template")
        text = _default(held)
        if text is not None:
            return hash_of(text), tokenizer
        if held is not None:
            raise AdapterError(f"{tokenizer}: chat_template is {held!r:.60}; a text is needed")
    return None


def check(directory: str | Path, template_hash: str, force: bool = False) -> str:
    """Holds an adapter's template against the tokenizer's; says what was found, for `origin`.

    Raises AdapterError where they differ, unless `force`.
    """
    known = read(directory)
    if known is None:
        return "unknown: the adapter does not say which one it was trained with"
    trained_with, file = known
    if trained_with == template_hash:
        return "the one that the adapter was trained with"
    if not force:
        raise AdapterError(
            f"{file}: the adapter was trained with another chat template (SHA-256 "
            f"{trained_with[:12]}…) than the model's tokenizer has ({template_hash[:12]}…); its "
            "prompts would be others than it has learnt. Give it the base model that it was "
            "trained on, or use this template all the same with --force_template"
        )
    return f"forced: the adapter was trained with another one (SHA-256 {trained_with})"


def _default(held: Any) -> str | None:
    """The template that is used by default, of one or of several named ones."""
    if isinstance(held, list):
        held = {one.get("name"): one.get("template") for one in held if isinstance(one, dict)}
    if isinstance(held, dict):
        held = held.get("default")
    return held if isinstance(held, str) else None

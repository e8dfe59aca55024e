"""The chat template that an adapter was trained with, stored beside it as a hash.

With another template, an adapter would score and answer prompts in a format that it was not trained
on.  Templates are the same that write the same text, as `Tokenizer.rendered_hash` has it; earlier
versions stored the hash of the template's own text, `Tokenizer.template_hash`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from befm_jax import files
from befm_jax.adapters.spec import AdapterError
from befm_jax.llama.tokenizer import TemplateError, Tokenizer, hash_of

# Our own file.  transformers' files may contain a template too.
FILE = "chat_template_hash.json"
_TEMPLATE, _TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
_THE_SAME = "the one that the adapter was trained with"


def save(directory: str | Path, template_hash: str) -> None:
    """Writes the hash of the template that an adapter was trained with into its directory."""
    files.write_object(Path(directory) / FILE, {"sha256": template_hash})


def read(directory: str | Path) -> tuple[str, Path] | None:
    """The hash of an adapter's template and the file it is from; None where no file has one.

    Looks in `FILE`, then in `chat_template.jinja`, then for `chat_template` in
    `tokenizer_config.json`; of a template's text it is the `hash_of`.

    Raises AdapterError for a damaged file.
    """
    found = _read(Path(directory))
    return None if found is None else (found[0], found[2])


def _read(directory: Path) -> tuple[str, str, Path] | None:
    """The hash of an adapter's template, its text ("" where only that is known), and the file."""
    ours, template, tokenizer = (directory / name for name in (FILE, _TEMPLATE, _TOKENIZER))
    if ours.is_file():
        sha256 = files.read_object(ours, AdapterError).get("sha256")
        if not isinstance(sha256, str):
            raise AdapterError(f"{ours}: sha256 is {sha256!r}; it must be the hash of a template")
        return sha256, "", ours
    if template.is_file():
        try:
            text = template.read_text(encoding="utf-8")
        except ValueError as error:
            raise AdapterError(f"{template}: not a text in UTF-8 ({error})") from error
        return hash_of(text), text, template
    if tokenizer.is_file():
        value = files.read_object(tokenizer, AdapterError).get("chat_template")
        default = _default(value)
        if default is not None:
            return hash_of(default), default, tokenizer
        if value is not None:
            raise AdapterError(f"{tokenizer}: chat_template is {value!r:.60}; it must be a text")
    return None


def check(directory: str | Path, tokenizer: Tokenizer, force: bool = False) -> str:
    """Compares an adapter's template with the tokenizer's; returns the outcome as a text.

    Raises AdapterError where they differ, unless `force`.
    """
    known = _read(Path(directory))
    if known is None:
        return "unknown: the adapter does not say which one it was trained with"
    trained_with, text, file = known
    if trained_with == tokenizer.template_hash:
        return _THE_SAME
    try:
        rendered = tokenizer.rendered_hash(text) if text else trained_with
    except TemplateError:  # it is none that the tokenizer could have
        rendered = ""
    if rendered == tokenizer.rendered_hash():
        return _THE_SAME
    if not force:
        raise AdapterError(
            f"{file}: the adapter was trained with another chat template (SHA-256 "
            f"{trained_with[:12]}…) than the model's tokenizer has, so that its prompts would "
            "differ from those in training. Use the base model that it was trained on, or keep "
            "this template with --force_template"
        )
    return f"forced: the adapter was trained with another one (SHA-256 {trained_with})"


def _default(value: Any) -> str | None:
    """The default template: the only one, or the one named "default"."""
    if isinstance(value, list):
        value = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None

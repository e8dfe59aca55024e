"""JSON objects in files: read with an error that names the file, written all or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from befm_jax.errors import UserError


def read_object(path: Path, error: type[UserError] = UserError) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: no such file.
        UserError: of the class `error`: not valid JSON, or not an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as reason:
        raise error(f"{path}: not valid JSON ({reason})") from reason
    if not isinstance(found, dict):
        raise error(f"{path}: holds a {type(found).__name__}; a JSON object is needed")
    return found


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object aside, then moves it into place; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)

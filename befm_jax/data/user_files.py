"""Python files of a user's own that declare games or tasks."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from befm_jax.errors import DataError

Declared = TypeVar("Declared")


def load(
    path: str | Path,
    kind: type[Declared],
    registry: dict[str, Declared],
    register: Callable[[Declared], Declared],
    others: Sequence[dict[str, Any]] = (),
) -> list[Declared]:
    """Runs a user's own Python file and returns what it declares of a kind, registered.

    That is what it registers and what it leaves at module level.  The file is run as a module: it
    can do whatever Python can, so load only files you trust.

    Args:
        path: the file.
        kind: the class of what is declared, such as `Game`.
        registry: what is known of this kind, by name.
        register: adds to it, or raises DataError where another one has the name.
        others: registries that the file may add to as well.

    Raises:
        DataError: no such file, an error in it (with its line), nothing of the kind in it, or a
            name that is taken.  All registries are then as they were.
    """
    file, what = Path(path), kind.__name__
    if not file.is_file():
        raise DataError(f"{path}: no such file of {what.lower()}s")
    registries = (registry, *others)
    before = [dict(known) for known in registries]
    try:
        module = _run(file)
        for value in vars(module).values():
            if isinstance(value, kind) and not any(value is known for known in registry.values()):
                register(value)
        declared = [one for name, one in registry.items() if before[0].get(name) is not one]
        if not declared:
            raise DataError(
                f"no {what.lower()} in it: call register({what}(...)), or leave one at module level"
            )
    except Exception as error:  # the user's own code may raise anything
        for known, content in zip(registries, before, strict=True):
            known.clear()
            known.update(content)
        message = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path}{_line_in(file, error)}: {message}") from None
    return declared


def _line_in(file: Path, error: Exception) -> str:
    """ ":12", the last line of the file that led to the error; "" where none did."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == file.resolve()]
    return f":{lines[-1]}" if lines else ""


def _run(file: Path) -> Any:
    digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    name = f"befm_jax_user_{digest}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise DataError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Registered, because dataclasses and pickling look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

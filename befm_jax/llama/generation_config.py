"""Stop tokens from a model's `generation_config.json`.

Sampling settings (temperature, top-p and so on) are ignored, since a truncated sampler distorts
the measured distributions; every results file lists the ignored settings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from befm_jax import files
from befm_jax.errors import UserError

FILE = "generation_config.json"
# Fields that are not sampling settings.
_NOT_SAMPLING = {
    "eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id",
    "use_cache", "cache_implementation", "transformers_version", "_from_model_config",
}  # fmt: skip


class GenerationConfigError(UserError):
    """An invalid `generation_config.json`; the message names the field."""


@dataclass(frozen=True)
class GenerationConfig:
    """`stop_ids`: ids that end an answer; `ignored`: sampling settings that are not applied."""

    stop_ids: tuple[int, ...] = ()
    ignored: Mapping[str, Any] = field(default_factory=dict)


def read(directory: str | Path) -> GenerationConfig:
    """The generation config of a Hugging Face directory; an empty one where it has none.

    Raises:
        GenerationConfigError: not a JSON object, an invalid `eos_token_id`, or a NaN.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return GenerationConfig()
    fields = files.read_object(path, GenerationConfigError)
    eos = fields.get("eos_token_id")
    stop_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for stop_id in stop_ids:
        if type(stop_id) is not int or not 0 <= stop_id < 2**31:
            raise GenerationConfigError(
                f"{path}: eos_token_id is {eos!r:.80}; it must be a token id or a list of them"
            )
    ignored = {
        name: value
        for name, value in fields.items()
        if name not in _NOT_SAMPLING and value is not None
    }
    try:
        json.dumps(ignored, allow_nan=False)  # results files are strict JSON
    except ValueError as error:
        raise GenerationConfigError(
            f"{path}: a setting is not a finite number ({error})"
        ) from error
    return GenerationConfig(tuple(stop_ids), ignored)


def copy(source: str | Path, target: str | Path) -> None:
    """Copies a model's `generation_config.json`, if it has one, to another model directory."""
    path = Path(source) / FILE
    if path.is_file():
        shutil.copyfile(path, Path(target) / FILE)

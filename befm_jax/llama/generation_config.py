"""What a model's `generation_config.json` says: where answers stop, and how to sample.

Where answers stop belongs to the model.  How to sample does not: a narrowed sampler measures
itself, so those settings are ignored, and every results file says which they were.
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
# Fields that do not say how tokens are drawn.
_NOT_SAMPLING = {
    "eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id",
    "use_cache", "cache_implementation", "transformers_version", "_from_model_config",
}  # fmt: skip


class GenerationConfigError(UserError):
    """A `generation_config.json` that can't be read; the message names the field."""


@dataclass(frozen=True)
class GenerationConfig:
    """`stop_ids`: ids that end an answer; `ignored`: settings of the file that are not followed."""

    stop_ids: tuple[int, ...] = ()
    ignored: Mapping[str, Any] = field(default_factory=dict)


def read(directory: str | Path) -> GenerationConfig:
    """The generation config of a Hugging Face directory; an empty one where it has none.

    Raises:
        GenerationConfigError: not a JSON object, an `eos_token_id` that is no id, or a NaN.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return GenerationConfig()
    fields = files.read_object(path, GenerationConfigError)
    ends = fields.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    for end in listed:
        if isinstance(end, bool) or not isinstance(end, int) or end < 0:
            raise GenerationConfigError(
                f"{path}: eos_token_id is {ends!r}; it may be a token id or a list of them"
            )
    ignored = {
        name: value
        for name, value in fields.items()
        if name not in _NOT_SAMPLING and value is not None
    }
    try:
        json.dumps(ignored, allow_nan=False)  # results files are strict JSON
    except ValueError as error:
        raise GenerationConfigError(f"{path}: a setting is no finite number ({error})") from error
    return GenerationConfig(tuple(listed), ignored)


def copy(source: str | Path, target: str | Path) -> None:
    """Carries the file of a model over to one made from it, if it has one."""
    path = Path(source) / FILE
    if path.is_file():
        shutil.copyfile(path, Path(target) / FILE)

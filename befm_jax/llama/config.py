"""The shape of a Llama model, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from befm_jax import json_files
from befm_jax.errors import UserError

# The linears of every layer, by the last part of their name in Hugging Face's checkpoints.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class UnsupportedModelError(UserError):
    """A checkpoint that this port can't run exactly; the message names the field."""


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for long contexts.

    `kind` is "llama3" (Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp
    between) or "linear" (all divided by `factor`).  The other fields serve "llama3" alone.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a model; the names are those of Hugging Face's `LlamaConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 131_072
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UnsupportedModelError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim must be even for RoPE, not {self.head_dim}")


def read(directory: Path) -> LlamaConfig:
    """The config of a Hugging Face directory.

    Raises:
        FileNotFoundError: the directory has no `config.json`.
        UnsupportedModelError: another architecture, or an option that this port lacks.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; a Hugging Face model directory has one")
    fields = json_files.read_object(path, UnsupportedModelError)
    try:
        return from_hugging_face(fields)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error


def from_hugging_face(fields: Mapping[str, Any]) -> LlamaConfig:
    """`LlamaConfig` from the fields of a `config.json`, with Hugging Face's defaults.

    Reads `rope_scaling` and `rope_theta`, or transformers 5's `rope_parameters`.

    Raises:
        UnsupportedModelError: naming the field that can't be honoured.
    """
    if fields.get("model_type") != "llama":
        raise UnsupportedModelError(
            f"model_type is {fields.get('model_type')!r}; supported: 'llama'"
        )
    if fields.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"hidden_act is {fields['hidden_act']!r}; supported: 'silu'")
    missing = [
        name
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads")
        if not isinstance(fields.get(name), int)
    ]  # fmt: skip
    if missing:
        raise UnsupportedModelError(f"{', '.join(missing)}: missing, or not a whole number")
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    heads = fields["num_attention_heads"]
    ends = fields.get("eos_token_id")
    return LlamaConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0),
        rope_scaling=_rope_scaling(rope),
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
        max_position_embeddings=fields.get("max_position_embeddings", 2048),
        bos_token_id=fields.get("bos_token_id"),
        eos_token_id=() if ends is None else (ends,) if isinstance(ends, int) else tuple(ends),
    )


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("llama3", "linear"):
        raise UnsupportedModelError(
            f"rope type is {kind!r}; supported: 'default', 'linear', 'llama3'"
        )
    names = [field.name for field in dataclasses.fields(RopeScaling) if field.name != "kind"]
    wanted = names if kind == "llama3" else ["factor"]
    missing = [name for name in wanted if name not in rope]
    if missing:
        raise UnsupportedModelError(f"rope type {kind!r} lacks {', '.join(missing)}")
    return RopeScaling(kind, **{name: rope[name] for name in wanted})


def to_hugging_face(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The fields of a `config.json` that transformers (4 and 5) reads; `dtype` as it names it."""
    fields: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": dtype,
        **dataclasses.asdict(config),
    }
    fields["eos_token_id"] = list(config.eos_token_id) or None
    if config.rope_scaling is not None:
        scaling = dataclasses.asdict(config.rope_scaling)
        kind = scaling.pop("kind")
        if kind == "linear":
            scaling = {"factor": config.rope_scaling.factor}
        fields["rope_scaling"] = {"rope_type": kind, **scaling}
    return fields

"""The shape of a model, read from and written to Hugging Face's `config.json`.

Two families: Llama (3, 3.1, 3.2, 3.3 and kin of any size) and Qwen3's dense models, which are a
Llama with a norm on every query and key head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from befm_jax import json_files
from befm_jax.errors import UserError

# model_type in config.json -> the class that transformers loads it with.
FAMILIES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
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
    """Shape and constants of a model; the names are those of Hugging Face's `LlamaConfig`.

    `model_type` is one of `FAMILIES`.
    """

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
    model_type: str = "llama"

    @property
    def qk_norm(self) -> bool:
        """Whether every query and key head is normalised before it is rotated."""
        return self.model_type == "qwen3"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UnsupportedModelError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim must be even for RoPE, not {self.head_dim}")


# Options with one value that this port computes; absent or null counts as that value.
_ONLY = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}


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
    """`LlamaConfig` from the fields of a `config.json`, with its family's defaults there.

    Reads `rope_scaling` and `rope_theta`, or transformers 5's `rope_parameters`.

    Raises:
        UnsupportedModelError: naming the field that can't be honoured.
    """
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type is {family!r}; supported: {', '.join(map(repr, FAMILIES))}"
        )
    for name, supported in _ONLY.items():
        if fields.get(name, supported) not in (supported, None):
            raise UnsupportedModelError(f"{name} is {fields[name]!r}; supported: {supported!r}")
    if {*(fields.get("layer_types") or ())} - {"full_attention"}:
        raise UnsupportedModelError(
            f"layer_types has {sorted({*fields['layer_types']})}; supported: full_attention alone"
        )
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
        head_dim=fields.get("head_dim")
        or _default_head_width(family, fields["hidden_size"], heads),
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0),
        rope_scaling=_rope_scaling(rope),
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
        max_position_embeddings=fields.get(
            "max_position_embeddings", 32_768 if family == "qwen3" else 2048
        ),
        bos_token_id=fields.get("bos_token_id"),
        eos_token_id=() if ends is None else (ends,) if isinstance(ends, int) else tuple(ends),
        model_type=family,
    )


def _default_head_width(family: str, width: int, heads: int) -> int:
    return 128 if family == "qwen3" else width // heads


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
        "architectures": [FAMILIES[config.model_type]],
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

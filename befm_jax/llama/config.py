"""The shape of a model, read from and written to Hugging Face's `config.json`.

Two families: Llama (3, 3.1, 3.2, 3.3 and kin of any size) and Qwen3's dense models, which are a
Llama with a norm on every query and key head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from befm_jax import files
from befm_jax.errors import UserError

# model_type in config.json -> the class that transformers loads it with.
FAMILIES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# The linears of every layer, by the last part of their name in Hugging Face's checkpoints.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The widest head of the attention kernels, whose tiles must fit a GPU's shared memory.
WIDEST_HEAD = 128


class UnsupportedModelError(UserError):
    """A checkpoint that this port can't run exactly; the message names the field."""


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies scaled for long contexts.

    `kind` is "llama3" (Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp
    between) or "linear" (all divided by `factor`).  The other fields are used by "llama3" alone.
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
        if self.head_dim < 2 or self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim is {self.head_dim}; it must be even for RoPE")
        if self.head_dim > WIDEST_HEAD:
            raise UnsupportedModelError(
                f"head_dim is {self.head_dim}; the attention kernels take {WIDEST_HEAD} at most"
            )


# What a field must fulfil, and how an error says it.
_Rule = tuple[Callable[[Any], bool], str]


def _whole(low: int, high: int) -> _Rule:
    return (
        lambda value: type(value) is int and low <= value <= high,
        f"a whole number from {low} to {high:,}",
    )


def _number(low: float, high: float) -> _Rule:
    return (
        lambda value: type(value) in (int, float) and low <= value <= high,
        f"a number from {low:g} to {high:g}",
    )


_COUNT, _FEW, _ID = _whole(1, 2**31 - 1), _whole(1, 10_000), _whole(0, 2**31 - 1)
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
# The ranges of numbers are far beyond any model's: outside of them a model would run, and answer
# with noise.
_OUTSIDE: dict[str, _Rule] = {
    "rope_theta": _number(100, 1e12),
    "partial_rotary_factor": (lambda value: value == 1, "1: every feature is rotated"),
}
# Fields of `rope_parameters` and `rope_scaling`; some may stand outside of them instead.
_ROPE = _OUTSIDE | {
    "factor": _number(1, 10_000),
    "low_freq_factor": _number(1e-3, 1e6),
    "high_freq_factor": _number(1e-3, 1e6),
    "original_max_position_embeddings": _COUNT,
}
_FIELDS = _OUTSIDE | {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), _COUNT),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), _FEW),
    "max_position_embeddings": _COUNT,
    "rms_norm_eps": _number(1e-12, 0.01),
    "tie_word_embeddings": _FLAG,
    "attention_bias": _FLAG,
    "mlp_bias": _FLAG,
    "bos_token_id": _ID,
    "eos_token_id": (lambda value: all(map(_ID[0], value)), "a token id or a list of them"),
}
# transformers' defaults for fields that the file omits.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": 2048},
    "qwen3": {
        "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": 32_768,
        "num_key_value_heads": 32, "head_dim": 128,
    },
}  # fmt: skip
# Options of which this port supports one value, by whichever of its names; absent or null counts as
# that value.
_ONLY = {
    "hidden_act": ("silu", "swish"), "use_sliding_window": (False,), "quantization_config": (),
}  # fmt: skip


def read(directory: Path) -> LlamaConfig:
    """The config of a Hugging Face directory.

    Raises:
        FileNotFoundError: the directory has no `config.json`.
        UnsupportedModelError: another architecture, or an option that this port lacks.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a Hugging Face model directory has one")
    fields = files.read_object(path, UnsupportedModelError)
    try:
        return from_hugging_face(fields)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error


def from_hugging_face(fields: Mapping[str, Any]) -> LlamaConfig:
    """`LlamaConfig` from the fields of a `config.json`, with its family's defaults there.

    Reads `rope_scaling` and `rope_theta`, or transformers 5's `rope_parameters`.  Every number must
    be in a range that real models are well within.

    Raises:
        UnsupportedModelError: a field is missing, invalid or unsupported; names it.
    """
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type is {family!r}; supported: {', '.join(map(repr, FAMILIES))}"
        )
    given = {name: value for name, value in fields.items() if value is not None}
    for name, supported in _ONLY.items():
        if name in given and given[name] not in supported:
            values = " or ".join(map(repr, supported or (None,)))
            raise UnsupportedModelError(f"{name} is {given[name]!r:.80}; supported: {values}")
    layers = given.get("layer_types", [])
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise UnsupportedModelError(
            f"layer_types is {layers!r:.80}; supported: a list of 'full_attention' alone"
        )
    missing = [name for name in _REQUIRED if name not in given]
    if missing:
        raise UnsupportedModelError(f"{', '.join(missing)}: missing")
    # An explicit null head count or width is derived from the other fields, not from defaults.
    given = {
        name: value
        for name, value in _DEFAULTS[family].items()
        if name not in fields or name not in ("num_key_value_heads", "head_dim")
    } | given
    heads, eos = given["num_attention_heads"], given.get("eos_token_id", [])
    given.setdefault("num_key_value_heads", heads)
    given["eos_token_id"] = eos if isinstance(eos, list) else [eos]
    _check(given, _FIELDS)
    given.setdefault("head_dim", given["hidden_size"] // heads)
    theta, scaling = _rope(given)
    given |= {
        "rms_norm_eps": float(given["rms_norm_eps"]),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "eos_token_id": tuple(given["eos_token_id"]),
    }
    known = {field.name for field in dataclasses.fields(LlamaConfig)}
    return LlamaConfig(**{name: value for name, value in given.items() if name in known})


def _check(fields: Mapping[str, Any], rules: Mapping[str, _Rule], within: str = "") -> None:
    """Raises UnsupportedModelError for the first field that breaks its rule."""
    for name, (is_valid, requirement) in rules.items():
        if name in fields and not is_valid(fields[name]):
            raise UnsupportedModelError(
                f"{within}{name} is {fields[name]!r:.80}; it must be {requirement}"
            )


def _rope(given: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies, and their scaling.

    Where a config has both `rope_parameters` and `rope_scaling`, they must say the same: programs
    differ in which of the two they follow.
    """
    outside = {name: given[name] for name in _OUTSIDE if name in given}
    read = {
        name: _rope_of(name, outside, given[name])
        for name in ("rope_parameters", "rope_scaling")
        if given.get(name)
    }
    if len(set(read.values())) > 1:
        raise UnsupportedModelError(
            "rope_scaling and rope_parameters say different things; keep the one that is meant"
        )
    return next(iter(read.values()), None) or _rope_of("rope_parameters", outside, {})


def _rope_of(name: str, outside: Mapping[str, Any], rope: Any) -> tuple[float, RopeScaling | None]:
    """What one of the two objects says, with the fields that stand outside of it."""
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedModelError(f"{name} is {rope!r:.80}; supported: one object for all layers")
    rope = {**outside, **{field: value for field, value in rope.items() if value is not None}}
    _check(rope, _ROPE, f"{name}: ")
    theta, kind = float(rope["rope_theta"]), rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("llama3", "linear"):
        raise UnsupportedModelError(
            f"{name}: rope type is {kind!r:.80}; supported: 'default', 'linear', 'llama3'"
        )
    factors = ("factor", "low_freq_factor", "high_freq_factor")
    required = (*factors, "original_max_position_embeddings") if kind == "llama3" else ("factor",)
    missing = [field for field in required if field not in rope]
    if missing:
        raise UnsupportedModelError(f"{name}: rope type {kind!r} lacks {', '.join(missing)}")
    if kind == "linear":
        return theta, RopeScaling(kind, float(rope["factor"]))
    factor, low, high = (float(rope[field]) for field in factors)
    if low >= high:
        raise UnsupportedModelError(
            f"{name}: low_freq_factor is {low:g} and high_freq_factor {high:g}; the first must be "
            "below the second"
        )
    return theta, RopeScaling(kind, factor, low, high, rope["original_max_position_embeddings"])


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

"""An adapter's directory in PEFT's file format: `adapter_config.json` and safetensors.

Layers are stored one by one under PEFT's names, each with its own rank, so that
`peft.PeftModel.from_pretrained` reads what is written here, and vice versa.  An unsupported field
or tensor that would change the model is an error that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from befm_jax import files
from befm_jax.adapters import chat_template
from befm_jax.adapters.lora import Adapter
from befm_jax.adapters.spec import (
    ALL_LINEAR,
    LARGEST_ALPHA,
    UNSUPPORTED,
    AdapterError,
    LoraSpec,
    PerLayer,
    module_name,
)
from befm_jax.llama import model
from befm_jax.llama.config import LlamaConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# Our own file, of the base's fingerprint: in the weights' metadata it would have no fixed place.
BASE_FILE = "base_fingerprint.json"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_[AB]\.weight")
_PARTS = {"a": "lora_A", "b": "lora_B"}
_FLOATS = ("F32", "BF16", "F16", "F64")
# Initialisations that leave the base unchanged.  The others (pissa, olora, corda, loftq, lora_ga)
# change the base weights, which the adapter's files do not contain.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Fields without effect on the function of an adapter on the layers' linears: bookkeeping,
# initialisation, and settings of features that are off or unsupported.
_IGNORED = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config", "fan_in_fan_out", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying",
}  # fmt: skip


def save(
    directory: str | Path,
    adapter: Adapter,
    base_model: str,
    template_hash: str | None = None,
    base_fingerprint: str | None = None,
) -> None:
    """Writes an adapter; `base_model` is the name or path where PEFT looks for the base.

    `template_hash` is that of the chat template that it was trained with (see `chat_template`),
    `base_fingerprint` that of the base (`hf.fingerprint`), which is kept beside the weights.
    Every layer is written with its own rank, in float32.  The write is atomic.

    Raises:
        AdapterError: the arrays do not match the spec.
        NotWrittenError: the files can't be written; existing ones are untouched.
    """
    directory = Path(directory)
    tensors = {}
    for path, weight in adapter.weights.items():
        a, b = (np.asarray(weight[part], np.float32) for part in _PARTS)
        for layer, rank in enumerate(adapter.per_layer(path).ranks):
            if rank == 0:
                continue
            if (a[layer, rank:].any(axis=1) & b[layer, :, rank:].any(axis=0)).any():
                raise AdapterError(
                    f"{path}, layer {layer}: the spec says rank {rank}, but the arrays have more"
                )
            for part, matrix in (("a", a[layer, :rank]), ("b", b[layer, :, :rank])):
                tensors[_key(path, layer, part)] = np.ascontiguousarray(matrix)
    fields = json.dumps(_fields(adapter.spec, base_model), indent=2)
    ours = (chat_template.FILE, BASE_FILE)
    with files.atomic_directory(directory, lambda name: name in ours) as folder:
        if template_hash is not None:
            chat_template.save(folder, template_hash)
        if base_fingerprint is not None:
            files.write_object(folder / BASE_FILE, {"sha256": base_fingerprint})
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(fields, encoding="utf-8")


def load(directory: str | Path, config: LlamaConfig) -> Adapter:
    """Reads an adapter directory for a model of this config; the arrays are float32.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterError: not LoRA, an unsupported option that changes the result, an adapter of another
            model, or other tensors than the config implies.
    """
    directory = Path(directory)
    if (directory / PICKLE).is_file() and not (directory / WEIGHTS).is_file():
        raise AdapterError(
            f"{directory / PICKLE}: a pickle, which can run any code and is never read; if you "
            f"trust it, let PEFT write {WEIGHTS} instead: PeftModel.from_pretrained(base, "
            "directory).save_pretrained(directory)"
        )
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory / name}: no such file; an adapter directory has one"
            )
    shapes = model.shapes(config)
    fields = files.read_object(directory / CONFIG, AdapterError)
    try:
        spec = _spec(fields)
        plan = spec.plan(shapes)
    except AdapterError as error:
        raise AdapterError(f"{directory / CONFIG}: {error}") from error
    return Adapter(_read(directory / WEIGHTS, plan, shapes, config.num_hidden_layers), spec)


def base_of(directory: str | Path) -> tuple[str | None, str]:
    """The fingerprint of the base that an adapter was trained on, if it says, and the base's name.

    Raises AdapterError for a damaged file.
    """
    directory = Path(directory)
    fingerprint = None
    if (directory / BASE_FILE).is_file():
        fingerprint = files.read_object(directory / BASE_FILE, AdapterError).get("sha256")
        if not isinstance(fingerprint, str):
            raise AdapterError(
                f"{directory / BASE_FILE}: sha256 is {fingerprint!r:.80}; it must be a fingerprint"
            )
    fields = files.read_object(directory / CONFIG, AdapterError)
    return fingerprint, str(fields.get("base_model_name_or_path") or "")


class _Field(NamedTuple):
    """A config field's predicate, and what its error says the field must be."""

    valid: Callable[[Any], bool]
    requirement: str


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST_ALPHA


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


def _is_layers(value: Any) -> bool:
    return type(value) is int or (
        isinstance(value, list) and all(type(layer) is int for layer in value)
    )


def _maps_to(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(valid(entry) for entry in value.values())


_REQUIRED = {
    "r": _Field(_is_count, "a whole number, 1 or more"),
    "lora_alpha": _Field(_is_number, "a number that float32 holds"),
    "target_modules": _Field(_is_names, "a list of names, a pattern, or 'all-linear'"),
}
# An optional field may be null, which is the same as omitting it.
_OPTIONAL = {
    "lora_dropout": _Field(
        lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1"
    ),
    "use_rslora": _Field(lambda value: isinstance(value, bool), "true or false"),
    "exclude_modules": _Field(_is_names, "a list of names or a pattern"),
    "rank_pattern": _Field(_maps_to(_is_count), "an object of patterns and whole numbers from 1"),
    "alpha_pattern": _Field(
        _maps_to(_is_number), "an object of patterns and numbers that float32 holds"
    ),
    "layers_to_transform": _Field(_is_layers, "a layer's number or a list of them"),
    "layers_pattern": _Field(_is_names, "a name or a list of names"),
}


def _spec(fields: Mapping[str, Any]) -> LoraSpec:
    """The spec of a config's fields; AdapterError names a missing, invalid or unsupported field."""
    if fields.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type is {fields.get('peft_type')!r}; supported: 'LORA'")
    if fields.get("bias", "none") != "none":
        raise AdapterError(f"bias is {fields['bias']!r}; supported: 'none'")
    if fields.get("init_lora_weights", True) not in _INITS:
        raise AdapterError(
            f"init_lora_weights is {fields['init_lora_weights']!r}, which changes the base "
            "weights; let PEFT convert the adapter to plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    known = {*_REQUIRED, *_OPTIONAL, *_IGNORED, "peft_type", "bias", "init_lora_weights"}
    for name, value in fields.items():
        # An empty object turns some of PEFT's variants on, with their defaults.
        if name not in known and (value or value == {}):
            raise AdapterError(f"{name} is {value!r}, which is not supported")
    for name, field in (_REQUIRED | _OPTIONAL).items():
        value = fields.get(name)
        if value is None and name in _REQUIRED:
            raise AdapterError(f"{name} is missing; it must be {field.requirement}")
        if value is not None and not field.valid(value):
            raise AdapterError(f"{name} is {value!r:.80}; it must be {field.requirement}")
    layers, before = fields.get("layers_to_transform"), fields.get("layers_pattern") or ()
    return LoraSpec(
        rank=fields["r"],
        alpha=float(fields["lora_alpha"]),
        rslora=fields.get("use_rslora") or False,
        dropout=float(fields.get("lora_dropout") or 0.0),
        targets=_named(fields["target_modules"]),
        exclude_modules=_named(fields.get("exclude_modules") or ()),
        rank_pattern=tuple((fields.get("rank_pattern") or {}).items()),
        alpha_pattern=tuple(
            (key, float(alpha)) for key, alpha in (fields.get("alpha_pattern") or {}).items()
        ),
        # PEFT reads an empty list as no restriction.
        layers_to_transform=None if layers in (None, []) else tuple(np.atleast_1d(layers).tolist()),
        layers_pattern=(before,) if isinstance(before, str) else tuple(before),
    )


def _named(names: Any) -> tuple[str, ...] | str:
    """A pattern unchanged; a list in a fixed order, since PEFT writes sets."""
    if isinstance(names, str):
        return names
    known = [name for name in ALL_LINEAR if name in names]
    return (*known, *sorted(set(names) - set(known)))


def _fields(spec: LoraSpec, base_model: str) -> dict[str, Any]:
    """The fields of a spec's `adapter_config.json`."""

    def listed(names: tuple[Any, ...] | str | None) -> Any:
        return list(names) if isinstance(names, tuple) else names

    def number(alpha: float) -> int | float:
        return int(alpha) if float(alpha).is_integer() else alpha

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": spec.rank,
        "lora_alpha": number(spec.alpha),
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "target_modules": listed(spec.targets),
        "exclude_modules": listed(spec.exclude_modules) or None,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {key: number(alpha) for key, alpha in spec.alpha_pattern},
        "layers_to_transform": listed(spec.layers_to_transform),
        "layers_pattern": listed(spec.layers_pattern) or None,
        "bias": "none",
        "inference_mode": True,
    }


def _key(path: str, layer: int, part: str) -> str:
    return f"{_PREFIX}{module_name(path, layer)}.{_PARTS[part]}.weight"


def _read(
    file: Path, plan: Mapping[str, PerLayer], shapes: model.Params, depth: int
) -> dict[str, dict[str, Any]]:
    """Each linear's tensors in float32, stacked over layers and padded to its largest rank."""
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    expected = {}
    for path, (ranks, _) in plan.items():
        _, features, width = flat[f"{path}/weight"].shape
        for layer, rank in enumerate(ranks):
            if rank:
                expected[_key(path, layer, "a")] = (rank, width)
                expected[_key(path, layer, "b")] = (features, rank)
    weights: dict[str, dict[str, Any]] = {}
    with _open(file) as opened:
        keys = set(opened.keys())
        for key in sorted(keys - set(expected)):
            raise AdapterError(f"{file}: {key}: {_why_not(key, depth)}")
        for key, shape in sorted(expected.items()):
            if key not in keys:
                raise AdapterError(f"{file}: lacks {key}, which {CONFIG} implies")
            _check(opened.get_slice(key), f"{file}: {key}", shape, "lora_A" in key)
        for path, (ranks, _) in plan.items():
            _, features, width = flat[f"{path}/weight"].shape
            a = np.zeros((depth, max(ranks), width), np.float32)
            b = np.zeros((depth, features, max(ranks)), np.float32)
            for layer, rank in enumerate(ranks):
                if rank:
                    with np.errstate(over="ignore"):  # float64 beyond float32: infinities
                        a[layer, :rank] = opened.get_tensor(_key(path, layer, "a"))
                        b[layer, :, :rank] = opened.get_tensor(_key(path, layer, "b"))
            for part, matrix in (("a", a), ("b", b)):
                for layer in np.flatnonzero(~np.isfinite(matrix).all(axis=(1, 2))).tolist():
                    raise AdapterError(
                        f"{file}: {_key(path, layer, part)} holds numbers that are not finite"
                    )
            weights[path] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    return weights


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        opened = safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: not a readable safetensors file ({error})") from error
    with opened:
        yield opened


def _check(stored: Any, where: str, shape: tuple[int, int], is_a: bool) -> None:
    """Raises AdapterError where a tensor's header has another shape or an unsupported dtype."""
    actual, axis = tuple(stored.get_shape()), 0 if is_a else 1
    if len(actual) == 2 and actual[axis] != shape[axis] and actual[1 - axis] == shape[1 - axis]:
        raise AdapterError(
            f"{where} has rank {actual[axis]}; {CONFIG} says {shape[axis]} (r, or the first key of "
            "rank_pattern that matches)"
        )
    if actual != shape:
        raise AdapterError(
            f"{where} has shape {list(actual)}; the model and {CONFIG} imply {list(shape)}"
        )
    if stored.get_dtype() not in _FLOATS:
        raise AdapterError(f"{where} is {stored.get_dtype()}; supported: {', '.join(_FLOATS)}")


def _why_not(key: str, depth: int) -> str:
    """The reason why a tensor is not among those that the config implies."""
    if "lora_magnitude_vector" in key:
        return "a magnitude of DoRA, which is not supported (use_dora)"
    for name in UNSUPPORTED:
        if name in key.split("."):
            return f"LoRA on {name}, or a trained {name}, is not supported"
    match = _KEY.fullmatch(key)
    if match is None:
        return f"not a LoRA matrix of a linear, such as {_key('layers/self_attn/q_proj', 0, 'a')}"
    layer = re.match(r"model\.layers\.(\d+)\.", match["module"])
    if layer and int(layer[1]) >= depth:
        return f"layer {layer[1]} is beyond the model: the model has layers 0 to {depth - 1}"
    return f"{CONFIG} gives {match['module']} no adapter (target_modules, layers_to_transform)"

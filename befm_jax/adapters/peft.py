"""An adapter's directory in PEFT's file format: `adapter_config.json` and safetensors.

Layers are stored one by one under PEFT's names, so that `peft.PeftModel.from_pretrained` reads
what is written here, and the reverse, for plain LoRA of one rank on any of the seven linears.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from befm_jax import json_files
from befm_jax.adapters.lora import ALL_LINEAR, Adapter, AdapterError, LoraSpec
from befm_jax.llama.hf import written_aside

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model.model.layers"
_PARTS = {"a": "lora_A", "b": "lora_B"}
# Options of PEFT that would change the result: each must be off.
_UNSUPPORTED = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "trainable_token_indices", "target_parameters", "megatron_config", "lora_bias",
)  # fmt: skip


def save(directory: str | Path, adapter: Adapter, base_model: str) -> None:
    """Writes an adapter; `base_model` is the name or path where PEFT looks for the base."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    spec = adapter.spec
    tensors = {}
    for path, weight in adapter.weights.items():
        module = ".".join(path.split("/")[1:])
        for part, name in _PARTS.items():
            stacked = np.asarray(weight[part], np.float32)
            for layer, matrix in enumerate(stacked):
                key = f"{_PREFIX}.{layer}.{module}.{name}.weight"
                tensors[key] = np.ascontiguousarray(matrix)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "target_modules": list(spec.targets),
        "bias": "none",
        "inference_mode": True,
    }
    with written_aside(directory) as aside:
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(fields, indent=2), encoding="utf-8")


def load(directory: str | Path) -> Adapter:
    """Reads an adapter directory; ranks and shapes are checked against its config.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterError: not LoRA, an option that changes the result and is not supported, or tensors
            that do not match the config.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name}: not there; an adapter directory has one")
    fields = json_files.read_object(directory / CONFIG, AdapterError)
    spec = _spec(fields, directory / CONFIG)
    try:
        tensors = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{directory / WEIGHTS}: not a readable safetensors file ({error})"
        ) from error
    return Adapter(_stacked(tensors, spec, directory / WEIGHTS), spec)


def _spec(fields: Mapping[str, Any], path: Path) -> LoraSpec:
    if fields.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {fields.get('peft_type')!r}; supported: 'LORA'")
    for name in _UNSUPPORTED:
        if fields.get(name):
            raise AdapterError(f"{path}: {name} is {fields[name]!r}, which is not supported")
    if fields.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias is {fields['bias']!r}; supported: 'none'")
    targets = fields.get("target_modules")
    if targets == "all-linear":
        targets = list(ALL_LINEAR)
    if not isinstance(targets, list):
        raise AdapterError(f"{path}: target_modules is {targets!r}; a list or 'all-linear' is read")
    # PEFT writes short names or full paths; the last part names the linear.
    short = {str(target).split(".")[-1] for target in targets}
    try:
        return LoraSpec(
            rank=int(fields["r"]),
            alpha=float(fields["lora_alpha"]),
            rslora=bool(fields.get("use_rslora", False)),
            dropout=float(fields.get("lora_dropout", 0.0)),
            targets=tuple(name for name in ALL_LINEAR if name in short)
            + tuple(sorted(short - set(ALL_LINEAR))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: {error}") from error


def _stacked(
    tensors: dict[str, np.ndarray], spec: LoraSpec, path: Path
) -> dict[str, dict[str, Any]]:
    """Layers of each linear on a leading axis; every tensor of the file is accounted for."""
    layers: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for key, tensor in tensors.items():
        parts = key.removeprefix(_PREFIX + ".").split(".")
        part = next((ours for ours, name in _PARTS.items() if name in parts), None)
        if not key.startswith(_PREFIX) or part is None or not parts[0].isdigit():
            raise AdapterError(f"{path}: {key} is not a LoRA matrix of a layer's linear")
        module = "/".join(["layers", *parts[1:-2]])
        rank = tensor.shape[0 if part == "a" else 1] if tensor.ndim == 2 else None
        if rank != spec.rank:
            raise AdapterError(
                f"{path}: {key} has shape {list(tensor.shape)}, but {CONFIG} says r = {spec.rank}"
            )
        layers.setdefault((module, part), {})[int(parts[0])] = tensor
    weights: dict[str, dict[str, Any]] = {}
    depth = max((max(found) + 1 for found in layers.values()), default=0)
    for (module, part), found in layers.items():
        absent = sorted(set(range(depth)) - set(found))
        if absent:
            raise AdapterError(f"{path}: {module} {_PARTS[part]} lacks layer {absent[0]}")
        stacked = np.stack([found[layer] for layer in range(depth)]).astype(np.float32)
        weights.setdefault(module, {})[part] = jnp.asarray(stacked)
    lacking = set(spec.targets) - {module.split("/")[-1] for module in weights}
    if lacking:
        raise AdapterError(f"{path}: no matrices for {', '.join(sorted(lacking))}")
    for module, weight in weights.items():
        if set(weight) != set(_PARTS):
            raise AdapterError(f"{path}: {module} has only one of {', '.join(_PARTS.values())}")
    return weights

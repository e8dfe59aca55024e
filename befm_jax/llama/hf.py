"""Loads and saves Hugging Face model directories (`config.json` and safetensors).

Loading reads the shards of the local devices alone (`befm_jax.llama.stream`).  Saving writes file
by file, and materialises kernels one layer at a time: a merged model is never in memory as a
complete copy beside its base.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors.numpy import save_file

from befm_jax import files, models
from befm_jax.llama import config as llama_config
from befm_jax.llama import int8, model, stream, weights
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.linear import Kernel
from befm_jax.llama.stream import Parameter, Read
from befm_jax.llama.weights import INDEX, SINGLE, CheckpointError, Tensor, some
from befm_jax.models import QUANTIZE

# From a config to the sharding of every parameter by its path (`distributed.mesh.over`).
Shardings = Callable[[LlamaConfig], Mapping[tuple[str, ...], Sharding]]
# Files that a save replaces, single or sharded: stale ones would be read in place of the new.
_WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX))
# Buffers that older exports contain.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class StoredModel:
    """An opened model directory: headers are read and checked, no weights.

    `tensors[path]` are the stored tensors of a parameter: one per layer, in order, where layers are
    stacked.  `shapes[path]` is the parameter's shape.
    """

    directory: Path
    config: LlamaConfig
    tensors: dict[tuple[str, ...], list[Tensor]]
    shapes: dict[tuple[str, ...], tuple[int, ...]]


def open_model(directory: str | Path) -> StoredModel:
    """Opens a local Hugging Face directory: config and headers, no weights.

    What transformers reads is read: names may lack their `model.`; the one matrix of tied
    embeddings may be stored as either; and where a head that should be tied is stored beside the
    embeddings, both are compared, and the model counts as untied if they differ.

    Raises:
        FileNotFoundError: no such directory, no `config.json`, no weights, or a shard is missing.
        UnsupportedModelError: the config has an option that this port lacks.
        CheckpointError: files damaged or truncated; tensors missing, unknown, or of another shape
            than the config implies or an unsupported dtype.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such model directory")
    config = llama_config.read(directory)
    stored = {
        name: tensor
        for name, tensor in weights.open_directory(directory).items()
        if not _IGNORED.search(name)
    }
    if not any(name.startswith("model.") for name in stored):
        # The inner model was saved, without the head.
        stored = {name if name == _HEAD else f"model.{name}": stored[name] for name in stored}
    if config.tie_word_embeddings and _HEAD in stored:
        head = stored[_HEAD]
        embeddings = stored.setdefault(_EMBEDDINGS, head)
        _check([head, embeddings], (config.vocab_size, config.hidden_size))
        if weights.same(head, embeddings):
            del stored[_HEAD]
        else:
            config = dataclasses.replace(config, tie_word_embeddings=False)
    shapes = {
        path: leaf.shape
        for path, leaf in flax.traverse_util.flatten_dict(model.shapes(config)).items()
    }
    names = {path: _names(path, config) for path in shapes}
    expected = {name for tensor_names in names.values() for name in tensor_names}
    missing = sorted(expected - set(stored))
    if missing:
        raise CheckpointError(f"{directory}: lacks {some(missing)}, which its config.json implies")
    unknown = sorted(set(stored) - expected)
    if unknown:
        raise CheckpointError(
            f"{directory}: holds {some(unknown)}, which a {config.model_type} of this config.json "
            "does not have"
        )
    tensors = {path: [stored[name] for name in names[path]] for path in shapes}
    for path, of_parameter in tensors.items():
        _check(of_parameter, shapes[path][1:] if path[0] == "layers" else shapes[path])
    return StoredModel(directory, config, tensors, shapes)


def _check(tensors: list[Tensor], expected: tuple[int, ...]) -> None:
    """Raises CheckpointError for a shape that the config does not imply, or an unread dtype."""
    for tensor in tensors:
        if tensor.shape != expected:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}; config.json "
                f"implies {list(expected)}"
            )
        _ = tensor.numpy_dtype


def parameters(
    checkpoint: StoredModel,
    shardings: Shardings | None = None,
    dtype: Any = None,
    quantize: str | None = None,
) -> list[Parameter]:
    """Every parameter of a checkpoint, with its sharding and dtype; see `load`.

    Raises:
        ShardingError: the model can't be sharded over the mesh.
        ValueError: `quantize` is unknown.
    """
    if quantize not in (None, *QUANTIZE):
        raise ValueError(f"quantize is {quantize!r}; it must be {' or '.join(QUANTIZE)}")
    by_path: Mapping[tuple[str, ...], Sharding] = (
        dict.fromkeys(checkpoint.shapes, SingleDeviceSharding(jax.local_devices()[0]))
        if shardings is None
        else shardings(checkpoint.config)
    )
    unordered = [
        Parameter(
            path,
            shape,
            checkpoint.tensors[path],
            stacked=path[0] == "layers",
            sharding=by_path[path],
            held_as=None if dtype is None else np.dtype(dtype),
            quantize=quantize == "int8" and int8.is_quantized(path),
        )
        for path, shape in checkpoint.shapes.items()
    ]
    # Unstacked parameters first: they have the largest chunks, and memory is still free.
    return sorted(unordered, key=lambda parameter: parameter.stacked)


def reads(
    checkpoint: StoredModel,
    shardings: Shardings | None = None,
    devices: Iterable[Any] | None = None,
) -> list[Read]:
    """The reads that `load` does for some devices (default: this process's), each slice once.

    Raises ShardingError where the model can't be sharded over the mesh.
    """
    targets = None if devices is None else list(devices)
    return [
        read
        for parameter in parameters(checkpoint, shardings)
        for bounds in parameter.pieces(targets)
        for read in parameter.reads(bounds)
    ]


def load(
    name: str | Path,
    shardings: Shardings | None = None,
    dtype: Any = None,
    quantize: str | None = None,
) -> tuple[LlamaConfig, model.Params]:
    """Config and parameters of a Hugging Face directory, or of a hub id (`owner/name@revision`).

    `shardings` gives the sharding of every parameter (`befm_jax.distributed.mesh.over`); without it
    all are on one device.  A process reads the shards of its own devices alone.  `dtype` casts
    every parameter; None keeps the stored dtype.  `quantize="int8"` quantises the layers' linears
    chunk by chunk while they are read (`befm_jax.llama.int8`); None and "no" do not quantise.

    Raises:
        FileNotFoundError, UnsupportedModelError, CheckpointError: see `open_model`.
        HubError: the model can't be downloaded.
        ShardingError: the model can't be sharded over the mesh.
        ValueError: `quantize` is unknown.
    """
    directory = models.directory_of(name)
    checkpoint = open_model(directory)
    flat = stream.load(parameters(checkpoint, shardings, dtype, quantize), f"load {directory.name}")
    return checkpoint.config, flax.traverse_util.unflatten_dict(flat)


def abstract(
    directory: str | Path,
    shardings: Shardings | None = None,
    dtype: Any = None,
    quantize: str | None = None,
) -> tuple[LlamaConfig, model.Params]:
    """The config, and `jax.ShapeDtypeStruct`s of the parameters that `load` returns.

    Reads headers alone, so that programs can be compiled while the weights are read.  Raises as
    `load` does.
    """
    checkpoint = open_model(directory)
    flat = {
        parameter.path: parameter.held
        for parameter in parameters(checkpoint, shardings, dtype, quantize)
    }
    return checkpoint.config, flax.traverse_util.unflatten_dict(flat)


def save(
    directory: str | Path,
    config: LlamaConfig,
    params: model.Params,
    max_shard_bytes: int = 5_000_000_000,
    beside: Callable[[Path], None] | None = None,
    gather: Callable[[Any], np.ndarray] = jax.device_get,
) -> None:
    """Writes `config.json` and safetensors that transformers and `load` read.

    Parameters are stored in their own dtype, in files of at most `max_shard_bytes` with an index
    (one file without an index where one is enough); a kernel as the matrix that it represents.  One
    file at a time is on the host.  The write is atomic (`files.atomic_directory`); other files in
    the directory stay.  `beside` may write further files into the same folder.  `gather` copies an
    array to the host.  Where parameters are sharded over processes (`distributed.transfer.gather`
    gathers them), one process saves, and the others call `help_save` meanwhile.

    Raises:
        ValueError: the weights are quantised.
        NotWrittenError: the disk is full, or a file can't be written; existing files are untouched.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = flax.traverse_util.flatten_dict(params)
    if any(isinstance(leaf, int8.Int8Kernel) for leaf in flat.values()):
        raise ValueError("the weights are quantised to int8; load and save the original ones")
    dense = {path: _dense_shape(leaf) for path, leaf in flat.items()}
    shards: list[list[_Stored]] = [[]]
    size = total = 0
    for tensor in _stored(flat, config):
        leaf = dense[tensor.path]
        width = leaf.size * leaf.dtype.itemsize // (1 if tensor.layer is None else leaf.shape[0])
        if shards[-1] and size + width > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += width
        total += width
    free = shutil.disk_usage(directory).free
    if free < total:
        raise files.NotWrittenError(
            f"{directory}: the model needs {total:,} bytes, {free:,} are free"
        )
    with files.atomic_directory(
        directory, lambda name: _WEIGHT_FILES.fullmatch(name) is not None
    ) as folder:
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            single = len(shards) == 1
            file = SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            arrays = {
                tensor.name: _dense(flat[tensor.path], tensor.layer, gather) for tensor in shard
            }
            save_file(arrays, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(arrays, file))
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        dtype = next(iter(dense.values())).dtype.name
        fields = llama_config.to_hugging_face(config, dtype)
        (folder / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
        if beside is not None:
            beside(folder)


def help_save(
    config: LlamaConfig, params: model.Params, gather: Callable[[Any], np.ndarray]
) -> None:
    """Takes part in the collective gathers of another process's `save`, tensor by tensor."""
    flat = flax.traverse_util.flatten_dict(params)
    for tensor in _stored(flat, config):
        _dense(flat[tensor.path], tensor.layer, gather)


class _Stored(NamedTuple):
    """A tensor to write: its name, its parameter's path, and the layer if that is stacked."""

    name: str
    path: tuple[str, ...]
    layer: int | None


def _stored(flat: Iterable[tuple[str, ...]], config: LlamaConfig) -> list[_Stored]:
    """The tensors to write for parameters, in order."""
    return [
        _Stored(name, path, number if path[0] == "layers" else None)
        for path in flat
        for number, name in enumerate(_names(path, config))
    ]


def _dense_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the matrices that a leaf represents."""
    if isinstance(leaf, Kernel):
        shape: jax.ShapeDtypeStruct = jax.eval_shape(lambda kernel: kernel.dense(), leaf)
        return shape
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _dense(leaf: Any, layer: int | None, gather: Callable[[Any], np.ndarray]) -> np.ndarray:
    """One layer of a stacked leaf, or all of an unstacked one, gathered to the host."""
    if layer is not None:
        leaf = jax.tree.map(
            lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), leaf
        )
    dense = leaf.dense() if isinstance(leaf, Kernel) else leaf
    return np.ascontiguousarray(gather(dense))


def fingerprint(checkpoint: StoredModel) -> str:
    """A SHA-256, in hex, of a model: of its constants, and of rows of every matrix.

    The first, the middle and the last row of each are read, as float32: the same model saved again
    in other files, or in a wider dtype, is the same.  A change that leaves these rows as they are
    (of one token's embedding, say) is not seen.
    """
    digest = hashlib.sha256()
    constants = ("rms_norm_eps", "rope_theta", "rope_scaling", "head_dim", "num_attention_heads")
    digest.update(repr([getattr(checkpoint.config, name) for name in constants]).encode())
    for path, tensors in sorted(checkpoint.tensors.items()):
        for tensor in tensors:
            digest.update(f"{path}{tensor.shape}".encode())
            last = tensor.shape[0] - 1
            rows = (0, last // 2, last) if len(tensor.shape) > 1 else ()
            for part in [slice(row, row + 1) for row in rows] or [slice(None)]:
                digest.update(weights.read(tensor, part).astype("<f4").tobytes())
    return digest.hexdigest()


def _names(path: tuple[str, ...], config: LlamaConfig) -> list[str]:
    """Hugging Face's tensor names of a parameter: one per layer where layers are stacked."""
    if path[0] == "layers":
        rest = ".".join(path[1:])
        return [f"model.layers.{layer}.{rest}" for layer in range(config.num_hidden_layers)]
    dotted = ".".join(path)
    return [dotted if path[0] == "lm_head" else f"model.{dotted}"]

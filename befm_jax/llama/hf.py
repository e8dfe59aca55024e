"""Weights in and out of Hugging Face directories (`config.json` and safetensors).

Loading reads what the local devices hold and nothing else (`befm_jax.llama.stream`).  Saving goes
file by file, and takes the matrix that a kernel stands for one layer at a time: a merged model
never exists whole beside its base.
"""

from __future__ import annotations

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

QUANTIZED = ("no", "int8")
# From a config to the sharding of every parameter by its path (`distributed.mesh.over`).
Shardings = Callable[[LlamaConfig], Mapping[tuple[str, ...], Sharding]]
# Weights under the names of either layout: a reader would take the other one's for these.
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX))
# Buffers that older exports carry.
_HARMLESS = re.compile(r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class StoredModel:
    """An opened model directory: headers were read and checked, no weights.

    `tensors[path]` are the stored tensors that a parameter is made of: one a layer, in order,
    where layers are stacked.  `shapes[path]` is the parameter's shape.
    """

    directory: Path
    config: LlamaConfig
    tensors: dict[tuple[str, ...], list[Tensor]]
    shapes: dict[tuple[str, ...], tuple[int, ...]]


def open_model(directory: str | Path) -> StoredModel:
    """Opens a local Hugging Face directory: config and headers, no weights.

    Raises:
        FileNotFoundError: no such directory, no `config.json`, no weights, or a shard is missing.
        UnsupportedModelError: the config asks for something that this port lacks.
        CheckpointError: files damaged or cut off; tensors missing, unknown, of another shape than
            the config says, or of a dtype that weights are not stored in.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such model directory")
    config = llama_config.read(directory)
    stored = weights.open_directory(directory)
    shapes = {
        path: leaf.shape
        for path, leaf in flax.traverse_util.flatten_dict(model.shapes(config)).items()
    }
    names = {path: _names(path, config) for path in shapes}
    wanted = {name for of_one in names.values() for name in of_one}
    missing = sorted(wanted - set(stored))
    if missing:
        raise CheckpointError(f"{directory}: lacks {some(missing)}, which its config.json implies")
    harmless = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unknown = sorted(name for name in set(stored) - wanted - harmless if not _HARMLESS.match(name))
    if unknown:
        raise CheckpointError(
            f"{directory}: holds {some(unknown)}, which a {config.model_type} of this config.json "
            "has not"
        )
    tensors = {path: [stored[name] for name in names[path]] for path in shapes}
    for path, found in tensors.items():
        _check(found, shapes[path][1:] if path[0] == "layers" else shapes[path])
    return StoredModel(directory, config, tensors, shapes)


def _check(found: list[Tensor], expected: tuple[int, ...]) -> None:
    """Raises CheckpointError where a parameter's tensors differ from the config or each other."""
    for tensor in found:
        if tensor.shape != expected:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}; config.json "
                f"implies {list(expected)}"
            )
        if tensor.numpy_dtype != found[0].numpy_dtype:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} is {tensor.dtype}, but {found[0].name} is "
                f"{found[0].dtype}; all layers of a parameter are stored alike"
            )


def parameters(
    checkpoint: StoredModel,
    shardings: Shardings | None = None,
    dtype: Any = None,
    quantize: str | None = None,
) -> list[Parameter]:
    """Every parameter of a checkpoint, and how it is to be held; see `load`.

    Raises:
        ShardingError: the model can't be cut over the mesh.
        ValueError: no such way to quantise.
    """
    if quantize not in (None, *QUANTIZED):
        raise ValueError(f"quantize is {quantize!r}; it may be {' or '.join(QUANTIZED)}")
    placed: Mapping[tuple[str, ...], Sharding] = (
        dict.fromkeys(checkpoint.shapes, SingleDeviceSharding(jax.local_devices()[0]))
        if shardings is None
        else shardings(checkpoint.config)
    )
    found = [
        Parameter(
            path,
            shape,
            checkpoint.tensors[path],
            stacked=path[0] == "layers",
            sharding=placed[path],
            dtype=checkpoint.tensors[path][0].numpy_dtype if dtype is None else np.dtype(dtype),
            quantize=quantize == "int8" and int8.is_quantized(path),
        )
        for path, shape in checkpoint.shapes.items()
    ]
    # Those without layers first: they come in the largest pieces, while little else is there yet.
    return sorted(found, key=lambda parameter: parameter.stacked)


def reads(
    checkpoint: StoredModel,
    shardings: Shardings | None = None,
    devices: Iterable[Any] | None = None,
) -> list[Read]:
    """What is read for some devices (default: this process's), each slice once; reads nothing.

    Raises ShardingError where the model can't be cut over the mesh.
    """
    wanted = None if devices is None else list(devices)
    return [
        read
        for parameter in parameters(checkpoint, shardings)
        for bounds in parameter.pieces(wanted)
        for read in parameter.reads(bounds)
    ]


def load(
    name: str | Path,
    shardings: Shardings | None = None,
    dtype: Any = None,
    quantize: str | None = None,
) -> tuple[LlamaConfig, model.Params]:
    """Config and parameters of a Hugging Face directory, or of a hub id (`owner/name@revision`).

    `shardings` says how every parameter is sharded (`befm_jax.distributed.mesh.over`); without it
    all are on one device.  A process reads the slices that its devices hold and nothing else.
    `dtype` casts every parameter; None keeps what is stored.  `quantize="int8"` rounds the layers'
    linears while they are read (`befm_jax.llama.int8`): they never exist whole in full precision;
    None and "no", as runs and commands say it, leave them.

    Raises:
        FileNotFoundError, UnsupportedModelError, CheckpointError: see `open_model`.
        HubError: the hub does not give it out.
        ShardingError: the model can't be cut over the mesh.
        ValueError: no such way to quantise.
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
    """What `load` would give: the config, and `jax.ShapeDtypeStruct`s in place of the parameters.

    Reads headers alone, so that programs can be compiled while the weights are read.  Raises as
    `load` does.
    """
    checkpoint = open_model(directory)
    flat = {one.path: one.held for one in parameters(checkpoint, shardings, dtype, quantize)}
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

    Parameters are stored in their own dtype, in shards of at most `max_shard_bytes` with an index
    (one file without an index where one is enough); a kernel as the matrix that it stands for.
    One shard at a time is on the host.  Files are written aside and moved into place when all are
    complete; other files in the directory stay.  `beside` may write further files into the same
    folder.  `gather` brings an array to the host.  Where parameters are on devices of several
    processes (`distributed.transfer.gather` gathers them), one of these saves, and the others call
    `help_save` meanwhile.

    Raises:
        ValueError: rounded weights: their digits are lost, save the original ones.
        NotWrittenError: there is no room, or a file can't be written; what was there is untouched.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = flax.traverse_util.flatten_dict(params)
    if any(isinstance(leaf, int8.Int8Kernel) for leaf in flat.values()):
        raise ValueError("the weights are rounded to int8; load and save the original ones")
    written_as = {path: _dense_shape(leaf) for path, leaf in flat.items()}
    shards: list[list[_Stored]] = [[]]
    size = total = 0
    for tensor in _stored(flat, config):
        leaf = written_as[tensor.path]
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
        directory, lambda name: _OURS.fullmatch(name) is not None
    ) as folder:
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            single = len(shards) == 1
            file = SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            arrays = {one.name: _dense(flat[one.path], one.layer, gather) for one in shard}
            save_file(arrays, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(arrays, file))
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        dtype = next(iter(written_as.values())).dtype.name
        fields = llama_config.to_hugging_face(config, dtype)
        (folder / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
        if beside is not None:
            beside(folder)


def help_save(
    config: LlamaConfig, params: model.Params, gather: Callable[[Any], np.ndarray]
) -> None:
    """This process's part in another's `save`: hands over its pieces, tensor by tensor."""
    flat = flax.traverse_util.flatten_dict(params)
    for one in _stored(flat, config):
        _dense(flat[one.path], one.layer, gather)


class _Stored(NamedTuple):
    """A tensor to write: its name, the parameter that it is of, and which layer of it."""

    name: str
    path: tuple[str, ...]
    layer: int | None


def _stored(flat: Iterable[tuple[str, ...]], config: LlamaConfig) -> list[_Stored]:
    """What parameters are stored as, in the order in which it is written."""
    return [
        _Stored(name, path, number if path[0] == "layers" else None)
        for path in flat
        for number, name in enumerate(_names(path, config))
    ]


def _dense_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the matrices that a leaf stands for."""
    if isinstance(leaf, Kernel):
        found: jax.ShapeDtypeStruct = jax.eval_shape(lambda kernel: kernel.dense(), leaf)
        return found
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _dense(leaf: Any, layer: int | None, gather: Callable[[Any], np.ndarray]) -> np.ndarray:
    """One layer of a leaf (or all of one without layers) on the host of every process."""
    if layer is not None:
        leaf = jax.tree.map(
            lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), leaf
        )
    dense = leaf.dense() if isinstance(leaf, Kernel) else leaf
    return np.ascontiguousarray(gather(dense))


def fingerprint(directory: str | Path) -> str:
    """A hash that tells two sets of weights apart without reading them whole.

    Over every safetensors file's name, size and last megabyte.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(directory).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            file.seek(max(0, size - 1_000_000))
            digest.update(file.read())
    return digest.hexdigest()


def _names(path: tuple[str, ...], config: LlamaConfig) -> list[str]:
    """Hugging Face's tensor names of one of our leaves: one a layer where layers are stacked."""
    if path[0] == "layers":
        rest = ".".join(path[1:])
        return [f"model.layers.{layer}.{rest}" for layer in range(config.num_hidden_layers)]
    dotted = ".".join(path)
    return [dotted if path[0] == "lm_head" else f"model.{dotted}"]

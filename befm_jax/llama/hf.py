"""Weights in and out of a local Hugging Face directory (`config.json` and safetensors)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from befm_jax.errors import UserError
from befm_jax.llama import config as llama_config
from befm_jax.llama import model
from befm_jax.llama.config import LlamaConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Buffers that older exports carry, and a copy of the embeddings under the name of the head.
_HARMLESS = re.compile(r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")
_DTYPE_NAMES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


class CheckpointError(UserError):
    """A model directory that can't be read as it is; the message names file and tensor."""


def load(directory: str | Path, dtype: Any = None) -> tuple[LlamaConfig, model.Params]:
    """Config and parameters of a Hugging Face directory.

    `dtype` casts every parameter; None keeps what is stored.  Both a single `model.safetensors`
    and sharded files with an index are read; each tensor is read once, into its place in the
    array of stacked layers.

    Raises:
        FileNotFoundError: no such directory, no `config.json`, no weights, or a shard is missing.
        UnsupportedModelError: the config asks for something that this port lacks.
        CheckpointError: tensors missing, unknown or of another shape than the config says.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such model directory")
    config = llama_config.read(directory)
    files = _tensor_files(directory)
    shapes = flax.traverse_util.flatten_dict(model.shapes(config))
    wanted = {name for path in shapes for name in _names(path, config)}
    missing = sorted(wanted - set(files))
    if missing:
        raise CheckpointError(f"{directory}: lacks {_some(missing)}, which its config.json implies")
    harmless = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unknown = sorted(name for name in set(files) - wanted - harmless if not _HARMLESS.match(name))
    if unknown:
        raise CheckpointError(
            f"{directory}: holds {_some(unknown)}, which a Llama of this config.json has not"
        )
    params = {}
    with ExitStack() as stack:
        opened = {path: stack.enter_context(_open(path)) for path in sorted(set(files.values()))}
        for path, shape in shapes.items():
            names = _names(path, config)
            stacked = path[0] == "layers"
            expected = shape.shape[1:] if stacked else shape.shape
            leaf = None
            for layer, name in enumerate(names):
                tensor = _read(opened[files[name]], files[name], name)
                if tensor.shape != expected:
                    raise CheckpointError(
                        f"{files[name]}: {name} has shape {list(tensor.shape)}; config.json "
                        f"implies {list(expected)}"
                    )
                if leaf is None:
                    leaf = np.empty(shape.shape, tensor.dtype if dtype is None else dtype)
                leaf[layer if stacked else ...] = tensor
            params[path] = jnp.asarray(leaf)
    return config, flax.traverse_util.unflatten_dict(params)


def save(
    directory: str | Path,
    config: LlamaConfig,
    params: model.Params,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `config.json` and safetensors that transformers and `load` read.

    Parameters are stored in their own dtype, in shards of at most `max_shard_bytes` with an index
    (one file without an index where one is enough).  Files are written aside and moved into place
    when all are complete; other files in the directory stay.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = flax.traverse_util.flatten_dict(params)
    dtype = np.dtype(next(iter(flat.values())).dtype)
    tensors: list[tuple[str, Any, int | None]] = []
    for path, leaf in flat.items():
        for number, name in enumerate(_names(path, config)):
            tensors.append((name, leaf, number if path[0] == "layers" else None))
    shards: list[list[tuple[str, Any, int | None]]] = [[]]
    size = total = 0
    for name, leaf, layer in tensors:
        width = leaf.nbytes // (1 if layer is None else leaf.shape[0])
        if shards[-1] and size + width > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, leaf, layer))
        size += width
        total += width
    with written_aside(directory) as aside:
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            single = len(shards) == 1
            file = SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            arrays = {
                name: np.ascontiguousarray(leaf if layer is None else leaf[layer])
                for name, leaf, layer in shard
            }
            save_file(arrays, aside / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(arrays, file))
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (aside / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        fields = llama_config.to_hugging_face(config, dtype.name)
        (aside / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
        written = {path.name for path in aside.iterdir()}
    # A reader that finds an older file under another layout's name would take that one.
    for path in [*directory.glob("model*.safetensors"), directory / INDEX]:
        if path.name not in written:
            path.unlink(missing_ok=True)


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


@contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """A folder to write in; its files move into `directory` when the block ends without error.

    The `config.json` moves last: where it is, the rest is whole.
    """
    aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory))
    try:
        yield aside
        for path in sorted(aside.iterdir(), key=lambda path: path.name.endswith("config.json")):
            os.replace(path, directory / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _names(path: tuple[str, ...], config: LlamaConfig) -> list[str]:
    """Hugging Face's tensor names of one of our leaves: one a layer where layers are stacked."""
    if path[0] == "layers":
        rest = ".".join(path[1:])
        return [f"model.layers.{layer}.{rest}" for layer in range(config.num_hidden_layers)]
    dotted = ".".join(path)
    return [dotted if path[0] == "lm_head" else f"model.{dotted}"]


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, from the index or from the single file's header."""
    index = directory / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): directory / Path(file).name for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not an index with a weight_map ({error!r})") from error
        absent = sorted({path for path in files.values() if not path.is_file()})
        if absent:
            raise FileNotFoundError(f"{index} names {_some([str(p) for p in absent])}: not there")
        return files
    single = directory / SINGLE
    if not single.is_file():
        raise FileNotFoundError(f"{directory}: no {SINGLE} and no {INDEX}; only safetensors load")
    with _open(single) as opened:
        return dict.fromkeys(opened.keys(), single)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        opened = safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    with opened as file:
        yield file


def _read(file: Any, path: Path, name: str) -> np.ndarray:
    try:
        tensor: np.ndarray = file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {name} can't be read ({error})") from error
    if tensor.dtype not in [np.dtype(known) for known in _DTYPE_NAMES.values()]:
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype}; weights are one of {', '.join(_DTYPE_NAMES)}"
        )
    return tensor


def _some(names: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

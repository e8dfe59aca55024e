"""Headers of a directory of safetensors files, and reads of tensor slices.

Opening reads the headers alone.  A slice is read straight into its target array: no memory stays
mapped for longer than one strided copy, so a process's memory grows by its own slices alone.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from befm_jax import files
from befm_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The dtypes of stored weights, by their names in the format (github.com/huggingface/safetensors).
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_READ_AT_ONCE = 1 << 26


class CheckpointError(UserError):
    """A model directory that can't be read or written; names file and tensor."""


@dataclass(frozen=True)
class Tensor:
    """A tensor on disk: `nbytes` from byte `offset` of `file`, row-major.

    `dtype` is the format's own name for it ("BF16").
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype in memory.

        Raises CheckpointError for a dtype not in `DTYPES`.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.file}: {self.name} is {self.dtype}; it must be one of {', '.join(DTYPES)}"
            )
        return DTYPES[self.dtype]


def open_directory(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory by its name; reads headers, no weights.

    Raises:
        FileNotFoundError: no weights, or a file in the index does not exist.
        CheckpointError: a damaged index, a truncated or damaged file, a tensor missing from the
            file that the index names, or pickles instead of safetensors.
    """
    index = directory / INDEX
    if index.is_file():
        return _open_index(index)
    single = directory / SINGLE
    if single.is_file():
        return {tensor.name: tensor for tensor in open_file(single)}
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory}: holds {some(pickles)} and no safetensors.  Pickles can run code and are "
            "never read; save the model again with transformers (save_pretrained writes "
            "safetensors)"
        )
    raise FileNotFoundError(f"{directory}: no {SINGLE} and no {INDEX}; only safetensors load")


def open_file(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file, from its header.

    Raises:
        CheckpointError: not a safetensors file, or a truncated one.
    """
    try:
        # The library's own checks: sizes, overlaps and the file's length.
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); is it truncated?"
        ) from error
    header.pop("__metadata__", None)
    return [
        Tensor(
            name,
            path,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + size + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    ]


def _open_index(index: Path) -> dict[str, Tensor]:
    try:
        weight_map = files.parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        file_of = {str(name): index.parent / Path(file).name for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index with a weight_map ({error!r})") from error
    absent = sorted({str(path) for path in file_of.values() if not path.is_file()})
    if absent:
        raise FileNotFoundError(f"{index} names {some(absent)}, which does not exist")
    by_file = {
        path: {tensor.name: tensor for tensor in open_file(path)}
        for path in sorted({*file_of.values()})
    }
    for name, path in file_of.items():
        if name not in by_file[path]:
            raise CheckpointError(f"{path}: lacks {name}, which {index.name} says it holds")
    return {name: by_file[path][name] for name, path in file_of.items()}


def is_contiguous(tensor: Tensor, index: Sequence[slice]) -> bool:
    """Whether a slice is contiguous in the file: full along every axis but the first."""
    return all(
        (part.start or 0) == 0 and part.stop in (None, size)
        for part, size in zip(index[1:], tensor.shape[1:], strict=True)
    )


def read_into(target: np.ndarray, tensor: Tensor, index: Sequence[slice]) -> None:
    """Reads a slice of a tensor into an array of its shape and dtype; thread-safe.

    `index` has a slice of step 1 for every axis.  Slices of columns read full pages of the file.

    Raises:
        CheckpointError: the file ends before the slice does, or can't be read.
    """
    try:
        descriptor = os.open(tensor.file, os.O_RDONLY)
        try:
            if tensor.shape and not is_contiguous(tensor, index):
                _copy_strided(target, descriptor, tensor, index)
            else:
                first = (index[0].start or 0) if tensor.shape else 0
                row = tensor.nbytes // max(1, tensor.shape[0]) if tensor.shape else 0
                _read_run(target, descriptor, tensor, tensor.offset + first * row)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} can't be read ({error.strerror or error})"
        ) from error


def _read_run(target: np.ndarray, descriptor: int, tensor: Tensor, offset: int) -> None:
    into = target.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done : done + _READ_AT_ONCE]], offset + done)
        if count == 0:
            raise CheckpointError(f"{tensor.file}: ends within {tensor.name}")
        done += count


def _copy_strided(
    target: np.ndarray, descriptor: int, tensor: Tensor, index: Sequence[slice]
) -> None:
    if os.fstat(descriptor).st_size < tensor.offset + tensor.nbytes:
        raise CheckpointError(f"{tensor.file}: ends within {tensor.name}")
    start = tensor.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length = tensor.offset + tensor.nbytes - start
    with mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=start) as mapped:
        mapped.madvise(mmap.MADV_RANDOM)  # no read-ahead: the next columns are not needed
        full = np.frombuffer(
            mapped, tensor.numpy_dtype, math.prod(tensor.shape), tensor.offset - start
        ).reshape(tensor.shape)
        target[...] = full[tuple(index)]
        del full  # a map with a view on it can't be closed


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

"""Streams parameters from files to devices, a chunk at a time.

A chunk is a few layers of a stacked parameter, or all of an unstacked one.  While one is
transferred to the devices, several threads read the next, each slice straight into its transfer
buffer.  The host holds those few chunks alone; on CPU the buffer becomes the parameter itself.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array
from tqdm import tqdm

from befm_jax.llama import int8, weights
from befm_jax.llama.weights import Tensor

# (start, stop) along every axis.
Bounds = tuple[tuple[int, int], ...]


_THREADS = 8
# Chunks that are being read while one is transferred, and the largest size of a chunk.
_AHEAD = 2
_CHUNK_BYTES = 64_000_000
# The largest read of one thread, so that a large tensor keeps all threads busy.
_JOB_BYTES = 32_000_000
# Smaller models load too fast for a progress bar.
_BAR_BYTES = 200_000_000
# XLA uses a NumPy array without a copy where it is aligned to this.
_ALIGNMENT = 64


class Read(NamedTuple):
    """A slice of a stored tensor that some device holds; `nbytes` are those of the slice."""

    tensor: Tensor
    bounds: Bounds
    nbytes: int


@dataclass(frozen=True)
class Parameter:
    """One leaf of the parameter tree, with its sharding and dtype on the devices.

    `tensors` are its stored tensors: one per layer, in order, where `stacked`.  `held_as` is the
    dtype on the devices (None: the stored one); with `quantize` the leaf becomes an `Int8Kernel`.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    tensors: Sequence[Tensor]
    stacked: bool
    sharding: Sharding
    held_as: np.dtype[Any] | None
    quantize: bool

    @cached_property
    def stored(self) -> np.dtype[Any]:
        """The dtype on disk; where layers differ, one that holds all their numbers exactly."""
        return np.dtype(jnp.result_type(*{tensor.numpy_dtype for tensor in self.tensors}))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype on the devices."""
        return self.held_as or self.stored

    @property
    def held(self) -> Any:
        """The parameter on the devices, as `jax.ShapeDtypeStruct`s."""
        return _held(self.shape, self.dtype, self.sharding, self.quantize)

    def pieces(self, devices: Iterable[Any] | None = None) -> dict[Bounds, list[Any]]:
        """The shards of some devices (default: this process's), with the devices of each."""
        selected = self.sharding.addressable_devices if devices is None else set(devices)
        pieces: dict[Bounds, list[Any]] = {}
        for device, index in self.sharding.devices_indices_map(self.shape).items():
            if device in selected:
                bounds = tuple(
                    part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)
                )
                pieces.setdefault(bounds, []).append(device)
        return pieces

    def reads(self, bounds: Bounds, rows: range | None = None) -> list[Read]:
        """The reads of one shard of the parameter: one per layer where stacked.

        `rows` are the layers to read; None: all of the shard's.
        """
        if not self.stacked:
            return [self._read(self.tensors[0], bounds)]
        layers = range(*bounds[0]) if rows is None else rows
        return [self._read(self.tensors[layer], bounds[1:]) for layer in layers]

    def _read(self, tensor: Tensor, bounds: Bounds) -> Read:
        count = math.prod(stop - start for start, stop in bounds)
        return Read(tensor, bounds, count * tensor.numpy_dtype.itemsize)

    @property
    def made_on_host(self) -> bool:
        """Whether the read buffer becomes the parameter: on CPU, if not quantised."""
        devices: set[Any] = self.sharding.device_set
        return not self.quantize and all(device.platform == "cpu" for device in devices)

    @property
    def read_as(self) -> np.dtype[Any]:
        """The dtype of the transfer; devices convert where it is not `dtype`."""
        return self.dtype if self.made_on_host else self.stored

    def chunks(self) -> Iterator[range]:
        """Ranges of the first axis that are read and transferred one after the other.

        An unstacked parameter is one chunk, and so is one whose read buffer is kept.
        """
        length = self.shape[0]
        size = length
        if self.stacked and not self.made_on_host:
            layer_bytes = sum(self.reads(bounds, range(1))[0].nbytes for bounds in self.pieces())
            divisors = [n for n in range(1, length + 1) if length % n == 0]
            size = max(n for n in divisors if n == 1 or n * layer_bytes <= _CHUNK_BYTES)
        for start in range(0, length, size):
            yield range(start, start + size)


def load(parameters: Sequence[Parameter], description: str) -> dict[tuple[str, ...], Any]:
    """Reads parameters and transfers them to their devices; shows a progress bar in bytes.

    Raises:
        CheckpointError: a file ends early, or can't be read.
    """
    total = sum(
        read.nbytes
        for parameter in parameters
        for bounds in parameter.pieces()
        for read in parameter.reads(bounds)
    )
    loaded: dict[tuple[str, ...], Any] = {}
    # Every process reads its own shards; the first shows its progress.
    hidden = total < _BAR_BYTES or jax.process_index() > 0
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=description, disable=hidden)
    pool = ThreadPoolExecutor(_THREADS)
    try:
        # Chunks that stay on the host are all read at once, in file order: sequential access.
        kept = [
            _Chunk(parameter, rows, bar)
            for parameter in parameters
            if parameter.made_on_host
            for rows in parameter.chunks()
        ]
        jobs = [(number, job) for number, chunk in enumerate(kept) for job in chunk.jobs]
        for number, job in sorted(jobs, key=lambda pair: pair[1].at):
            kept[number].start(pool, [job])
        for chunk in kept:
            chunk.put(loaded)
        waiting: deque[_Chunk] = deque()
        for parameter in parameters:
            if parameter.made_on_host:
                continue
            for rows in parameter.chunks():
                waiting.append(_Chunk(parameter, rows, bar))
                waiting[-1].start(pool, waiting[-1].jobs)
                if len(waiting) > _AHEAD:
                    waiting.popleft().put(loaded)
        while waiting:
            waiting.popleft().put(loaded)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return loaded


class _Job(NamedTuple):
    """One thread's read, and the buffer that it fills."""

    read: Read
    target: np.ndarray

    @property
    def at(self) -> tuple[str, int]:
        """The file and the byte offset where the read begins."""
        tensor = self.read.tensor
        row_bytes = tensor.nbytes // max(1, tensor.shape[0]) if tensor.shape else 0
        first = self.read.bounds[0][0] if self.read.bounds else 0
        return str(tensor.file), tensor.offset + first * row_bytes


class _Chunk:
    """Rows of a parameter in transfer: their buffers, and the `jobs` that fill these."""

    _bar_lock = threading.Lock()

    def __init__(self, parameter: Parameter, rows: range, bar: tqdm[Any]) -> None:
        self._parameter, self._rows, self._bar = parameter, rows, bar
        self._buffers: dict[Bounds, np.ndarray] = {}
        self._reading: list[Future[None]] = []
        self.jobs: list[_Job] = []
        for bounds in parameter.pieces():
            shape = [stop - start for start, stop in bounds]
            if parameter.stacked:
                shape[0] = len(rows)
            buffer = _aligned(shape, parameter.read_as)
            self._buffers[bounds] = buffer
            reads = parameter.reads(bounds, rows if parameter.stacked else None)
            targets = buffer if parameter.stacked else [buffer]
            for read, target in zip(reads, targets, strict=True):
                self.jobs += _jobs(read, target)

    def start(self, pool: ThreadPoolExecutor, jobs: Sequence[_Job]) -> None:
        """Submits some of the chunk's jobs to a thread pool."""
        self._reading += [pool.submit(self._read, *job) for job in jobs]

    def _read(self, read: Read, target: np.ndarray) -> None:
        index = [slice(*ends) for ends in read.bounds]
        if target.dtype == read.tensor.numpy_dtype:
            weights.read_into(target, read.tensor, index)
        else:
            as_stored = np.empty(target.shape, read.tensor.numpy_dtype)
            weights.read_into(as_stored, read.tensor, index)
            _convert(as_stored, target)
        with self._bar_lock:
            self._bar.update(read.nbytes)

    def put(self, loaded: dict[tuple[str, ...], Any]) -> None:
        """Waits for the reads, and writes the rows to their parameter in `loaded`."""
        for read in self._reading:
            read.result()
        parameter = self._parameter
        shards = [
            jax.device_put(self._buffers[bounds], device)
            for bounds, devices in parameter.pieces().items()
            for device in devices
        ]
        shape = (len(self._rows), *parameter.shape[1:])
        chunk = jax.make_array_from_single_device_arrays(shape, parameter.sharding, shards)
        complete = len(self._rows) == parameter.shape[0] and not parameter.quantize
        if complete and parameter.read_as == parameter.dtype:
            loaded[parameter.path] = chunk
        else:
            empty, write = _assembler(
                parameter.shape, parameter.dtype, parameter.sharding, parameter.quantize
            )
            if parameter.path not in loaded:
                loaded[parameter.path] = empty()
            loaded[parameter.path] = write(loaded[parameter.path], chunk, self._rows.start)
        # Transfers are asynchronous; the host buffer is freed only after them.
        jax.block_until_ready(loaded[parameter.path])


def _aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialised array, aligned so that XLA uses it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT
    return raw[skip : skip + size].view(dtype).reshape(shape)


def _convert(source: np.ndarray, target: np.ndarray) -> None:
    """Copies an array into one of another dtype, rounding to nearest."""
    if source.dtype == jnp.bfloat16 and target.dtype == np.float32:
        # bfloat16 is the upper half of float32; NumPy's own cast is not vectorised.
        bits = source.view(np.uint16)
        np.left_shift(bits, np.uint32(16), out=target.view(np.uint32), dtype=np.uint32)
    else:
        target[...] = source


def _jobs(read: Read, target: np.ndarray) -> Iterator[_Job]:
    """A read split along its first axis into jobs of at most `_JOB_BYTES`."""
    if read.nbytes <= _JOB_BYTES:
        yield _Job(read, target)
        return
    start, stop = read.bounds[0]
    row_bytes = read.nbytes // (stop - start)
    step = max(1, _JOB_BYTES // row_bytes)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        part = Read(read.tensor, ((first, last), *read.bounds[1:]), row_bytes * (last - first))
        yield _Job(part, target[first - start : last - start])


@lru_cache(maxsize=64)
def _assembler(
    shape: tuple[int, ...], dtype: np.dtype[Any], sharding: Sharding, quantize: bool
) -> tuple[Callable[[], Any], Callable[[Any, Array, int], Any]]:
    """`empty()`, and `write(parameter, chunk, row)`, which converts a chunk and inserts it.

    `parameter` is donated: it is updated in place.
    """
    convert = _converter(dtype, quantize)
    abstract = _held(shape, dtype, sharding, quantize)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def empty() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)

    def write(parameter: Any, chunk: Array, row: Array) -> Any:
        def insert(into: Array, part: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(into, part, row, axis=0)

        return jax.tree.map(insert, parameter, convert(chunk))

    return (
        jax.jit(empty, out_shardings=shardings),
        jax.jit(write, donate_argnums=0, out_shardings=shardings),
    )


def _converter(dtype: np.dtype[Any], quantize: bool) -> Callable[[Array], Any]:
    """The conversion of a chunk on the devices."""
    return int8.quantize_matrix if quantize else lambda chunk: chunk.astype(dtype)


def _held(shape: tuple[int, ...], dtype: np.dtype[Any], sharding: Sharding, quantize: bool) -> Any:
    """A parameter on the devices, as `jax.ShapeDtypeStruct`s with their shardings."""
    # A kernel's scale, one entry per row, is sharded as the rows are.
    by_row: Any = sharding
    if isinstance(sharding, NamedSharding):
        by_row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: len(shape) - 1]))
    abstract = jax.eval_shape(_converter(dtype, quantize), jax.ShapeDtypeStruct(shape, dtype))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding if leaf.shape == shape else by_row
        ),
        abstract,
    )

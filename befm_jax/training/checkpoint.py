"""Checkpoints of what is trained (Orbax): adapter, optimiser, step and random key.

The base is in them only where it is trained, and the position in the data is the step: batches are
a pure function of seed and step.

A checkpoint is a folder named by its step.  It is written under another name, checksummed
(`befm_jax.checksums`) and renamed: under its own name it is complete, or was damaged
later.  In a run of several processes, process 0 manages the folders; all must see the same ones.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from befm_jax import checksums
from befm_jax.distributed import processes
from befm_jax.errors import UserError, printable
from befm_jax.training.step import State

# Arrays are stored in pieces of this size, of which a process reads those that it needs.
_CHUNK_BYTES = 32 * 2**20
_UNFINISHED, _DAMAGED, _DELETED = ".orbax-checkpoint-tmp", ".damaged", ".deleted"


class CheckpointError(UserError):
    """A checkpoint that can't be written or read; the message names its folder."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint of other shapes or dtypes; the message names the first array that differs."""


class Checkpoints:
    """Saved states of one phase: the last `keep` of them and, if requested, the best by a loss.

    Saving is in the background: the next call waits for it, and then deletes what it replaces.  All
    processes must construct, call and close it together.
    """

    def __init__(self, directory: Path, keep: int, best: bool = False) -> None:
        """Finds the checkpoints of a run that was interrupted.

        Skips what is damaged or half-written, with a warning that names folder and reason: the
        former is kept as `STEP.damaged`, the latter removed.  `best`: also keeps the one whose loss
        is lowest, the earliest of equals.
        """
        self._directory, self._keep, self._best = directory.absolute(), keep, best
        surveyed: Any = list(_survey(self._directory)) if processes.is_first() else None
        # By step, the loss that each was saved with.
        self._losses: dict[int, float | None] = dict(processes.broadcast("checkpoints", surveyed))
        self._saving: tuple[int, float | None] | None = None
        self._metadata: dict[str, Any] = {}
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_compression=False),
            # Otherwise threads wait for minutes for a folder that could not be created.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            # Orbax's own metadata must be written before the checksums are computed.
            checkpoint_metadata_store=ocp.metadata.metadata_store(
                enable_write=True, blocking_write=True
            ),
            temporary_path_class=_checksumming(lambda: self._metadata),
        )

    @property
    def last(self) -> int | None:
        """The step of the newest checkpoint known to be intact, or None."""
        return max(self._losses, default=None)

    def save(self, step: int, state: State, loss: float | None = None) -> None:
        """Saves the state after `step` steps, once; it may be donated as soon as this returns.

        `loss`: that of the state on validation people (None, NaN, infinite: never the best).

        Raises:
            CheckpointError: it can't be written, or the one before could not be.
        """
        self.settle()
        if step in self._losses:
            return
        loss = float(loss) if loss is not None and math.isfinite(loss) else None
        named = _named(state)
        self._metadata = {
            "loss": loss,
            "arrays": {name: _described(leaf) for name, leaf in named.items()},
        }
        folder = self._directory / str(step)
        plain = {name: _plain(leaf) for name, leaf in named.items()}
        chunked = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in named}
        try:
            self._checkpointer.save(folder, args=ocp.args.PyTreeSave(plain, chunked))
        except Exception as error:  # Orbax and tensorstore raise of every kind
            raise _failed(folder, "written", error) from error
        self._saving = step, loss

    def restore(self, like: State) -> State | None:
        """The newest intact checkpoint, or None if there is none.

        `like` is abstract (`jax.ShapeDtypeStruct`s, the key's too): shapes and dtypes that are
        compared with the file's, and the shardings to read it into, whatever it was saved from.

        Raises:
            CheckpointMismatchError: it is that of a state of other shapes or dtypes.
            CheckpointError: it is intact and can't be read, or not by every process.
        """
        self.settle()
        return None if self.last is None else self._read(self.last, like, "")

    def restore_best(self, like: Any) -> tuple[int, Any] | None:
        """The step of the best checkpoint and its `State.trained`; None if none has a loss.

        `like` is an abstract `State.trained`; raises as `restore` does.
        """
        self.settle()
        while (step := self._best_step()) is not None:
            folder = self._directory / str(step)
            if processes.broadcast(
                "the best", processes.is_first() and _verified(folder) is not None
            ):
                return step, self._read(step, {"trained": like}, "trained/")["trained"]
            del self._losses[step]
        return None

    def close(self) -> None:
        """Waits for the checkpoint that is being saved.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            self.settle()
        finally:
            self._checkpointer.close()

    def _best_step(self) -> int | None:
        losses = [(loss, step) for step, loss in self._losses.items() if loss is not None]
        return min(losses)[1] if losses else None

    def settle(self) -> None:
        """Waits for the checkpoint that is being saved, and deletes those that it replaces."""
        if self._saving is None:
            return
        (step, loss), self._saving = self._saving, None
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:  # as above
            raise _failed(self._directory / str(step), "written", error) from error
        self._losses[step] = loss
        kept = set(sorted(self._losses)[-self._keep :])
        best = self._best_step() if self._best else None
        if best is not None:
            kept.add(best)
        for replaced in sorted(self._losses.keys() - kept):
            del self._losses[replaced]
            if processes.is_first():
                _delete(self._directory / str(replaced))

    def _read(self, step: int, like: Any, part: str) -> Any:
        """Reads the arrays whose names begin with `part`, with the shardings of `like`."""
        folder = self._directory / str(step)
        try:
            metadata = checksums.verify(folder, contents=False)  # process 0 verified the contents
            reason = ""
        except checksums.ChecksumError as error:
            metadata, reason = None, f" ({error})"
        damaged_on = _where(metadata is None)
        if damaged_on:
            raise CheckpointError(
                f"{folder}: damaged as process {', '.join(map(str, damaged_on))} sees it{reason}"
                + "; process 0 saw it intact a moment ago: all must see the same folders"
            )
        assert metadata is not None
        leaves = _named(like)
        _check_same_arrays(
            folder,
            {name: kind for name, kind in metadata["arrays"].items() if name.startswith(part)},
            {name: _described(leaf) for name, leaf in leaves.items()},
        )
        abstract = {name: _plain_abstract(leaf) for name, leaf in leaves.items()}
        try:
            arrays = _reader(abstract.values()).restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    abstract,
                    ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=bool(part),
                ),
            )
        except Exception as error:  # as above
            raise _failed(folder, "read", error) from error
        restored = [_typed(arrays.pop(name), leaf) for name, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(like), restored)


def _checksumming(metadata: Callable[[], Mapping[str, Any]]) -> type:
    """Orbax's temporary folder, given checksums and `metadata()` before it is renamed."""

    class Checksumming(ocp.path.atomicity.AtomicRenameTemporaryPath):
        async def finalize(self) -> None:
            checksums.write(Path(self.get()), metadata())
            os.rename(self.get(), self.get_final())

    return Checksumming


def _reader(arrays: Iterable[jax.ShapeDtypeStruct]) -> ocp.Checkpointer:
    """An Orbax reader that reads few arrays at once: it needs little memory beside its result."""
    # The limit must be above any array's size: Orbax refuses an array that exceeds it.
    largest = max(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    reading = ocp.BasePyTreeCheckpointHandler(
        restore_concurrent_bytes=2 * max(largest, _CHUNK_BYTES), use_compression=False
    )
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(handler_impl=reading))


def _survey(directory: Path) -> Iterator[tuple[int, float | None]]:
    """Steps and losses of a directory's intact checkpoints, the newest first.

    Renames damaged ones and removes half-written ones.  The contents of the newest intact one are
    verified, of the others the sizes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(directory.iterdir()):
        if path.name.endswith(_DELETED):
            shutil.rmtree(path)
        elif _UNFINISHED in path.name:
            _warn(f"{path}: this checkpoint is half-written; it is removed")
            shutil.rmtree(path)
    steps = (
        int(path.name) for path in directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name)
    )
    newest = True
    for step in sorted(steps, reverse=True):
        metadata = _verified(directory / str(step), contents=newest)
        if metadata is not None:
            yield step, metadata["loss"]
            newest = False


def _verified(folder: Path, contents: bool = True) -> dict[str, Any] | None:
    """The metadata of an intact checkpoint; a damaged one is renamed with a warning: None."""
    try:
        return checksums.verify(folder, contents)
    except checksums.ChecksumError as error:
        damaged = folder.with_name(folder.name + _DAMAGED)
        _warn(
            f"{folder}: this checkpoint is damaged ({error}) and skipped; it is kept as "
            f"{damaged.name}"
        )
        if damaged.exists():
            shutil.rmtree(damaged)
        folder.rename(damaged)
        return None


def _delete(folder: Path) -> None:
    """Deletes a folder; where that is interrupted, its name shows it."""
    renamed = folder.with_name(folder.name + _DELETED)
    folder.rename(renamed)
    shutil.rmtree(renamed)


def _warn(text: str) -> None:
    print(f"warning: {printable(text)}", file=sys.stderr)


def _failed(folder: Path, action: str, error: Exception) -> CheckpointError:
    lines = str(error).splitlines() or [""]
    return CheckpointError(
        f"{folder}: the checkpoint can't be {action} ({type(error).__name__}: {lines[0]})"
    )


def _check_same_arrays(folder: Path, saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises CheckpointMismatchError unless names, dtypes and shapes are the same."""
    unlike = [
        name for name in sorted(saved.keys() | here.keys()) if saved.get(name) != here.get(name)
    ]
    if unlike:
        name = unlike[0]
        others = f", as do {len(unlike) - 1} other arrays" if len(unlike) > 1 else ""
        raise CheckpointMismatchError(
            f"{folder}: {name} is {saved.get(name, 'absent')} there and "
            f"{here.get(name, 'absent')} in this run{others}; go on with the config that the "
            "checkpoint was made with, or give another --workdir"
        )


def _named(tree: Any) -> dict[str, Any]:
    """A tree's leaves by their paths, in order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _described(leaf: Any) -> str:
    """An array's dtype and shape as in `float32[2,3]`; the dtype of keys names the generator."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _plain(leaf: Any) -> Any:
    """Keys as plain integers, which a file can store."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _plain_abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """`_plain` of an abstract array; without a sharding, on this process's first device."""
    plain = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def _typed(plain: jax.Array, like: Any) -> jax.Array:
    """The inverse of `_plain`."""
    if not _is_key(like):
        return plain
    # Only an array has the generator's name.
    generator = jax.random.key_impl(jnp.empty((), like.dtype))
    return jax.random.wrap_key_data(plain, impl=generator)


def _where(holds: bool) -> list[int]:
    """All-gathers on which processes something holds."""
    by_process = np.atleast_1d(multihost_utils.process_allgather(np.array(holds)))
    return np.flatnonzero(by_process).tolist()

"""A train step compiled ahead: in the background, while what it will run on is being read.

XLA leaves Python free while it compiles.  A step of 8 billion parameters takes as long to compile
as its weights take to read; here the two go on side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from befm_jax.data.pipeline import Batch
from befm_jax.training.step import Metrics, State

_Shapes = tuple[tuple[int, ...], ...]


class Compiled(NamedTuple):
    """A program, and the seconds that compiling it (or reading it back) took."""

    program: Callable[[State, Any, Batch], tuple[State, Metrics]]
    seconds: float


class StepAhead:
    """A jitted train step, called like it: each shape of a batch is compiled for once.

    The first program is begun at once, for `batch`.  `state` and `base` may be
    `jax.ShapeDtypeStruct`s, which stand for arrays that are not there yet.
    """

    def __init__(self, train_step: Any, state: State, base: Any, batch: Batch) -> None:
        self._train_step, self._state, self._base = train_step, state, base
        self._pool = ThreadPoolExecutor(1, "compile")
        self._programs: dict[_Shapes, Future[Compiled]] = {}
        self._begin(batch)

    def __call__(self, state: State, base: Any, batch: Batch) -> tuple[State, Metrics]:
        """One step; waits for its program where that is not ready."""
        return self._begin(batch).result().program(state, base, batch)

    def wait(self, batch: Batch) -> str:
        """Waits for the program of a batch; says how long compiling took, and how long this."""
        since = time.perf_counter()
        seconds = self._begin(batch).result().seconds
        waited = time.perf_counter() - since
        return f"the step took {seconds:.1f} s to compile, {waited:.1f} s of them waited for"

    @property
    def programs(self) -> int:
        """How many shapes of batches were compiled for."""
        return len(self._programs)

    def _begin(self, batch: Batch) -> Future[Compiled]:
        shapes: _Shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._programs:
            self._programs[shapes] = self._pool.submit(self._compile, batch)
        return self._programs[shapes]

    def _compile(self, batch: Batch) -> Compiled:
        since = time.perf_counter()
        program = self._train_step.lower(self._state, self._base, batch).compile()
        return Compiled(program, time.perf_counter() - since)

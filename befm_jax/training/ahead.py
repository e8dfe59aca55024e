"""A train step compiled ahead: in the background, while the weights that it will run on are read.

XLA releases Python's lock while it compiles.  A step of 8 billion parameters takes as long to
compile as its weights take to read; here the two run side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from befm_jax.data.pipeline import Batch
from befm_jax.training.step import Metrics, State

_Shapes = tuple[tuple[int, ...], ...]
_Program = Callable[[State, Any, Batch], tuple[State, Metrics]]


class StepAhead:
    """A jitted train step, called like it; each shape of a batch is compiled for once.

    `state` and `base` may be abstract (`jax.ShapeDtypeStruct`s with shardings): the arrays
    themselves are needed by the first call.
    """

    def __init__(self, train_step: Any, state: State, base: Any) -> None:
        self._train_step, self._state, self._base = train_step, state, base
        self._pool = ThreadPoolExecutor(1, "compile")
        self._programs: dict[_Shapes, Future[tuple[_Program, float]]] = {}

    def __call__(self, state: State, base: Any, batch: Batch) -> tuple[State, Metrics]:
        """One step; waits for its program where that is not compiled yet."""
        program, _ = self.compile(batch).result()
        return program(state, base, batch)

    def lower(self, batch: Batch) -> Any:
        """The step's `jax.stages.Lowered` for a batch, which may be abstract."""
        return self._train_step.lower(self._state, self._base, batch)

    def compile(self, batch: Batch) -> Future[tuple[_Program, float]]:
        """Starts to compile for a batch, unless that was done; the program, and its seconds."""
        shapes: _Shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._programs:
            self._programs[shapes] = self._pool.submit(self._timed_compile, batch)
        return self._programs[shapes]

    def wait(self, batch: Batch) -> str:
        """Waits for the program of a batch; reports how long compiling and this wait took."""
        since = time.perf_counter()
        _, seconds = self.compile(batch).result()
        waited = time.perf_counter() - since
        return f"the step took {seconds:.1f} s to compile, {waited:.1f} s of them waited for"

    @property
    def programs(self) -> int:
        """How many shapes of batches were compiled for."""
        return len(self._programs)

    def _timed_compile(self, batch: Batch) -> tuple[_Program, float]:
        since = time.perf_counter()
        program = self.lower(batch).compile()
        return program, time.perf_counter() - since

"""The sides of a comparison: each a process of its own, and they take turns.

A side is a class with `prepare()` (everything that is not timed: loading, compiling, choosing a
batch size) and `round()` (one timed run); both return figures by name.  On a CPU all sides are
there at once and the rounds alternate, so that whatever else the machine does meets all of them.
On an accelerator one side ends before the next begins, so that each has all the memory.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

from bench_report import Ratio

from befm_jax.errors import UserError

# What JAX is told of a device.
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}
# For a side that wants a device for every core of a CPU; their collectives begin in one order, or
# they could wait for each other until XLA ends the process.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
_EACH_CORE = (
    f"--xla_force_host_platform_device_count={_CORES}",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
)
_TAIL = 3000

Figures = dict[str, Any]


class SideFailedError(UserError):
    """A side that ended before it had answered; the message is what it said last."""


@dataclass(frozen=True)
class Side:
    """`name` is `module.Class` among the tools; `given` are its arguments, plain values.

    `each_core`: whether JAX is to have a device for every core of the CPU.
    """

    name: str
    given: Mapping[str, Any]
    each_core: bool = False


@dataclass(frozen=True)
class Found:
    """What the sides said: once before the first round, and round by round."""

    prepared: dict[str, Figures]
    runs: dict[str, list[Figures]]

    def with_preparation(self) -> dict[str, list[Figures]]:
        """The runs, and behind them how long each side took before the first one."""
        before = {
            f"{name}, before the first round": [{"seconds": figures["seconds"]}]
            for name, figures in self.prepared.items()
        }
        return self.runs | before

    def said(self) -> list[str]:
        """A line for every side that had something to say of how it was run."""
        return [f"{name}: {one['said']}" for name, one in self.prepared.items() if one.get("said")]

    def ratio(self, figure: str, ours: str = "ours", peer: str = "peer") -> Ratio:
        """How many times better than the peer in a figure of which less is better."""
        sides = ([run[figure] for run in self.runs[side]] for side in (ours, peer))
        return Ratio.of(*sides)


def take_turns(sides: Mapping[str, Side], rounds: int, device: str) -> Found:
    """Prepares every side and lets them take `rounds` turns.

    Raises:
        SideFailedError: a side ended early.
    """
    together = [list(sides)] if device == "cpu" else [[name] for name in sides]
    found = Found({}, {name: [] for name in sides})
    for names in together:
        with ExitStack() as stack:
            started = {name: stack.enter_context(_started(sides[name], device)) for name in names}
            for name, process in started.items():
                found.prepared[name] = process.ask("prepare")
            for _ in range(rounds):
                for name, process in started.items():
                    found.runs[name].append(process.ask("round"))
    return found


@contextmanager
def _started(side: Side, device: str) -> Iterator[_Process]:
    """A side at work; it is ended, and its memory free, behind the block."""
    told = {
        "JAX_PLATFORMS": PLATFORMS[device],
        "XLA_FLAGS": " ".join(
            [os.environ.get("XLA_FLAGS", ""), *(_EACH_CORE if side.each_core else ())]
        ).strip(),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with (
        tempfile.TemporaryFile(mode="w+") as said,
        subprocess.Popen(
            [sys.executable, __file__, side.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=os.environ | told,
        ) as process,
    ):
        try:
            started = _Process(side.name, process, said)
            started.tell(json.dumps(dict(side.given)))
            yield started
        finally:
            process.kill()


@dataclass(frozen=True)
class _Process:
    """A side at work; asked by a line, it answers by a line."""

    name: str
    process: subprocess.Popen[str]
    said: IO[str]

    def ask(self, what: str) -> Figures:
        """The figures of `prepare` or `round`."""
        self.tell(what)
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            self.said.seek(0)
            raise SideFailedError(f"{self.name}, {what}:\n{self.said.read()[-_TAIL:]}")
        figures: Figures = json.loads(answer)
        return figures

    def tell(self, line: str) -> None:
        """Sends a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # it ended; `ask` says why


def _answer_until_closed() -> None:
    # What libraries print goes to standard error; standard output is for answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = sys.argv[1].rpartition(".")
    side = getattr(importlib.import_module(module), name)(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(getattr(side, line.strip())()), file=answers, flush=True)


if __name__ == "__main__":
    _answer_until_closed()

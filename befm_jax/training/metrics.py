"""Metrics of a run: a progress bar, `metrics.jsonl`, TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from befm_jax import files
from befm_jax.adapters.lora import Adapter
from befm_jax.config import Config
from befm_jax.data.mixture import Mixture, Source
from befm_jax.distributed import hardware, processes
from befm_jax.distributed import mesh as meshes
from befm_jax.errors import UserError
from befm_jax.llama import flops
from befm_jax.training.setup import Setup
from befm_jax.training.step import Metrics

# What the time of a step goes to; see `Log`.
PARTS = ("data", "device", "checkpoint")
# Above this share of padding a run prints a warning.
MOST_PADDING = 0.5


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Watch:
    """What is recorded on request.

    `profile`: first and last step to profile (see `--profile_steps`); `board`: a run of Weights &
    Biases that every metric is sent to, or None.
    """

    profile: tuple[int, int] | None = None
    board: Any = None


def steps_to_profile(text: str | None) -> tuple[int, int] | None:
    """First and last step of `5:8` (or of `5`), the value of `--profile_steps`.

    Raises UserError for another form.
    """
    if not text:
        return None
    match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise UserError(f"--profile_steps={text}: give a first and a last step, such as 5:8")
    return first, last


def describe(mixture: Mixture, mesh: Mesh) -> str:
    """Lines for a reader: what is learnt from, what sharing saves, which devices share the work."""
    _, first = mixture[0]
    forests = first.report
    padding = 1 - forests.slots_used / forests.slots_computed
    lines = [
        f"{mixture.rows:,} rows, {mixture.steps:,} steps; in the first {first.rows:,} rows, "
        f"{forests.tokens_apart:,.0f} tokens one by one, {forests.slots_used:,} slots as forests "
        f"({forests.saved:.2%} saved), {forests.slots_computed:,} computed ({padding:.1%} padding)"
    ]
    if padding > MOST_PADDING:
        lines.append(
            f"warning: {padding:.0%} of what is computed is padding; give a step more rows "
            "(data.rows_per_step), or fewer devices (mesh)"
        )
    if forests.left_out:
        lines.append(f"left out: {forests.reasons()}")
    if mesh.size > 1:
        lines.append(
            f"{mesh.size} devices of {processes.count()} processes: {meshes.in_words(mesh)}"
        )
    return "\n".join(lines)


class Log:
    """The log of one phase of a run.

    Step `k`'s metrics are fetched after step `k + 1` was dispatched, so that the device does not
    wait for the host.  Steps are numbered from 1; on resuming, lines of steps that are about to be
    repeated are dropped.  Only the first process writes and shows anything.

    The time of a step is that between its metrics and those of the step before, as measured in this
    process: `seconds` = `seconds_data` (building a batch and transferring it) +
    `seconds_checkpoint` (validation and saving, as far as training waits for it) +
    `seconds_device` (dispatching a step and waiting for the devices) + a small remainder.  Where
    `seconds_device` is near 0, the devices wait for data.

    `utilisation`: the FLOPs that the mathematics of the step needs, without padding, over the peak
    of the chips in its time (in bf16); where `distributed.hardware` has their peak.
    `memory_bytes`: the peak of any device of this process, where its runtime reports it.
    """

    def __init__(self, directory: Path, setup: Setup, steps: int, start: int, watch: Watch) -> None:
        self._phase = phase = setup.phase
        self._setup, self._watch, self._directory = setup, watch, directory
        self._writes = processes.is_first()
        if self._writes:
            directory.mkdir(parents=True, exist_ok=True)
            self._path = directory / "metrics.jsonl"
            _forget(self._path, phase, start)
            self._file = self._path.open("a", encoding="utf-8")
            # A directory of its own: a start drops the later steps of all that one holds.
            self._board = _TensorBoard(directory / "tensorboard" / phase, start)
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc=phase,
            unit="step",
            # In a log file, a line every ten seconds instead of one a step.
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            disable=not self._writes,
        )
        devices = setup.mesh.devices
        chip = hardware.of(devices.flat[0].device_kind)
        self._peak = chip.operations * devices.size if chip else None
        # All at once: fetched step by step, each would wait for the step that is running.
        self._rates = jax.device_get(setup.rates(np.arange(steps)))
        self._waiting: tuple[int, Metrics, Source] | None = None
        self._since = time.perf_counter()
        self._spent: dict[str, float] = defaultdict(float)
        self._profiling = False
        if watch.profile and start >= watch.profile[1] and self._writes:
            print(f"{phase}: no profile, the steps to be profiled were taken before this start")
        self.last_checkpoint: int | None = start or None

    def step(self, step: int, metrics: Metrics, source: Source) -> None:
        """Takes the metrics of a step that was just dispatched, and logs those of the one before.

        Raises:
            NonFiniteLossError: names the step, the source of its batch and the checkpoint
                before it.
        """
        before, self._waiting = self._waiting, (step, metrics, source)
        if before is not None:
            self._write(*before)
        if self._profiling and self._watch.profile and step == self._watch.profile[1]:
            self.settle()
            self._end_profile()

    def settle(self) -> None:
        """Logs the step that is still waiting: before a checkpoint, which must hold no NaN."""
        if self._waiting is not None:
            before, self._waiting = self._waiting, None
            self._write(*before)

    def checkpoint(self, step: int, validation_loss: float | None) -> None:
        """Records a checkpoint, and the loss on validation people, where there are any."""
        self.last_checkpoint = step
        if validation_loss is not None:
            self._record(step, {"validation_loss": validation_loss})

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Counts the time inside as that of one of `PARTS`."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] += time.perf_counter() - since

    @contextmanager
    def profiled(self, step: int) -> Iterator[None]:
        """Writes a profile to `profile/` where this step is one of those requested."""
        first, last = self._watch.profile or (0, -1)
        if self._writes and first <= step <= last and not self._profiling:
            self.settle()
            jax.profiler.start_trace(str(self._directory / "profile"))
            self._profiling = True
        with self._annotated(step):
            yield

    def close(self) -> None:
        """Closes bar, files and a profile that is still being written."""
        if self._profiling:
            self._end_profile()
        self._bar.close()
        if self._writes:
            self._board.close()
            with files.writing(self._path):
                self._file.close()

    def _annotated(self, step: int) -> AbstractContextManager[Any]:
        if not self._profiling:
            return nullcontext()
        return jax.profiler.StepTraceAnnotation(self._phase, step_num=step)

    def _end_profile(self) -> None:
        jax.profiler.stop_trace()
        self._profiling = False

    def _write(self, step: int, metrics: Metrics, source: Source) -> None:
        with self.timed("device"):
            loss, gradient_norm = map(float, jax.device_get(metrics))
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            last_good = (
                "there is no checkpoint before it"
                if self.last_checkpoint is None
                else f"the last good checkpoint is that of step {self.last_checkpoint}"
            )
            raise NonFiniteLossError(
                f"{self._phase}, step {step}: the loss is {loss} and the gradient's norm "
                f"{gradient_norm} ({source}, {source.report.observations:g} observations); "
                f"{last_good}. Try a lower learning rate"
            )
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        report = source.report
        figures = {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "learning_rate": float(self._rates[step - 1]),
            "observations_per_second": report.observations / seconds,
            "tokens_per_second": report.slots_used / seconds,
            "tokens_saved": report.saved,
            "seconds": seconds,
            **{f"seconds_{part}": self._spent[part] for part in PARTS},
        }
        self._spent.clear()
        if self._peak is not None:
            flops_needed = _flops_needed(self._setup, source)
            figures["utilisation"] = flops_needed / seconds / self._peak
        memory = _peak_memory()
        if memory is not None:
            figures["memory_bytes"] = memory
        self._record(step, figures)
        rate = f"{figures['observations_per_second']:,.0f}"
        self._bar.set_postfix(loss=f"{loss:.4f}", obs_per_s=rate, refresh=False)
        self._bar.update()

    def _record(self, step: int, figures: Mapping[str, float]) -> None:
        if not self._writes:
            return
        with files.writing(self._path):
            self._file.write(json.dumps({"phase": self._phase, "step": step, **figures}) + "\n")
            self._file.flush()
        self._board.write(step, figures)
        if self._watch.board is not None:
            named = {f"{self._phase}/{name}": figure for name, figure in figures.items()}
            self._watch.board.log({f"{self._phase}/step": step, **named})


class _TensorBoard:
    """TensorBoard's events of one phase, written in the thread that calls.

    tensorboardX's own `SummaryWriter` writes in another; once that ended, on a full disk, whoever
    has more to write waits for ever.
    """

    def __init__(self, directory: Path, start: int) -> None:
        """Begins a file; TensorBoard then drops steps after `start` that it has read before."""
        # Not at the top: tensorboardX imports PyTorch where it is installed, taking seconds.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._directory, self._event, self._summary = (
            directory,
            event_pb2.Event,
            summary_pb2.Summary,
        )
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        with files.writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(str(directory / "events"))
            self._file.write_event(self._event(step=start + 1, session_log=session))
        self._flushed = time.monotonic()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes figures of a step, which are on disk two minutes later at most."""
        values = [
            self._summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()
        ]
        event = self._event(step=step, wall_time=time.time(), summary=self._summary(value=values))
        with files.writing(self._directory):
            self._file.write_event(event)
            if time.monotonic() > self._flushed + 120:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is still in memory."""
        with files.writing(self._directory):
            self._file.close()


def _flops_needed(setup: Setup, source: Source) -> float:
    """FLOPs that a step needs: those of the slots that hold a token, nothing recomputed."""
    trained = setup.state.trained
    adapter = trained if isinstance(trained, Adapter) else None
    return flops.training(
        setup.model.config,
        slots=source.report.slots_used,
        pairs=source.pairs,
        reads=source.slots_read,
        rank=adapter.spec.rank if adapter else 0,
        targets=[path.rsplit("/", 1)[-1] for path in adapter.weights] if adapter else (),
    ).needed


def _peak_memory() -> int | None:
    """The peak in bytes of any device of this process, where its runtime reports it."""
    peaks = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    reported = [peak for peak in peaks if peak is not None]
    return max(reported) if reported else None


def _forget(path: Path, phase: str, start: int) -> None:
    """Drops a phase's lines of steps after `start`, and damaged ones.

    A killed process leaves a last line that is truncated; others are noted on standard error.
    """
    if not path.is_file():
        return
    kept, lines = [], path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = files.parse_json(line)
            keep = record["phase"] != phase or record["step"] <= start
        except (ValueError, TypeError, KeyError) as error:
            keep = False
            if number < len(lines):
                print(f"note: {path}:{number}: damaged ({error}); dropped", file=sys.stderr)
        if keep:
            kept.append(line.rstrip(b"\n") + b"\n")
    files.write(path, b"".join(kept))


@contextmanager
def weights_and_biases(project: str | None, settings: Config) -> Iterator[Any]:
    """Starts a run of a project of Weights & Biases, or resumes that of the working directory.

    None without a project.  The working directory must exist.  The service is configured by its own
    variables (`WANDB_API_KEY`, `WANDB_MODE=offline`).

    Raises:
        UserError: the package is not installed, or the service refuses (no key, no network).
    """
    if project is None:
        yield None
        return
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs a package: pip install 'befm_jax[wandb]'") from error
    try:
        run = wandb.init(
            project=project,
            config=dataclasses.asdict(settings),
            dir=settings.workdir,
            resume="auto",
        )
    except wandb.errors.Error as error:
        raise UserError(f"--wandb {project}: {error}") from error
    for phase in ("base", "tune"):
        run.define_metric(f"{phase}/step")
        run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
    try:
        yield run
    finally:
        run.finish()

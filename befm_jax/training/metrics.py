"""Where the figures of a run go: a progress bar, `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import optax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from befm_jax.data.pipeline import Source
from befm_jax.errors import UserError
from befm_jax.training.step import Metrics


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite."""


class Log:
    """The log of one phase of a run.

    Step `k`'s figures are read after step `k + 1` was dispatched, so that reading them does not
    hold the device up.  Steps are numbered from 1; on resuming, lines of steps that are about to
    be done again are dropped.
    """

    def __init__(
        self, directory: Path, phase: str, steps: int, start: int, rates: optax.Schedule
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._phase = phase
        self._rates = rates
        path = directory / "metrics.jsonl"
        _forget(path, phase, start)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc=phase,
            unit="step",
            # In a log file, a line now and then instead of one a step.
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )
        self._waiting: tuple[int, Metrics, Source] | None = None
        self._since = time.perf_counter()
        self.last_checkpoint: int | None = start or None

    def step(self, step: int, metrics: Metrics, source: Source) -> None:
        """Takes the figures of a step that was just dispatched, and logs those of the one before.

        Raises:
            NonFiniteLossError: names the step, what its batch was made of and the checkpoint
                before it.
        """
        before, self._waiting = self._waiting, (step, metrics, source)
        if before is not None:
            self._write(*before)

    def settle(self) -> None:
        """Logs the step that is still waiting: before a checkpoint, which must hold no NaN."""
        if self._waiting is not None:
            before, self._waiting = self._waiting, None
            self._write(*before)

    def close(self) -> None:
        """Closes bar and files."""
        self._bar.close()
        self._board.close()
        self._file.close()

    def _write(self, step: int, metrics: Metrics, source: Source) -> None:
        loss, gradient_norm = float(metrics.loss), float(metrics.gradient_norm)
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            kept = (
                "there is no checkpoint before it"
                if self.last_checkpoint is None
                else f"the last good checkpoint is that of step {self.last_checkpoint}"
            )
            raise NonFiniteLossError(
                f"{self._phase}, step {step}: the loss is {loss} and the gradient's norm "
                f"{gradient_norm} ({source}, {source.report.observations:g} observations); {kept}. "
                "Try a lower learning rate"
            )
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        report = source.report
        figures = {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "learning_rate": float(self._rates(step - 1)),
            "observations_per_second": report.observations / seconds,
            "tokens_per_second": report.slots_used / seconds,
            "tokens_saved": report.saved,
            "seconds": seconds,
        }
        self._file.write(json.dumps({"phase": self._phase, "step": step, **figures}) + "\n")
        self._file.flush()
        for name, figure in figures.items():
            self._board.add_scalar(f"{self._phase}/{name}", figure, step)
        rate = f"{figures['observations_per_second']:,.0f}"
        self._bar.set_postfix(loss=f"{loss:.4f}", obs_per_s=rate, refresh=False)
        self._bar.update()


def _forget(path: Path, phase: str, start: int) -> None:
    """Drops a phase's lines of steps after `start`, and a last line that was cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["phase"] != phase or record["step"] <= start:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")

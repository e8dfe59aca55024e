"""What a run records of itself: where a step's time goes, utilisation, profiles, a board."""

import json
import struct
import sys
from types import SimpleNamespace

import pytest

from befm_jax.config import Config
from befm_jax.distributed import hardware
from befm_jax.errors import UserError
from befm_jax.llama import flops
from befm_jax.training import metrics
from befm_jax.training.metrics import PARTS, Watch
from tests.helpers.small_training import train_small_model


class Board:
    """Stands for a run of Weights & Biases."""

    def __init__(self):
        self.lines = []

    def log(self, figures):
        self.lines.append(figures)


def ran(folder, watch):
    """The log of six steps that train every parameter of a small model, and their batches."""
    model, batches = train_small_model(folder, watch)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, model, batches


def test_parts_of_a_step_are_no_more_than_the_whole_and_a_board_gets_every_figure(tmp_path):
    board = Board()
    lines, _, _ = ran(tmp_path, Watch(board=board))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        parts = [line[f"seconds_{part}"] for part in PARTS]
        assert min(parts) >= 0
        assert sum(parts) <= line["seconds"]
        assert "utilisation" not in line  # of a CPU no peak is known
    named = [
        {f"tune/{name}": value for name, value in line.items() if name != "phase"} for line in lines
    ]
    assert board.lines == named
    assert not (tmp_path / "profile").exists()


def test_utilisation_is_what_is_needed_over_what_the_chip_could_do(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "of", lambda kind: hardware.CHIPS["v5e"])
    lines, model, batches = ran(tmp_path, Watch())
    batch, source = batches[0]
    used = source.report.slots_used
    needed = flops.training(
        model.config, slots=used, pairs=batch.pairs(used), reads=batch.slots_read()
    ).needed
    for line in lines:
        could = line["seconds"] * hardware.CHIPS["v5e"].operations
        assert line["utilisation"] == pytest.approx(needed / could)


def test_a_profile_is_of_the_steps_that_are_asked_for(tmp_path, capsys):
    ran(tmp_path, Watch(profile=(3, 4)))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "no profile" not in capsys.readouterr().out
    ran(tmp_path, Watch(profile=(3, 4)))  # goes on from its last step
    assert "tune: no profile, the steps" in capsys.readouterr().out


def test_a_board_without_its_package_is_refused_and_one_is_closed_whatever_happens(
    tmp_path, monkeypatch
):
    settings = Config(workdir=str(tmp_path))
    with metrics.weights_and_biases(None, settings) as board:
        assert board is None
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'befm_jax\[wandb\]'"):
        metrics.weights_and_biases("humans", settings).__enter__()
    closed = []
    run = SimpleNamespace(define_metric=lambda *a, **k: None, finish=lambda: closed.append(1))
    service = SimpleNamespace(init=lambda **options: run, errors=SimpleNamespace(Error=OSError))
    monkeypatch.setitem(sys.modules, "wandb", service)
    opened = metrics.weights_and_biases("humans", settings)
    assert opened.__enter__() is run
    error = KeyError()
    assert not opened.__exit__(KeyError, error, None)
    assert closed
    service.init = lambda **options: json.loads("no key")
    service.errors.Error = ValueError
    with pytest.raises(UserError, match="--wandb humans: "):
        metrics.weights_and_biases("humans", settings).__enter__()


def test_tensorboard_gets_every_figure_of_every_step(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    lines, _, _ = ran(tmp_path, Watch())
    (events,) = (tmp_path / "tensorboard" / "tune").iterdir()
    content, found = events.read_bytes(), {}
    while content:  # a record is its length, a checksum of that, its content and a checksum of it
        (length,) = struct.unpack("Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        found.setdefault(event.step, {}).update(
            {value.tag: value.simple_value for value in event.summary.value}
        )
        content = content[16 + length :]
    for line in lines:
        del line["phase"]
        assert found[line.pop("step")] == pytest.approx(line)

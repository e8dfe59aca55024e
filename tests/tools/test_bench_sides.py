"""Sides take turns on a CPU, follow each other on an accelerator, and say why they failed."""

import os
from pathlib import Path

import pytest
from bench_sides import Side, SideFailedError, take_turns


@pytest.fixture(autouse=True)
def _sides_are_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def turns(tmp_path, device):
    diary = tmp_path / "diary"
    sides = {
        name: Side(
            "tests.helpers.echo_sides.Echo",
            {"name": name, "diary": str(diary)},
            each_core=name == "ours",
        )
        for name in ("ours", "peer")
    }
    return take_turns(sides, 2, device), diary.read_text().splitlines()


def test_on_a_cpu_rounds_alternate(tmp_path):
    found, diary = turns(tmp_path, "cpu")
    assert diary == ["ours prepares", "peer prepares", *["ours runs", "peer runs"] * 2]
    assert {one["platform"] for runs in found.runs.values() for one in runs} == {"cpu"}
    assert found.prepared["peer"]["seconds"] == 2.0
    assert "device_count" in found.prepared["ours"]["flags"]
    assert found.prepared["peer"]["flags"] == os.environ.get("XLA_FLAGS", "").strip()


def test_on_an_accelerator_a_side_ends_before_the_next_begins(tmp_path):
    found, diary = turns(tmp_path, "gpu")
    assert diary == [f"{name} {what}" for name in ("ours", "peer")
                     for what in ("prepares", "runs", "runs")]  # fmt: skip
    assert found.prepared["ours"]["platform"] == "cuda"


def test_ratios_are_of_the_same_round(tmp_path):
    found, _ = turns(tmp_path, "cpu")
    for number, (ours, peer) in enumerate(((1.0, 4.0), (2.0, 2.0))):
        found.runs["ours"][number]["seconds"] = ours
        found.runs["peer"][number]["seconds"] = peer
    ratio = found.ratio("seconds")
    assert (ratio.min, ratio.median, ratio.max) == (1.0, 2.5, 4.0)
    assert list(found.with_preparation()) == [
        "ours", "peer", "ours, before the first round", "peer, before the first round"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "said"),
    [("Failing", "the disk is full of cats"), ("Absent", "no attribute 'Absent'")],
)
def test_a_side_that_fails_says_why(name, said):
    with pytest.raises(SideFailedError, match=said):
        take_turns({"ours": Side(f"tests.helpers.echo_sides.{name}", {})}, 1, "cpu")

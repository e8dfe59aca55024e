"""What an evaluation says of the people it was held against."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from befm_jax.data.choices import People
from befm_jax.evaluate import warning_if_not_held_out, which_people

ROOT = Path(__file__).resolve().parents[1]
TRAINED = {"fingerprint": "abc", "table": "people.csv", "split_seed": 0}


def people(split, fingerprint="abc"):
    return People("somewhere", {"dictator": np.ones(101, np.int64)}, split=split,
                  fingerprint=fingerprint)  # fmt: skip


@pytest.mark.parametrize("split", ["test", "validation"])
def test_people_held_out_by_the_same_rule_need_no_warning(split):
    assert warning_if_not_held_out(TRAINED, people(split), "people.csv", 0) is None
    assert warning_if_not_held_out({}, people("all"), "people.csv", 0) is None
    assert warning_if_not_held_out(TRAINED, people("all", "other"), "other.csv", 0) is None


@pytest.mark.parametrize(
    ("split", "table", "seed", "reason"),
    [
        ("all", "people.csv", 0, "'all'"),
        ("train", "people.csv", 0, "'train'"),
        ("test", "", 0, "split differently"),
        ("test", "people.csv", 1, "split seed 0, not 1"),
    ],
)
def test_people_who_may_have_been_seen_are_warned_of(split, table, seed, reason):
    assert reason in warning_if_not_held_out(TRAINED, people(split), table, seed)


@pytest.mark.parametrize(
    ("trained_on", "table", "expected"),
    [
        ({}, "", ("test", 0)),
        ({}, "people.csv", ("all", 0)),
        (TRAINED | {"split_seed": 3}, "people.csv", ("test", 3)),
        (TRAINED | {"fingerprint": "other"}, "people.csv", ("all", 0)),
    ],
)
def test_by_default_people_are_those_whom_the_model_has_not_seen(trained_on, table, expected):
    assert which_people(trained_on, people("all"), table) == expected


@pytest.mark.parametrize("form", [["tell.py"], ["-m", "tell"]])
def test_a_report_says_the_command_as_it_was_typed(tmp_path, form):
    (tmp_path / "tell.py").write_text(
        "from befm_jax.evaluate import provenance\nprint(provenance()['command'])\n"
    )
    typed = [*form, "--games", "a, b"]
    ran = subprocess.run(
        [sys.executable, *typed],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert shlex.split(ran.stdout) == ["python", *typed]

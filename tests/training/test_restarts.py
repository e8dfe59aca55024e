"""Which restarts of a run are counted together."""

import json

import pytest

from befm_jax.config import ConfigError
from befm_jax.distributed import processes
from befm_jax.errors import UserError
from befm_jax.training import metrics, restarts


def test_restarts_are_counted_while_nothing_more_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(restarts, "PATIENCE", 2)
    config, base = tmp_path / "config.json", tmp_path / "base"
    config.write_text("one")

    def twice_and_no_more():
        for _ in range(2):
            restarts.count_restart(tmp_path, [base])
        with pytest.raises(restarts.NoProgressError):
            restarts.count_restart(tmp_path, [base])

    twice_and_no_more()
    base.mkdir()
    twice_and_no_more()
    half_written = tmp_path / "checkpoints" / "tune" / "3.orbax-checkpoint-tmp"
    half_written.mkdir(parents=True)
    with pytest.raises(restarts.NoProgressError):
        restarts.count_restart(tmp_path, [base])
    (tmp_path / "checkpoints" / "tune" / "3").mkdir()
    twice_and_no_more()
    config.write_text("another")
    twice_and_no_more()
    monkeypatch.setattr(processes, "count", lambda: 4)
    twice_and_no_more()
    restarts.end(tmp_path)
    twice_and_no_more()


def test_damaged_files_of_a_run_are_named_with_the_field(tmp_path):
    (tmp_path / "config.json").write_text("one")
    restarts.count_restart(tmp_path, [])
    kept = json.loads((tmp_path / "restarts.json").read_text())
    for content, says in (
        (json.dumps(kept | {"times": "2"}), "restarts.json: times is '2'; it must be a whole"),
        ("[]", "restarts.json: holds a list"),
        ("[" * 100_000, "restarts.json: not valid JSON"),
    ):
        (tmp_path / "restarts.json").write_text(content)
        with pytest.raises(UserError, match=says):
            restarts.count_restart(tmp_path, [])
    (tmp_path / "inputs.json").write_text('{"tune": ["a"]}')
    with pytest.raises(ConfigError, match=r"inputs\.json: tune is \['a'\]; it must be"):
        restarts.check_same_inputs(tmp_path, "tune", {"examples": "a"}, go_on=True)


def test_damaged_lines_of_the_metrics_are_dropped_and_all_but_a_truncated_last_one_noted(
    tmp_path, capsys
):
    path = tmp_path / "metrics.jsonl"
    good = [{"phase": "base", "step": 9}, *({"phase": "tune", "step": step} for step in (1, 2, 3))]
    bad = [b"[" * 100_000, b"[1]", b"{}", b'{"phase": "tune", "step": "1"}', b'"\xff"', b'{"pha']
    path.write_bytes(b"\n".join([*(json.dumps(one).encode() for one in good), *bad]))
    metrics._forget(path, "tune", 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == good[:3]
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(": ")[1] for note in notes] == [
        f"{path}:{number}" for number in range(5, 10)
    ]

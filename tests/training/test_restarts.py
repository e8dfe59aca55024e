"""Which restarts of a run are counted together."""

import pytest

from befm_jax.distributed import processes
from befm_jax.training import restarts


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

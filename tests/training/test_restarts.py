"""Which restarts of a run are counted together."""

import pytest

from befm_jax.config import ConfigError
from befm_jax.distributed import processes
from befm_jax.errors import UserError
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"tune": 3}', "tune is 3; it must"),
    ],
)
def test_damaged_inputs_are_named(tmp_path, content, message):
    (tmp_path / "inputs.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"inputs\.json: .*{message}"):
        restarts.check_same_inputs(tmp_path, "tune", {"data": "a hash"}, go_on=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [("\0", "not valid JSON"), ('{"times": "3"}', "times is '3'; it must be a number")],
)
def test_a_damaged_count_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text("one")
    (tmp_path / "restarts.json").write_text(content)
    with pytest.raises(UserError, match=rf"restarts\.json: .*{message}"):
        restarts.count_restart(tmp_path, [])

"""The training loop: what it refuses to do silently."""

import jax
import pytest

from befm_jax.training.metrics import Watch
from befm_jax.training.setup import Setup
from tests.helpers.small_training import train_small_model


def test_an_implicit_transfer_in_a_step_is_an_error(tmp_path, monkeypatch):
    """A batch that was not placed would be copied to the devices by the step itself."""
    monkeypatch.setattr(Setup, "place", lambda setup, batch: batch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train_small_model(tmp_path, Watch())

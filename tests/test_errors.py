"""Errors for people: one line in a notebook, the kinds that callers may expect."""

import pytest

from befm_jax.errors import NoModelError, UserError


def test_a_wrong_path_is_one_line_in_a_notebook_and_a_missing_file_to_callers():
    with pytest.raises(FileNotFoundError, match=r"^no/such: no such model$") as caught:
        raise NoModelError("no/such: no such model")
    assert isinstance(caught.value, UserError)
    # IPython calls this in the place of its own stack trace.
    assert caught.value._render_traceback_() == ["NoModelError: no/such: no such model"]

"""What a stranger's text looks like in a message; a message in a notebook."""

import pytest

from befm_jax.distributed import processes
from befm_jax.errors import DataError, NoModelError, UserError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \u00e9\u4f60 \\n", "plain \u00e9\u4f60 \\n"),
        ("\x1b[2J\x1b]0;title\x07gone", "\\x1b[2J\\x1b]0;title\\x07gone"),
        ("one\ntwo\r\u2028three", "one\\ntwo\\r\\u2028three"),
        ("\u202edrawkcab \ud800 \x9b31m", "\\u202edrawkcab \\ud800 \\x9b31m"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped_once(text, shown):
    assert printable(text) == printable(printable(text)) == shown
    for kind in (UserError, DataError, NoModelError):
        assert str(kind(text)) == str(kind(kind(text))) == shown


def test_an_entry_point_shows_what_the_system_says_of_a_file_in_one_line(capsys):
    def main():
        raise FileNotFoundError("no such file: \x1b[2J\n.json")

    with pytest.raises(SystemExit) as ended:
        processes.run(main)
    assert ended.value.code == processes.MISTAKE
    assert capsys.readouterr().err == "error: no such file: \\x1b[2J\\n.json\n"


def test_a_long_message_keeps_its_beginning_and_its_end():
    shown = printable("who " + "\x1b" * 10**6 + " what to do")
    assert len(shown) <= 2000
    assert shown.startswith("who \\x1b")
    assert shown.endswith("\\x1b what to do")
    assert printable(shown) == shown


def test_a_wrong_path_is_one_line_in_a_notebook_and_a_missing_file_to_callers():
    with pytest.raises(FileNotFoundError, match=r"^no/such: no such model$") as caught:
        raise NoModelError("no/such: no such model")
    assert isinstance(caught.value, UserError)
    # IPython calls this in the place of its own stack trace.
    assert caught.value._render_traceback_() == ["NoModelError: no/such: no such model"]

"""What a stranger's text looks like in a message."""

import pytest

from befm_jax.distributed import processes
from befm_jax.errors import DataError, UserError, printable


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
    for kind in (UserError, DataError):
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

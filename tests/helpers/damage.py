"""Changes of a file's bytes that a disk, an editor or a hostile person might make."""

import json
import math

PIECES = [
    *(b"{", b"}", b"[", b"]", b'"', b",", b";", b"\n", b"\r", b"\0", b"\xff", b"null", b"1e999"),
    *(b"-1", b"NaN", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\\ud800", b"9" * 4400, b"[" * 20_000),
]
VALUES = [None, True, 7, -7, 7.5, math.inf, "x", [], {}, [1], {"a": 1}, 10**400]


def damaged(content, rng, is_json):
    """The content with a piece cut, put in, replaced or doubled, or with another JSON value."""
    if is_json and rng.random() < 0.5:
        lines = content.splitlines() if _is_lines(content) else [content]
        place = rng.randrange(len(lines))
        lines[place] = json.dumps(with_another_value(json.loads(lines[place]), rng)).encode()
        return b"\n".join(lines)
    begin = rng.randrange(len(content))
    end = begin + rng.choice([0, 1, 2, 5, 20, len(content)])
    put = rng.choice([b"", rng.choice(PIECES), rng.randbytes(1), 2 * content[begin:end]])
    return content[:begin] + put + content[end:]


def with_another_value(value, rng):
    """A JSON value with one somewhere inside it replaced."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    changed = value.copy()
    place = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    changed[place] = with_another_value(value[place], rng)
    return changed


def _is_lines(content):
    """Whether this is JSON line by line, not one value."""
    try:
        json.loads(content)
    except ValueError:
        return True
    return False

"""Templates that would never end or need all memory; that others render as transformers does is
tested in `test_tokenizer.py`."""

import os
import signal

import pytest

from befm_jax.llama import rendering
from befm_jax.llama.rendering import RenderError

HELLO = [{"role": "user", "content": "Hello"}]
PLAIN = "{{ bos_token }}{{ messages[0].content }}"


def render(template, messages=HELLO, **options):
    return rendering.render(template, messages, {"bos_token": "<s>"} | options)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "more than 2 seconds",
        ),
        ("{{ 10 ** (10 ** 10) }}", "more than 2 seconds"),
        ("{{ 'a' * 10 ** 10 }}", "bytes of memory"),
        ("{{ '%99999999999d' % 1 }}", "bytes of memory"),
        ("{{ 'a' | center(10 ** 11) }}", "bytes of memory"),
        ("{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('no\x1b[31m') }}", "no\x1b"),
        ("{{ raise_exception('a' * 9999) }}", "^a{300}$"),
        ("{{ ().__class__.__mro__ }}", "unsafe"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% if %}", "Expected"),
    ],
)
def test_a_template_without_end_ends_with_the_reason_and_the_next_is_rendered(template, reason):
    with pytest.raises(RenderError, match=reason):
        render(template)
    assert render(PLAIN) == "<s>Hello"


def test_a_renderer_that_was_killed_is_started_again():
    render(PLAIN)
    os.kill(rendering._renderer._process.pid, signal.SIGKILL)
    with pytest.raises(RenderError, match="ended with -9"):
        render(PLAIN)
    assert render(PLAIN) == "<s>Hello"


@pytest.mark.parametrize(
    ("form", "day"),
    [
        ("%Y-%m-%d", "2024-07-26"),
        ("%d %B %Y", "26 July 2024"),
        ("%Y", "2024"),
        ("%A, %H:%M", "Friday, 00:00"),
        ("%%", "%"),
    ],
)
def test_the_day_is_always_the_same_in_any_format(form, day):
    assert render(f"{{{{ strftime_now('{form}') }}}}") == day


def test_any_text_survives():
    text = "\ud800 \x00 \u2028 \U0010ffff {{ bos_token }}\r\n"
    assert render(PLAIN, [{"role": "user", "content": text}]) == f"<s>{text}"

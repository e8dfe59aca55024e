"""Renders chat templates in a process of their own, with bounds on time, memory and output.

A checkpoint's template is a program.  transformers runs it in Jinja's sandbox, which keeps it from
files and from Python, not from loops that never end or texts larger than memory; and one operation
on a huge number can't be interrupted within its process.  So a second process renders, which the
kernel ends at a bound.  This file is also that process's program, hence without imports of ours.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

# The bounds of one conversation: seconds of processor time, bytes beyond those at the start, and
# characters.  A template with a hundred turns takes milliseconds and kilobytes.
SECONDS, MEMORY, CHARACTERS = 2, 1 << 30, 1 << 20
_LONGEST_REASON = 300  # characters of an error
# The day of templates that print one: the fallback of Llama 3.1's own.
YEAR, MONTH, DAY = 2024, 7, 26


class RenderError(Exception):
    """The template refuses a conversation, is broken, or went beyond a bound."""


class _Renderer:
    """The process that renders, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with self._lock:
            self._started()

    def render(self, request: Mapping[str, Any]) -> str:
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:  # Ctrl-C: an answer under way is not that of the next request
                self._end(process)
                raise
            if not line:
                raise RenderError(_reason(self._end(process)))
        answer = json.loads(line)
        if "error" in answer:
            raise RenderError(answer["error"])
        return str(answer["text"])

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                # -P: this file's folder is no place to import from.
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="ascii",
                start_new_session=True,  # Ctrl-C is the parent's
            )
        return self._process

    def _end(self, process: subprocess.Popen[str]) -> int:
        process.kill()
        self._process = None
        with suppress(BrokenPipeError), process:  # closes its pipes, and waits
            pass
        return process.returncode


_renderer = _Renderer()


def start() -> None:
    """Starts the process that renders, which takes a second: sooner than it is needed."""
    _renderer.start()


def render(template: str, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> str:
    """The text of a conversation, as transformers renders it, on a fixed day.

    `options` are what JSON can hold: arguments of transformers' `apply_chat_template` and variables
    of the template, special tokens included.

    Raises RenderError.
    """
    return _renderer.render({"template": template, "messages": messages, "options": options})


def _reason(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"it takes more than {SECONDS} seconds"
    return f"the process that renders it ended with {code}"


def _serve() -> None:
    """Answers requests, one a line, until the parent closes the pipe or ends."""
    # A launcher may send it to every process, and the parent goes on for a while.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import resource
    from datetime import datetime

    from transformers.utils import chat_template_utils

    class Day(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Day:
            return cls(YEAR, MONTH, DAY, tzinfo=tz)

    chat_template_utils.datetime = Day  # type: ignore[misc]
    if os.path.exists("/proc/self/statm"):  # Linux; elsewhere time is the bound
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for line in sys.stdin:
        request = json.loads(line)
        # Its signal ends this process, also within one operation.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            # Texts, one a conversation, and what is not asked for; the annotation says otherwise.
            rendered: Any = chat_template_utils.render_jinja_template(
                [request["messages"]], chat_template=request["template"], **request["options"]
            )
            text = rendered[0][0]
            if len(text) > CHARACTERS:
                raise ValueError(f"its text has more than {CHARACTERS:,} characters")
            answer = {"text": text}
        except MemoryError:
            answer = {"error": f"it needs more than {MEMORY:,} bytes of memory"}
        except Exception as error:  # a template may raise anything
            answer = {"error": str(error)[:_LONGEST_REASON] or type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()

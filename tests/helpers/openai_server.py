"""A small server on the loopback address that speaks the OpenAI protocol, and fails when asked to.

`Server(answer)` answers a chat by `answer(body)`, a text.  Faults come first: of each request in
turn the next of `faults`, until there are none.  What was asked is in `requests`.  Where it gives
log-probabilities they are those of a made-up model of characters, `log_probability`.
"""

import json
import math
import socket
import threading
import time
import zlib
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import NamedTuple

OPEN, CLOSE = "<|assistant|>\n", "<|end|>\n"


class Fault(NamedTuple):
    """What happens in the place of an answer.

    status: of an error; 0: none, and `body` is sent as the reply. after: seconds before it. cut:
    whether the connection ends in the middle.
    """

    status: int = 0
    body: bytes = b'{"error": {"message": "made up"}}'
    headers: Mapping[str, str] = MappingProxyType({})
    after: float = 0.0
    cut: bool = False


class Server:
    """The server; a context manager, with `base_url` inside."""

    def __init__(self, answer=lambda body: "[1]", faults=(), gives=(), refuses=(), delay=0.0):
        """Gives: of "prompt_logprobs", "echo" and "logprobs".  Refuses: names of fields (400)."""
        self.answer, self.faults = answer, list(faults)
        self.gives, self.refuses, self.delay = gives, refuses, delay
        self.requests, self.headers, self.most_at_once = [], [], 0
        self._lock, self._under_way = threading.Lock(), 0

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                server.handle(self)

            def log_message(self, *arguments):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, address):  # a client that went away
                pass

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    def handle(self, handler):
        """Answers one request, or fails as told."""
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append(body)
            self.headers.append(handler.headers)
            fault = self.faults.pop(0) if self.faults else None
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            refused = [name for name in self.refuses if name in body]
            if fault is None and refused:
                message = f"Unknown parameter: {refused[0]}."
                fault = Fault(400, json.dumps({"error": {"message": message}}).encode())
            time.sleep(self.delay if fault is None else fault.after)
            if fault is None:
                fault = Fault(0, json.dumps(self._reply(handler.path, body)).encode())
            handler.send_response(fault.status or 200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(fault.body)))
            for name, value in fault.headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            if fault.cut:
                handler.wfile.write(fault.body[: len(fault.body) // 2])
                handler.wfile.flush()
                handler.connection.shutdown(socket.SHUT_RDWR)
                handler.close_connection = True
                return
            handler.wfile.write(fault.body)
        finally:
            with self._lock:
                self._under_way -= 1

    def _reply(self, path, body):
        if path == "/v1/completions":
            return self._completion(body)
        messages = body["messages"]
        text = self.answer(body)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        if "logprobs" in self.gives and body.get("logprobs"):
            pairs = sorted(self.first.items(), key=lambda pair: -pair[1])[: body["top_logprobs"]]
            top = [{"token": token, "logprob": math.log(p)} for token, p in pairs]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        reply = {"object": "chat.completion", "model": "made-up-1", "choices": [choice]}
        reply["usage"] = usage(" ".join(one["content"] for one in messages), text or "")
        if "prompt_logprobs" in self.gives and "prompt_logprobs" in body:
            open_end = body["continue_final_message"] and not body["add_generation_prompt"]
            tokens = rendered(messages, open_end)
            reply["prompt_logprobs"] = [
                None if at == 0 else entry(tokens[:at], token) for at, token in enumerate(tokens)
            ]
        return reply

    def _completion(self, body):
        tokens = [*body["prompt"], "x"]
        choice = {"index": 0, "text": "x"}
        if "echo" in self.gives and body.get("echo"):
            logs = [log_probability(tokens[:at], token) for at, token in enumerate(tokens)]
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": [None, *logs[1:]]}
        return {"choices": [choice], "usage": usage(body["prompt"], "x")}


def rendered(messages, open_end):
    """The tokens, characters, of a chat; `open_end`: the last message's turn has no end."""
    text = "".join(f"<|{one['role']}|>\n{one['content']}{CLOSE}" for one in messages)
    return list(text.removesuffix(CLOSE) if open_end else text + OPEN)


def log_probability(before, token):
    """What the made-up model thinks of a token after others."""
    return math.log(0.3 + zlib.crc32("".join([*before[-30:], token]).encode()) % 600 / 1000)


def entry(before, token):
    """A token as vLLM shows it: by id, itself first, then a likelier one."""
    log = log_probability(before, token)
    return {
        str(ord(token)): {"logprob": log, "rank": 2, "decoded_token": token},
        "7": {"logprob": -0.1, "rank": 1, "decoded_token": "]"},
    }


def usage(read, written):
    """Numbers of tokens: of words in the prompt, of characters in the answer."""
    counts = len(read.split()), len(written)
    return dict(zip(("prompt_tokens", "completion_tokens"), counts, strict=True))

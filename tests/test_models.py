"""Names and directories; downloads from a hub on the loopback address, by the real client."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest

from befm_jax import models
from befm_jax.adapters import export, lora, peft
from befm_jax.errors import UserError
from befm_jax.respondents import engine
from tests.helpers.small import game_tokenizer, small_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "original/consolidated.safetensors": b"the same weights again",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"code",
}
TOKEN = "hf_only-a-test"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client asks for; the repository "gated" is."""

    asked: list[str]
    repositories: dict[str, dict[str, bytes]]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        self.asked.append(path)
        if path.startswith("api/models/"):
            path = path.removeprefix("api/models/")
        owner, name, *rest = path.split("/")
        files = self.repositories.get(name)
        if owner != "lab" or files is None:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if name == "gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", "v2", COMMIT):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if rest[:1] == ["resolve"]:
            content = files["/".join(rest[2:])]
            etag = hashlib.sha1(content).hexdigest()
            return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        if rest[:1] == ["tree"]:
            tree = [
                {
                    "type": "file",
                    "path": file,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for file, content in files.items()
            ]
            return self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        siblings = [{"rfilename": file} for file in files]
        body = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
        return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def answer(self, status, body, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    """The hub's address, and the list of what it was asked for."""
    Hub.asked = []
    Hub.repositories = {"open": FILES, "gated": FILES}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Hub.asked
    server.shutdown()
    thread.join()
    server.server_close()


ASK = """
import sys
from befm_jax import models
from befm_jax.errors import UserError
try:
    print(models.directory_of(sys.argv[1]))
except (UserError, FileNotFoundError) as error:
    print("error:", error)
"""


def ask(name, cache, address, program=ASK, **variables):
    """What `models.directory_of` says in a process of its own, with settings of its own."""
    environment = os.environ | {
        "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    environment.pop("HF_TOKEN", None)
    return subprocess.run(
        [sys.executable, "-c", program, name],
        env=environment | variables, capture_output=True, text=True, check=True, timeout=120,
    ).stdout.strip()  # fmt: skip


def test_a_hub_id_becomes_a_snapshot_without_pickles_or_code(served, tmp_path):
    address, asked = served
    found = Path(ask("lab/open@v2", tmp_path, address))
    files = {str(path.relative_to(found)) for path in found.rglob("*") if not path.is_dir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert (found / "model.safetensors").read_bytes() == b"weights"
    assert models.commit_of(found) == COMMIT
    assert any("/revision/v2" in path for path in asked)
    assert not any(path.endswith((".bin", ".py")) for path in asked)

    before = len(asked)
    offline = ask("lab/open@v2", tmp_path, address, HF_HUB_OFFLINE="1")
    assert Path(offline) == found
    assert len(asked) == before
    assert "can't be reached" in ask("lab/open", tmp_path / "no", address, HF_HUB_OFFLINE="1")


@pytest.mark.slow
def test_what_the_hub_does_not_give_out_is_explained(served, tmp_path):
    address, _ = served
    assert "gated" in ask("lab/gated", tmp_path, address)
    assert (Path(ask("lab/gated", tmp_path, address, HF_TOKEN=TOKEN)) / "config.json").is_file()
    assert "it does not exist" in ask("lab/missing", tmp_path, address)
    assert "no revision 'v3'" in ask("lab/open@v3", tmp_path, address)
    for name in ("lab/open@v3", "lab/missing", "lab/gated"):
        assert ask(name, tmp_path / "new", address).startswith(f"error: {name}: ")


def test_a_directory_is_taken_as_it_is_even_where_it_looks_like_an_id(tmp_path, monkeypatch):
    (tmp_path / "lab" / "open").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert models.directory_of("lab/open") == Path("lab/open")
    assert not models.is_hub_id("lab/open")
    assert models.is_hub_id("lab/other")
    assert models.commit_of(tmp_path) is None


@pytest.mark.parametrize(
    "name", ["/no/such/place", "lab", "./lab/open", "lab/open/deeper", "a b/c"]
)
def test_what_is_neither_is_refused_by_name(name):
    with pytest.raises(FileNotFoundError, match="no such adapter directory, nor a hub id"):
        models.directory_of(name, "adapter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 3),
        ("made_here", "yes"),
        ("adapter", ["adapter"]),
        ("dtype", "float16"),
        ("dtype", "flaot32"),
        ("dtype", ["float32"]),
        ("quantize", "int4"),
        ("quantize", None),
        ("trained_on", []),
    ],
)
def test_a_field_of_a_run_that_can_not_be_is_named(tmp_path, field, value):
    given = {
        "model": "base", "made_here": True, "adapter": None, "dtype": "float32", "quantize": "no",
        "trained_on": {},
    }  # fmt: skip
    (tmp_path / "base").mkdir()
    models.write_run(tmp_path, **given)
    assert models.resolve_model(tmp_path).run == given
    (tmp_path / "run.json").write_text(json.dumps(given | {field: value}))
    with pytest.raises(UserError, match=rf"run\.json: {field} is .*; it must be"):
        models.resolve_model(tmp_path)


LOAD = """
import sys
import befm_jax
found = befm_jax.load(sys.argv[1], "lab/adapter", dtype="float32")
print(found.origin["commit"], found.resolved.name, found.resolved.pinned)
print(*found.distribution("dictator").weights[:20].tolist())
"""


@pytest.mark.slow
def test_a_model_and_an_adapter_by_their_ids_are_those_of_the_files(served, tmp_path):
    address, _ = served
    tokenizer = game_tokenizer()
    model, params = small_model(vocab_size=tokenizer.vocab_size)
    adapter = lora.init(jax.random.key(0), params, rank=2)
    for weight in adapter.weights.values():
        weight["b"] = weight["b"] + 0.1
    export.model(tmp_path / "model", model.config, params, tokenizer)
    peft.save(tmp_path / "adapter", adapter, "lab/model")
    for name in ("model", "adapter"):
        Hub.repositories[name] = {
            path.name: path.read_bytes() for path in (tmp_path / name).iterdir()
        }
    first, second = ask("lab/model@v2", tmp_path / "cache", address, LOAD).splitlines()
    assert first == f"{COMMIT} lab/model lab/model@{COMMIT}"
    local = engine.load(tmp_path / "model", tmp_path / "adapter")
    np.testing.assert_allclose(
        [float(share) for share in second.split()], local.distribution("dictator").weights[:20]
    )
    assert local.resolved.pinned == str((tmp_path / "model").resolve())

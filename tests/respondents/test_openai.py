"""A server's model as a respondent: a real server on the loopback address that fails when told to.

What it gives exactly is compared with a loop over the characters of its made-up model; what it
costs and loses is counted from what the server was asked.
"""

import json
import math
import random
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openai", reason="needs the extra api")

from befm_jax.data.items import AnswerSet, FreeText, Item, Message
from befm_jax.data.responses import Exact, ResponseFile, Sampled
from befm_jax.errors import DataError, UserError
from befm_jax.respondents import openai, requests
from befm_jax.respondents.openai import OpenAI
from befm_jax.respondents.requests import KEY, Client, Spending
from tests.helpers import openai_server
from tests.helpers.openai_server import Fault, Server

ROOT = Path(__file__).resolve().parents[2]
SECRET = "sk-this-is-the-secret-key"
LIMIT = Spending(unlimited=True)
ANSWERS = AnswerSet.numbers(range(4), "coins")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr(requests, "_PAUSE", 0.01)


def item(id, answers=ANSWERS):
    return Item(id, (Message("system", "Be brief."), Message("user", f"{id}?")), answers)


def by_seed(body):
    return f"[{random.Random(body['seed']).randrange(4)}]"


def asking(server, **options):
    options = {"spending": LIMIT} | options
    tokenizer = options.pop("tokenizer", "")
    return OpenAI(Client("made-up", server.base_url, **options), tokenizer)


def by_item(responses):
    return {response.item: response for response in responses}


def test_each_participant_has_a_request_and_a_seed_of_its_own():
    with Server(by_seed) as server:
        found = by_item(asking(server).respond([item("a"), item("b")], Sampled(30, seed=3)))
        again = by_item(asking(server).respond([item("b")], Sampled(30, seed=3)))
    seeds = [body["seed"] for body in server.requests[:60]]
    assert len(set(seeds)) == 60
    assert all(0 <= seed < 2**31 for seed in seeds)
    # Participants are in their order, whichever answer came first.
    for id, response in found.items():
        own = [body["seed"] for body in server.requests[:60] if f"{id}?" in str(body)]
        assert Counter(response.texts) == Counter(by_seed({"seed": seed}) for seed in own)
        assert response.weights.sum() == 30
    assert again["b"].texts == found["b"].texts
    first = server.requests[0]
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a?"},
    ]
    assert (first["model"], first["temperature"], first["top_p"]) == ("made-up", 1.0, 1.0)
    assert (first["max_tokens"], first["top_k"], first["min_p"]) == (16, -1, 0.0)


def test_what_cannot_be_read_is_counted_and_its_text_kept():
    texts = ["[2]", "I'd rather not.", "[77]", "", None, "it is [3] coins", "\ud800 [1]"]

    def answer(body):
        return texts[(body["seed"] - start) % 2**31] if "a?" in str(body) else "free"

    with Server(answer) as server:
        model = asking(server, concurrency=1)
        (request, *_) = model._draws([item("a")], Sampled(7))
        start = request.body["seed"]
        (response,) = model.respond([item("a")], Sampled(7))
        (free,) = model.respond([item("b", FreeText(40))], Sampled(1))
    assert response.weights.tolist() == [0, 1, 1, 1]
    assert (response.draws, response.unread, response.outside) == (7, 3, 4 / 7)
    assert response.texts == tuple(text or "" for text in texts)
    assert server.requests[-1]["max_tokens"] == 40
    assert (free.draws, free.weights, free.texts) == (1, None, ("free",))


FAULTS = [
    Fault(429, headers={"Retry-After": "0.05"}),
    Fault(429, headers={"retry-after-ms": "30"}),
    Fault(500, headers={"Retry-After": "0.02"}),
    Fault(503, b"<html>busy</html>", headers={"Retry-After": "0.02"}),
    Fault(body=b'{"choices": [{"message": {"content": "[0]"}}]}', cut=True),
    Fault(body=b"{}", after=1.5),
]
DAMAGED = [
    Fault(body=b'{"choices": [{"mess'),
    Fault(body=b"[" * 100_000),
    Fault(body=b'{"choices": []}'),
    Fault(body=b'{"error": {"message": "the model is down"}}'),
    Fault(body=b'{"choices": [{"message": {"content": 7}}]}'),
    Fault(body=b"<html>", headers={"X-Served-By": "a proxy"}),
]


def test_failures_are_tried_again_and_every_answer_comes_once(tmp_path):
    faults = [fault for fault in FAULTS for _ in range(2)]
    with Server(by_seed, faults) as server:
        model = asking(server, kept=tmp_path / "kept.jsonl", timeout=1.0, concurrency=8)
        responses = list(model.respond([item(f"i{n}") for n in range(20)], Sampled(5)))
        clean = by_item(asking(server).respond([item(f"i{n}") for n in range(20)], Sampled(5)))
    assert not server.faults
    assert len(responses) == 20
    for response in responses:
        assert response.texts == clean[response.item].texts
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert len({(line["item"], line["number"]) for line in lines}) == len(lines) == 100
    assert {line["model"] for line in lines} == {"made-up-1"}


def test_damaged_replies_are_asked_for_again(tmp_path):
    with Server(by_seed, [*DAMAGED[:4], None, *DAMAGED[4:]]) as server:
        model = asking(server, concurrency=1)
        (response,) = model.respond([item("a")], Sampled(5))
        (clean,) = asking(server).respond([item("a")], Sampled(5))
    assert response.texts == clean.texts
    assert len(server.requests) == len(DAMAGED) + 5 + 5


def test_requests_are_made_at_the_same_time_as_many_as_told():
    with Server(by_seed, delay=0.05) as server:
        list(asking(server, concurrency=5).respond([item("a")], Sampled(40)))
    assert 2 <= server.most_at_once <= 5


def test_retry_after_is_waited_for():
    with Server(by_seed, [Fault(429, headers={"Retry-After": "0.7"})]) as server:
        start = time.monotonic()
        list(asking(server).respond([item("a")], Sampled(1)))
    assert time.monotonic() - start > 0.7


def test_what_fails_for_good_ends_with_a_line_and_keeps_the_answers(tmp_path, monkeypatch):
    kept = tmp_path / "kept.jsonl"
    with Server(by_seed, [Fault(body=b"no JSON")] * 5) as server:
        model = asking(server, kept=kept, concurrency=1)
        with pytest.raises(UserError, match=r"item a: 5 replies of http.* are damaged"):
            list(model.respond([item("a")], Sampled(3)))
        assert len(server.requests) == 5
        list(model.respond([item("a")], Sampled(3)))
        said = f'{{"error": {{"message": "prompt is too long; key {SECRET}"}}}}'.encode()
        server.faults = [Fault(400, said)] * 4
        with pytest.raises(DataError, match=r"answers 400: .*too long; key \*\*\*") as refused:
            list(asking(server, concurrency=1).respond([item("b")], Sampled(1)))
        server.faults = [Fault(401, said)]
        with pytest.raises(UserError, match=f"answers 401 .the key in {KEY}") as unknown:
            list(asking(server, kept=kept, concurrency=1).respond([item("b")], Sampled(3)))
    assert SECRET not in f"{refused.value}{unknown.value}"
    # Three answers, and what the five damaged replies may have taken: 35 and 16 each.
    assert len(kept.read_text().splitlines()) == 4
    assert asking(server, kept=kept).client.spent == (5 * 35 + 3 * 3, 5 * 16 + 3 * 3)
    monkeypatch.setattr(requests, "_RETRIES", 0)
    with pytest.raises(UserError, match="no connection"):
        list(asking(server).respond([item("a")], Sampled(1)))


def test_fields_that_a_server_refuses_are_left_out(capsys):
    with Server(by_seed, refuses=("top_k", "repetition_penalty", "max_tokens")) as server:
        (response,) = asking(server, concurrency=1).respond([item("a")], Sampled(9))
    assert response.draws == 9
    last = server.requests[-1]
    assert last["max_completion_tokens"] == 16
    assert not {"top_k", "max_tokens"} & set(last)
    assert last["min_p"] == 0.0
    # Each is found out once.
    assert len(server.requests) == 9 + 3
    assert capsys.readouterr().err.count("refuses top_k: left out") == 1
    # What was asked for is not left out.
    with (
        Server(by_seed, refuses=("top_k",)) as server,
        pytest.raises(DataError, match="Unknown parameter: top_k"),
    ):
        list(asking(server).respond([item("a")], Sampled(1, top_k=5)))


def test_a_refusal_that_names_no_field_leaves_out_what_is_not_needed(tmp_path):
    kept = tmp_path / "kept.jsonl"
    with Server(by_seed, [Fault(400)]) as server:
        model = asking(server, kept=kept, concurrency=1)
        list(model.respond([item("a")], Sampled(2)))
    for body in server.requests[1:]:
        assert body["max_tokens"] == 16
        assert not {"top_k", "min_p", "repetition_penalty", "max_completion_tokens"} & set(body)
    left_out = ["min_p", "repetition_penalty", "top_k"]
    assert model.first_prompt([item("a")])["left_out"] == left_out
    assert asking(server, kept=kept).first_prompt([item("a")])["left_out"] == left_out
    # A server may repeat the whole prompt before it names the field.
    said = json.dumps({"error": {"message": "x" * 2500 + " min_p " + "x" * 2500}}).encode()
    with Server(by_seed, [Fault(400, said)]) as server:
        list(asking(server).respond([item("a")], Sampled(1)))
    assert server.requests[1]["top_k"] == -1
    assert "min_p" not in server.requests[1]


class Filtered(Server):
    """Refuses prompts that are long."""

    def handle(self, handler):
        if int(handler.headers["Content-Length"]) > 1000:
            self.faults = [Fault(self.status)]
        super().handle(handler)


@pytest.mark.parametrize("status", [400, 413])
def test_a_prompt_that_is_never_served_is_counted_and_ends_nothing(tmp_path, status, capsys):
    kept = tmp_path / "kept.jsonl"
    long = Item("long", (Message("user", "x" * 1000),), ANSWERS)
    with Filtered(by_seed) as server:
        server.status = status
        model = asking(server, kept=kept, concurrency=1)
        found = by_item(model.respond([long, item("a"), item("b")], Sampled(2)))
        assert (found["long"].draws, found["long"].unread) == (2, 2)
        assert found["a"].unread == found["b"].unread == 0
        assert f"note: 2 answers are none: item long: {server.base_url}" in capsys.readouterr().err
        asked = len(server.requests)
        (again,) = asking(server, kept=kept).respond([long], Sampled(2))
        assert again.unread == 2
        assert len(server.requests) == asked
    # Whose account runs out after an answer; it isn't the prompts' fault, and no answer is kept.
    with Server(by_seed, [None, *[Fault(status)] * 100]) as server:
        with pytest.raises(DataError, match=f"answers {status}"):
            list(asking(server, kept=tmp_path / "other", concurrency=1).respond(ITEMS, Sampled(1)))
        # The second without and with fields that can be left out, and so a harmless one.
        assert len(server.requests) == 1 + 2 + 2
    assert len((tmp_path / "other").read_text().splitlines()) == 1


KILLED = """
import sys
from tests.respondents import test_openai as t
server = type("Server", (), {"base_url": sys.argv[1]})
file = t.ResponseFile(sys.argv[2] + "/responses.jsonl", {}, t.Sampled(10))
model = t.asking(server, kept=t.Path(sys.argv[2]) / "kept.jsonl", concurrency=4)
for _ in file.complete(model, t.ITEMS, t.Sampled(10)):
    pass
"""
ITEMS = [item(f"i{number}") for number in range(12)]


def test_a_killed_run_asks_again_only_for_what_was_under_way(tmp_path):
    kept, permits, released = tmp_path / "kept.jsonl", threading.Semaphore(0), 0

    def answer(body):
        permits.acquire()
        return by_seed(body)

    with Server(answer) as server:
        command = [sys.executable, "-c", KILLED, server.base_url, str(tmp_path)]
        for lines in (15, 60):
            process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
            while not kept.exists() or kept.read_bytes().count(b"\n") < lines:
                assert process.poll() is None
                if len(server.requests) > released:
                    released += 1
                    permits.release()
                time.sleep(0.002)
            process.kill()
            process.wait()
        permits.release(1000)
        with kept.open("ab") as file:
            file.write(b'{"request": "cut o')
        kills, before = 2, len(server.requests)
        had = kept.read_bytes().count(b"\n")
        file = ResponseFile(tmp_path / "responses.jsonl", {}, Sampled(10))
        model = asking(server, kept=kept)
        found = by_item(file.complete(model, ITEMS, Sampled(10)))
        assert len(server.requests) - before == 120 - had
        assert len(server.requests) <= 120 + 4 * kills
        asked = len(server.requests)
        again = by_item(asking(server, kept=kept).respond(ITEMS, Sampled(10)))
        assert len(server.requests) == asked
    assert set(found) == {one.id for one in ITEMS}
    for id, response in again.items():
        assert response.texts == found[id].texts
    for path in tmp_path.iterdir():
        assert SECRET not in path.read_text()
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"


def test_a_damaged_file_of_answers_names_its_line(tmp_path):
    kept = tmp_path / "kept.jsonl"
    whole = '{"request": "a", "answer": "[1]", "tokens": [1, 2], "left_out": []}\n'
    kept.write_text(whole + '{"request": 1}\n')
    with pytest.raises(DataError, match=r"kept.jsonl:2: not a kept answer"):
        Client("m", kept=kept)
    for answer in ('{"a": 1}', "true", '["1"]'):
        kept.write_text(whole.replace('"[1]"', answer))
        with pytest.raises(DataError, match=r"kept.jsonl:1: not a kept answer .*answer is"):
            Client("m", kept=kept)
    kept.write_text("")
    assert Client("m", kept=kept).spent == (0, 0)


def test_a_full_disk_leaves_whole_lines(tmp_path):
    kept = tmp_path / "kept.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Server(lambda body: "[1]" * 5000) as server:
        model = asking(server, kept=kept, concurrency=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(UserError, match=r"kept.jsonl: can't be written"):
                list(model.respond([item("a")], Sampled(5)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        # Three answers, and a short line of what the fourth took.
        assert [json.loads(line)["answer"] for line in kept.open()] == ["[1]" * 5000] * 3 + [None]
        (response,) = model.respond([item("a")], Sampled(5))
        assert response.draws == 5
        (again,) = asking(server, kept=kept, spending=Spending()).respond([item("a")], Sampled(5))
        assert again.texts == response.texts


def test_what_a_server_repeats_of_the_key_is_not_kept(tmp_path):
    kept = tmp_path / "kept.jsonl"
    with Server(lambda body: f"[1] {SECRET}") as server:
        model = asking(server, kept=kept)
        (response,) = model.respond([item("a")], Sampled(2))
    assert response.texts == ("[1] ***",) * 2
    assert SECRET not in kept.read_text() + repr(model.client) + json.dumps(model.describe())


@pytest.mark.parametrize("placeholder", ["1", "x", "EMPTY"])
def test_a_placeholder_of_a_key_is_replaced_nowhere(monkeypatch, placeholder):
    monkeypatch.setenv(KEY, placeholder)
    with Server(lambda body: "[1] x EMPTY") as server:
        (response,) = asking(server).respond([item("a")], Sampled(1))
    assert response.texts == ("[1] x EMPTY",)


def test_the_cost_is_said_first_and_needs_a_yes_or_a_limit(capsys, tmp_path):
    how, prices = Sampled(10), (2.0, 8.0)
    with Server(by_seed) as server:
        with pytest.raises(UserError, match=r"nothing was asked: 10 requests, at most .*--yes"):
            list(asking(server, spending=Spending()).respond([item("a")], how))
        with pytest.raises(UserError, match=r"above the limit \(--budget_tokens 100\)"):
            list(asking(server, spending=Spending(tokens=100)).respond([item("a")], how))
        low = Spending(prices, money=0.001)
        with pytest.raises(UserError, match=r"above the limit \(--budget 0.001\)"):
            list(asking(server, spending=low).respond([item("a")], how))
        assert not server.requests
        capsys.readouterr()
        model = asking(server, spending=Spending(prices, money=0.01), kept=tmp_path / "kept")
        list(model.respond([item("a")], how))
        # 14 bytes and two messages: 5 + 30 tokens; 16 are written at most.
        most = "10 requests, at most 350 tokens read and 160 written, which cost 0.00"
        assert most in capsys.readouterr().err
        assert model.client.spent == (30, 30)
        # Answers that are there cost nothing.
        model = asking(server, spending=Spending(prices, money=0.0), kept=tmp_path / "kept")
        list(model.respond([item("a")], how))
    assert "0 requests, at most 0 tokens read" in capsys.readouterr().err
    with pytest.raises(UserError, match="budget: needs prices"):
        Spending(money=1.0)


def test_a_server_that_writes_more_than_asked_stops_at_the_limit(tmp_path):
    with Server(lambda body: "[1]" + " " * 500) as server:
        limited = {"spending": Spending(tokens=3000), "kept": tmp_path / "kept.jsonl"}
        with pytest.raises(UserError, match=r"the limit .* is reached: .*answers are kept"):
            list(asking(server, concurrency=2, **limited).respond([item("a")], Sampled(30)))
    assert 4 <= len(server.requests) <= 7
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == len(server.requests)


def test_a_limit_holds_over_reruns(tmp_path):
    limited = {"spending": Spending(tokens=400), "kept": tmp_path / "kept.jsonl"}
    with Server(lambda body: "[1]" + " " * 247) as server:
        list(asking(server, **limited).respond([item("a")], Sampled(1)))
        again = asking(server, **limited)
        assert again.client.spent == (3, 250)
        list(again.respond([item("a")], Sampled(1)))
        list(again.respond([item("b")], Sampled(1)))
        with pytest.raises(
            UserError, match=r"nothing was asked.*spent before: 6 tokens read and 5"
        ):
            list(asking(server, **limited).respond([item("c")], Sampled(1)))
    assert len(server.requests) == 2


def test_requests_without_a_reply_count_as_much_as_they_can_take(tmp_path):
    kept = tmp_path / "kept.jsonl"
    lost = [Fault(after=0.6), Fault(body=b'{"choices": []}' * 9, cut=True)]
    with Server(lambda body: "[1]", lost) as server:
        model = asking(server, kept=kept, timeout=0.3, concurrency=1)
        list(model.respond([item("a")], Sampled(1)))
        # 35 and 16 at most, twice; 3 and 3.
        assert model.client.spent == asking(server, kept=kept).client.spent == (73, 35)
        server.faults = lost * 2
        model = asking(server, spending=Spending(tokens=120), timeout=0.3, concurrency=1)
        with pytest.raises(UserError, match="is reached: 70 tokens read and 32 written"):
            list(model.respond([item("a")], Sampled(2)))


def test_a_longer_wait_than_is_asked_for_in_earnest_ends(monkeypatch):
    monkeypatch.setattr(requests, "_LONGEST_ASKED", 0.2)
    with Server(by_seed, [Fault(429, headers={"Retry-After": "7200"})]) as server:
        (response,) = asking(server).respond([item("a")], Sampled(1))
    assert response.draws == 1


def test_what_is_new_is_said_and_allowed_each_time(capsys):
    with Server(by_seed) as server:
        model = asking(server, spending=Spending())
        model.admit([([], Sampled(1))])
        with pytest.raises(UserError, match="nothing was asked: 1 requests"):
            list(model.respond([item("a")], Sampled(1)))
        with pytest.raises(UserError, match="no --yes"):
            list(model.client.each(model._draws([item("a")], Sampled(1)), openai.text_of))
        assert not server.requests
        model = asking(server)
        model.admit([([item("a")], Sampled(1))])
        capsys.readouterr()
        list(model.respond([item("a")], Sampled(1)))
        assert not capsys.readouterr().err
        list(model.respond([item("b")], Sampled(1)))
        assert "1 requests, at most" in capsys.readouterr().err


def expected(one, text_before):
    """Each answer's probability by a loop over its characters."""
    mass = []
    for written in one.answers.written:
        tokens = list(text_before + written)
        first = len(tokens) - len(written)
        logs = [
            openai_server.log_probability(tokens[:at], tokens[at])
            for at in range(first, len(tokens))
        ]
        mass.append(math.exp(sum(logs)))
    return np.array(mass)


def before(one):
    messages = [{"role": role, "content": text} for role, text in one.prompt]
    return "".join(openai_server.rendered(messages, False))


def wide(id):
    return item(id, AnswerSet.numbers([10, 300, 4000], "coins"))


def test_prompt_logprobs_are_exact_distributions(tmp_path):
    items = [wide("a"), wide("b")]
    with Server(gives=("prompt_logprobs",)) as server:
        model = asking(server, kept=tmp_path / "kept.jsonl")
        found = by_item(model.respond(items, Exact()))
    # One that shows the way is the first of all.
    assert len(server.requests) == 6
    for one in items:
        mass, response = expected(one, before(one)), found[one.id]
        assert response.exact
        np.testing.assert_allclose(response.shares * (1 - response.outside), mass, rtol=1e-9)


def test_answers_of_which_one_begins_another_are_not_scored():
    one = item("a", AnswerSet(("A", "B", "AB"), kind="letters"))
    with (
        Server(gives=("prompt_logprobs",)) as server,
        pytest.raises(DataError, match=r"item a: A also begins AB, .*--sampled"),
    ):
        list(asking(server).respond([one], Exact()))
    assert not server.requests


def test_an_answer_after_a_line_feed_is_another():
    tokens = [("[", -1.0), ("33", -2.0), ("]", -4.0)]
    assert openai._of_ending("[33]", [("so", -8.0), *tokens]) == -7.0
    assert openai._of_ending("[33]", [(" [", -1.0), *tokens[1:]]) == -7.0
    with pytest.raises(DataError, match=r"spell '.n\[33\]'"):
        openai._of_ending("[33]", [("\n[", -1.0), *tokens[1:]])


@pytest.mark.parametrize("gives", ["prompt_logprobs", "logprobs"])
def test_exact_answers_that_are_kept_need_no_yes_and_no_request(tmp_path, gives):
    items = [item(id, AnswerSet.labels("Push", "Pull")) for id in ("a", "b")]
    kept = tmp_path / "kept.jsonl"
    with Server(gives=(gives,)) as server:
        server.first = {"[Push]": 0.5, "[Pull]": 0.25}
        model = asking(server, kept=kept)
        first = [response for one in items for response in model.respond([one], Exact())]
        # A way that fails is tried once.
        assert len(server.requests) == (4 if gives == "prompt_logprobs" else 3)
        asked = len(server.requests)
        again = asking(server, kept=kept, spending=Spending()).respond(items, Exact())
        assert [response.shares.tolist() for response in again] == [
            response.shares.tolist() for response in first
        ]
        assert len(server.requests) == asked


def test_echo_is_an_exact_distribution_in_the_tokenizers_template(tmp_path):
    from tests.helpers import small

    tokenizer = small.game_tokenizer()
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    one = wide("a")
    with Server(gives=("echo",)) as server:
        (response,) = asking(server, tokenizer=str(tmp_path)).respond([one], Exact())
    text = tokenizer.decode(tokenizer.prompt(one.prompt), special=True)
    without = text.removeprefix("<|begin_of_text|>")
    assert without != text
    mass = expected(one, without)
    np.testing.assert_allclose(response.shares * (1 - response.outside), mass, rtol=1e-9)


def test_answers_of_one_token_are_read_off_the_first():
    one = item("a", AnswerSet.labels("Push", "Pull"))
    with Server(gives=("logprobs",)) as server:
        server.first = {"[Push]": 0.5, " [Pull]": 0.25, "[Pull]": 0.05, "I": 0.2}
        (response,) = asking(server).respond([one], Exact())
        assert response.shares * (1 - response.outside) == pytest.approx([0.5, 0.3])
        server.first = {"[": 0.9, "[Push]": 0.1}
        with pytest.raises(
            DataError, match=r"draw answers instead .--sampled.*\[Pull\] is not one of the 2 first"
        ):
            list(asking(server).respond([one], Exact()))


def test_a_server_without_log_probabilities_is_refused_with_the_reason():
    with Server() as server:
        with pytest.raises(DataError, match=r"no prompt_logprobs; .*replies have no logprobs"):
            list(asking(server).respond([item("a")], Exact()))
        with pytest.raises(DataError, match="free text has no distribution"):
            list(asking(server).respond([item("a", FreeText())], Exact()))


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8000", "http://[", "ftp://a/v1", "http://a:b/v1", "http://a:70000/v1"),
        *("http://me:hidden@a/v1", "http://me:hidden@a:b/v1", "https://a/v1?key=hidden"),
        *("https://a/v1#hidden", f"https://a/{SECRET}/v1"),
    ],
)
def test_addresses_that_cannot_be_one(url):
    with pytest.raises(UserError, match="base_url") as error:
        Client("m", url)
    assert "hidden" not in str(error.value)
    assert SECRET not in str(error.value)


def test_a_key_that_no_header_can_hold(monkeypatch):
    monkeypatch.setenv(KEY, "sk-\u00e9\u00e9")
    with pytest.raises(UserError, match=KEY) as error:
        Client("m")
    assert "sk-" not in str(error.value)


def test_a_loop_that_runs_already_is_no_hindrance():
    import asyncio

    async def notebook():
        return list(asking(server).respond([item("a")], Sampled(3)))

    with Server(by_seed) as server:
        (response,) = asyncio.run(notebook())
    assert response.draws == 3


@pytest.mark.slow
def test_the_commands_ask_a_server(tmp_path):
    def command(name, *flags):
        arguments = [sys.executable, "-m", f"befm_jax.{name}", *map(str, flags)]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
        assert SECRET not in done.stdout + done.stderr
        return done

    def choice(body):
        return f"[{random.Random(body.get('seed')).randrange(101)}]"

    with Server(choice) as server:
        flags = ["--model", "openai:m", "--base_url", f"{server.base_url}/", "--games", "dictator"]
        drawn = [*flags, "--participants", 30]
        refused = command("simulate", *drawn, "--out", tmp_path / "choices.csv")
        assert refused.returncode == 2
        assert "nothing was asked: 30 requests" in refused.stderr
        simulated = command("simulate", *drawn, "--out", tmp_path / "choices.csv", "--yes")
        assert simulated.returncode == 0, simulated.stderr
        scored = ["--out", tmp_path / "scored", "--resamples", 200]
        exact = command("evaluate", *flags, "--yes", *scored)
        assert exact.returncode == 2
        assert "no exact distributions; draw answers instead (--sampled)" in exact.stderr
        shown = command("evaluate", *drawn, "--sampled", "--yes", *scored)
        assert shown.returncode == 0, shown.stderr
    assert len((tmp_path / "choices.csv").read_text().splitlines()) == 31
    results = json.loads((tmp_path / "scored" / "results.json").read_text())
    described = results["respondents"]["openai:m"]["description"]
    assert described["base_url"] == server.base_url
    assert "of unknown origin" in shown.stderr


def test_it_can_be_closed_in_the_middle():
    with Server(by_seed, delay=0.05) as server:
        responses = asking(server, concurrency=2).respond(ITEMS, Sampled(2))
        next(responses)
        responses.close()
        asked = len(server.requests)
        time.sleep(0.2)
        assert len(server.requests) <= asked + 2

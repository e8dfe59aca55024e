"""Scores and samples over meshes of eight devices are those of one; what they send one another."""

import dataclasses

import jax
import numpy as np
import pytest

from befm_jax.adapters import lora
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed import transfer
from befm_jax.distributed.mesh import Layout
from befm_jax.inference import decode, sample, score
from befm_jax.inference.next_token import next_token
from befm_jax.inference.sample import Request, Sampling
from befm_jax.llama import int8
from befm_jax.llama.model import Unstacked
from befm_jax.planning import hlo
from tests.helpers.collective_order import beside_loops
from tests.helpers.small import prompt_and_answer, random_paths, small_model

# Of shapes that divide by eight.
FIELDS = {
    "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 8,
    "head_dim": 8,
}  # fmt: skip
STOPS = (1, 5, 7, 9)
OPTIONS = {"stop_ids": STOPS, "sampling": Sampling(max_new_tokens=40)}


def made(kind):
    """A model with an adapter: on plain weights, on rounded ones, or with tied embeddings."""
    model, params = small_model(4, **FIELDS, tie_word_embeddings=kind == "tied")
    adapter = lora.init(jax.random.key(0), params, rank=2)
    for number, weight in enumerate(adapter.weights.values()):
        weight["b"] = 0.05 * jax.random.normal(jax.random.key(number), weight["b"].shape)
    base = int8.quantize(params) if kind == "int8" else params
    return model, lora.attach(base, adapter)


def over(sizes, model, params):
    """The same over the first devices that a mesh of these sizes takes."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = meshes.make_mesh(**sizes, devices=devices)
    placed = transfer.place(params, meshes.shardings(params, mesh))
    return dataclasses.replace(model, layout=Layout(mesh)), placed


def questions():
    """Prompts with their answers, of several lengths."""
    found = {}
    for path in random_paths(5, 60, 96):
        found.setdefault(prompt_and_answer(path)[0], []).append(path)
    return list(found.values())


def requests():
    """Prompts of several lengths, some of which begin alike, one given twice, one in another."""
    random = np.random.default_rng(3)
    shared = random.integers(2, 96, 50).tolist()
    own = [random.integers(2, 96, length).tolist() for length in (1, 14, 30, 90)]
    prompts = [[*shared, *own[0]], own[1], [*shared, *own[2]], shared, [*shared, *own[3]], own[1]]
    people = [70, 23, 29, 1, 40, 25]
    return [Request(p, n, seed) for seed, (p, n) in enumerate(zip(prompts, people, strict=True))]


@pytest.fixture(scope="module")
def alone():
    """Scores and draws on one device, by the kind of model."""
    found = {}
    for kind in ("plain", "int8", "tied"):
        model, params = made(kind)
        scores = dict(score.each_group(model, params, questions()))
        found[kind] = scores, sample.populations(model, params, requests(), **OPTIONS)
    return found


def assert_same_draws(draws, expected):
    for one, other in zip(draws, expected, strict=True):
        for name in ("lengths", "tokens", "stopped"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


# Each axis alone, all of them, two slices, fewer devices than there are: every mesh takes long.
CASES = [
    ({"data": 8}, "plain"),
    ({"fsdp": 8}, "plain"),
    ({"tensor": 8}, "plain"),
    ({"slices": 2, "data": 2, "tensor": 2}, "plain"),
    ({"data": 3, "tensor": 2}, "plain"),
    ({"tensor": 8}, "int8"),
    ({"data": 2, "fsdp": 2, "tensor": 2}, "int8"),
    ({"fsdp": 4, "tensor": 2}, "tied"),
]


def looked_through(model):
    """`score._token_scores`: no process of a CPU could take one collective for another, and nobody
    gets tied embeddings whole to take rows of them."""
    run, programs = score._token_scores(model), {}

    def checked(params, *forest_and_reads):
        shape = forest_and_reads[0].tokens.shape, forest_and_reads[1].token.shape
        if shape not in programs:
            programs[shape] = run.lower(params, *forest_and_reads).compile()
            text = programs[shape].as_text()
            assert beside_loops(text) == []
            whole = model.config.tie_word_embeddings and "f32[96,32]" in text
            assert not whole
        return programs[shape](params, *forest_and_reads)

    return checked


@pytest.mark.parametrize(("mesh", "kind"), CASES, ids=str)
def test_scores_over_a_mesh_are_those_of_one_device(alone, mesh, kind, monkeypatch):
    checked = looked_through(over(mesh, *made(kind))[0])
    monkeypatch.setattr(score, "_token_scores", lambda _: checked)
    found = dict(score.each_group(*over(mesh, *made(kind)), questions()))
    expected, _ = alone[kind]
    assert len(found) == len(expected) > 8
    for number, scores in found.items():
        np.testing.assert_allclose(scores.log_probs, expected[number].log_probs, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(scores.greedy, expected[number].greedy)


@pytest.mark.parametrize(("mesh", "kind"), CASES, ids=str)
def test_no_token_of_a_population_over_a_mesh_differs(alone, mesh, kind):
    draws = sample.populations(*over(mesh, *made(kind)), requests(), **OPTIONS)
    assert_same_draws(draws, alone[kind][1])
    assert sum(int(one.lengths.sum()) for one in draws) > 2000


def test_a_population_over_a_mesh_does_not_depend_on_its_company(alone, monkeypatch):
    """Few at a time, in other batches, which shrink on the way: whoever sits on whatever device."""
    model, params = over({"data": 4, "tensor": 2}, *made("plain"))
    sizes = set()
    fewer = sample._Engine._fewer

    def watched(engine, seats, *rest):
        found = fewer(engine, seats, *rest)
        sizes.add((seats.size, found[0].size))
        return found

    monkeypatch.setattr(sample._Engine, "_fewer", watched)
    monkeypatch.setattr(sample, "AT_A_TIME", 64)
    draws = sample.populations(model, params, requests()[::-1], **OPTIONS)
    assert_same_draws(draws[::-1], alone["plain"][1])
    assert (64, 16) in sizes


def test_without_room_for_a_copy_the_weights_are_read_where_they_are(alone, monkeypatch):
    """Under `fsdp` every token then gathers them, and is the same."""
    monkeypatch.setattr(decode, "_fits_twice", lambda *_: False)
    model, params = over({"fsdp": 4, "tensor": 2}, *made("plain"))
    assert decode.weights_for_decoding(model, params) == (model, params)
    draws = sample.populations(model, params, requests(), **OPTIONS)
    assert_same_draws(draws, alone["plain"][1])


def test_devices_of_a_cpu_share_what_the_machine_has_to_spare(monkeypatch):
    """Each of four would hold a copy of its own."""
    model, params = over({"data": 4}, *made("plain"))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"]))
    for free, apart in ((4 * 2 * whole, True), (4 * 2 * whole - 1, False)):
        monkeypatch.setattr(decode, "_free_of_machine", lambda free=free: free)
        assert isinstance(decode.weights_for_decoding(model, params)[1], Unstacked) is apart


def test_what_else_is_scored_over_a_mesh_moves_no_bit():
    """One row at a time is one on each device, and a device does the same with any of them."""
    model, params = over({"data": 4, "tensor": 2}, *made("plain"))
    asked = questions()
    together = dict(score.each_group(model, params, asked))
    for number in (0, len(asked) - 1):
        (_, apart), *_ = score.each_group(model, params, [asked[number]])
        np.testing.assert_array_equal(apart.log_probs, together[number].log_probs)
        np.testing.assert_array_equal(apart.greedy, together[number].greedy)


def test_distributions_come_in_the_order_asked_whichever_is_done_first():
    """Prompts of several lengths wait for others of their own, to be computed together."""
    random = np.random.default_rng(0)
    asked = [
        (random.integers(2, 96, length).tolist(), [(5, 1), (6, 1)])
        for length in (20, 150, 20, 20, 150, 20, 300, 20)
    ]
    model, params = made("plain")
    expected = [one.log_probs for one in score.each_answers(model, params, asked)]
    found = [one.log_probs for one in score.each_answers(*over({"data": 4}, model, params), asked)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


PEOPLE, PREFIX = 256, 192
WIDE = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8,
}  # fmt: skip


def compiled_decoding(sizes):
    """The optimised decoding loop of 256 participants behind one prompt, and its answers."""
    model, params = over(sizes, *small_model(1, **WIDE))
    decoder, weights = decode.weights_for_decoding(model, params)
    assert isinstance(weights, Unstacked)
    programs = decode.programs(
        decoder, lambda logits, keys: next_token(logits, keys, Sampling()), (1,), int8=False
    )
    blocks, draws = (decoder.layout.parts(name) for name in ("rows", "rows_to_draw"))
    engine = sample._Engine(
        weights, programs, Sampling(), np.zeros((1, 2), np.uint32), None, blocks, draws
    )
    window = sample._computed(model, params, [tuple(range(2, PREFIX + 2))])
    people = np.zeros((PEOPLE, 2), np.int64)
    _, asked, answers = engine._begun(window, sample._Batch([0], [people]))
    limits = np.zeros(PEOPLE, bool), np.int32(16), np.int32(0)
    return programs.go_on.lower(weights, asked, answers, *limits).compile(), asked, answers


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 4, "tensor": 2}, {"data": 8}], ids=str)
def test_a_token_sends_activations_and_neither_weights_nor_caches(sizes):
    compiled, asked, answers = compiled_decoding(sizes)
    assert beside_loops(compiled.as_text()) == []
    sent = hlo.traffic(compiled.as_text(), 8).by_kind()
    # Trained over fsdp, it is sampled over tensor.
    tensor = 8 if "fsdp" in sizes else sizes.get("tensor", 1)
    rows = PEOPLE * tensor // 8
    away = (tensor - 1) / tensor
    hidden = 4 * rows * WIDE["hidden_size"] * away
    # Two sums over heads or feed-forward a layer, and the embeddings' columns.
    layers = WIDE["num_hidden_layers"]
    assert sent.get("all-reduce", 0) == pytest.approx(2 * layers * 2 * hidden, abs=64)
    # Everyone's logits go to the device that draws for them.
    logits = 4 * rows * WIDE["vocab_size"] / tensor * away
    assert sent.get("all-to-all", 0) == pytest.approx(logits, rel=0.01)
    # Beside them a few numbers a row: tokens, and who is done.
    assert sent["all-gather"] <= hidden + PEOPLE * (16 + 2) * 4
    assert set(sent) <= {"all-reduce", "all-to-all", "all-gather"}
    # Caches are cut, and what comes in is what goes out.
    for caches, parts in ((asked.prefix, tensor), (answers.suffix, 8)):
        for leaf in jax.tree.leaves(caches):
            assert leaf.addressable_shards[0].data.size == leaf.size // parts
    suffix = sum(leaf.nbytes for leaf in jax.tree.leaves(answers.suffix))
    assert compiled.memory_analysis().alias_size_in_bytes >= suffix // 8

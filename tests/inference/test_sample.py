"""Populations: draws follow the exact scores, greedy follows transformers, nobody is disturbed."""

import dataclasses
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from befm_jax.inference import batching, decode, sample, score
from befm_jax.inference.next_token import next_token
from befm_jax.inference.sample import Request, Sampling
from befm_jax.llama import linear
from befm_jax.llama.model import Llama, Unstacked
from tests.helpers.parity import carried_over, reference_model
from tests.helpers.small import small_model

PROMPT = tuple(np.random.default_rng(0).integers(2, 97, 37).tolist())


def texts(draws):
    return [
        tuple(row[:length].tolist())
        for row, length in zip(draws.tokens, draws.lengths, strict=True)
    ]


def programs_of(model, sampling, stop_ids):
    """The compiled programs that such draws go through."""
    return sample._programs(model, dataclasses.replace(sampling, max_new_tokens=1), stop_ids)


def many_requests():
    """Prompts of several lengths, some of which begin alike, one given twice, one in another."""
    random = np.random.default_rng(3)
    shared = random.integers(2, 24, 50).tolist()
    own = [random.integers(2, 24, length).tolist() for length in (1, 14, 30, 90)]
    prompts = [[*shared, *own[0]], own[1], [*shared, *own[2]], shared, [*shared, *own[3]], own[1]]
    people = [70, 23, 29, 1, 40, 25]
    return [Request(p, n, seed) for seed, (p, n) in enumerate(zip(prompts, people, strict=True))]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_greedy_equals_transformers_generate(length, tmp_path):
    reference = reference_model(vocab_size=97, initializer_range=0.3)
    config, params = carried_over(reference, tmp_path)
    prompt = np.random.default_rng(length).integers(2, 97, length)
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor(prompt)[None], do_sample=False, max_new_tokens=24, eos_token_id=1,
            pad_token_id=1,
        )[0, length:].tolist()  # fmt: skip
    expected = expected[: expected.index(1)] if 1 in expected else expected
    draws = sample.population(
        Llama(config), params, prompt.tolist(), 3, stop_ids=(1,),
        sampling=Sampling(temperature=0, max_new_tokens=24),
    )  # fmt: skip
    assert texts(draws) == [tuple(expected)] * 3
    assert length == 1 or len(set(expected)) > 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_draws_agree_with_exact_scores_by_chi_square(dtype):
    """20,000 two-token answers of a small vocabulary, against their exact probabilities."""
    model, params = small_model(vocab_size=12)
    model = Llama(model.config, dtype=dtype)
    prompt = [token % 12 for token in PROMPT]
    stop = 1
    others = [token for token in range(12) if token != stop]
    sequences = [(stop,)] + [(a, stop) for a in others] + [(a, b) for a in others for b in others]
    exact = np.exp(next(score.each_answers(model, params, [(prompt, sequences)])).log_probs)
    assert exact.sum() == pytest.approx(1, abs=1e-5 if dtype == jnp.float32 else 0.01)
    draws = sample.population(
        model, params, prompt, 20_000, stop_ids=(stop,), seed=11,
        sampling=Sampling(max_new_tokens=2),
    )  # fmt: skip
    place = {sequence[: sequence.index(stop)] if stop in sequence else sequence: at
             for at, sequence in enumerate(sequences)}  # fmt: skip
    counts = np.bincount([place[text] for text in texts(draws)], minlength=len(sequences))
    expected = 20_000 * exact / exact.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert len(wanted) > 30
    assert stats.chisquare(observed, wanted).pvalue > 1e-3
    # The same test sees a temperature that is off by a tenth.
    shifted = wanted**1.1 / (wanted**1.1).sum() * wanted.sum()
    assert stats.chisquare(observed, shifted).pvalue < 1e-6


def test_a_participant_does_not_depend_on_the_others(monkeypatch):
    model, params = small_model()
    options = {"stop_ids": (1,), "seed": 4, "sampling": Sampling(max_new_tokens=6)}
    everyone = texts(sample.population(model, params, PROMPT, 300, **options))
    monkeypatch.setattr(sample, "AT_A_TIME", 64)
    assert texts(sample.population(model, params, PROMPT, 300, **options)) == everyone
    assert texts(sample.population(model, params, PROMPT, 10, **options)) == everyone[:10]
    other = options | {"seed": 5}
    assert texts(sample.population(model, params, PROMPT, 300, **other)) != everyone
    assert len(set(everyone)) > 100


def test_a_population_does_not_depend_on_company_order_or_size_of_the_batch(monkeypatch):
    """Answers of very different lengths, so that batches shrink on the way and get more room."""
    model, params = small_model(seed=2, vocab_size=24)
    options = {"stop_ids": (1, 5), "sampling": Sampling(max_new_tokens=64)}
    wanted = many_requests()
    alone = [
        texts(
            sample.population(model, params, one.prompt, one.participants, seed=one.seed, **options)
        )
        for one in wanted
    ]
    lengths = [len(text) for some in alone for text in some]
    assert min(lengths) < 2
    assert max(lengths) > 40
    sizes = []
    fewer = sample._Engine._fewer

    def watched(engine, seats, asked, *rest):
        found = fewer(engine, seats, asked, *rest)
        sizes.append((seats.size, found[0].size, len(asked.lengths), len(found[1].lengths)))
        return found

    monkeypatch.setattr(sample._Engine, "_fewer", watched)
    monkeypatch.setattr(batching, "SMALLEST", 1)
    together = sample.populations(model, params, wanted, **options)
    assert [texts(draws) for draws in together] == alone
    assert any(after < before for before, after, _, _ in sizes)
    assert any(after < before for _, _, before, after in sizes)
    backwards = sample.populations(model, params, wanted[::-1], **options)
    assert [texts(draws) for draws in backwards[::-1]] == alone
    monkeypatch.setattr(sample, "AT_A_TIME", 32)
    few = sample.populations(model, params, wanted, prompts=2, **options)
    assert [texts(draws) for draws in few] == alone
    monkeypatch.setattr(batching, "SMALLEST", 10**9)
    never_shrunk = sample.populations(model, params, wanted, **options)
    assert [texts(draws) for draws in never_shrunk] == alone
    for name in ("tokens", "lengths", "stopped"):
        np.testing.assert_array_equal(getattr(together[0], name), getattr(never_shrunk[0], name))


def test_what_prompts_share_is_computed_once(monkeypatch):
    seen = []
    prefill = decode.prefill

    def watched(model):
        def program(params, forest):
            seen.append(forest)
            return prefill(model)(params, forest)

        return program

    monkeypatch.setattr(decode, "prefill", watched)
    model, params = small_model(vocab_size=24)
    wanted = many_requests()
    sample.populations(model, params, wanted, stop_ids=(1,), sampling=Sampling(max_new_tokens=1))
    (forest,) = seen
    # 50 shared tokens, and what each adds; the prompt of one token is a slot alone.
    slots = np.count_nonzero((forest.parent >= 0) | (forest.end > np.arange(forest.end.shape[1])))
    assert slots == 50 + 14 + 30 + 90
    assert sum(len(one.prompt) for one in wanted) > 1.5 * slots


def test_a_mixed_workload_compiles_few_programs():
    """Any lengths of prompts, numbers of participants and limits, in the same buckets."""
    model, params = small_model(seed=5, vocab_size=23)
    random = np.random.default_rng(0)
    counts = []
    for turn in range(6):
        sampling = Sampling(max_new_tokens=int(random.integers(17, 65)))
        requests = [
            Request(random.integers(2, 22, random.integers(65, 90)).tolist(), int(n), turn)
            for n in random.integers(17, 33, 4)
        ]
        sample.populations(model, params, requests, stop_ids=(22,), sampling=sampling)
        programs = programs_of(model, sampling, (22,))
        counts.append(
            [programs.go_on._cache_size(), programs.begin._cache_size(),
             decode.prefill(model)._cache_size()]
        )  # fmt: skip
    assert counts[-1][1:] == [1, 1]
    # 128 rows, 32 or 8 of them, with room for 16 tokens or 64, for 4 prompts or the last of them.
    assert counts[-1][0] <= 10
    assert counts[-1] == counts[3]


def compiled_decoding(model, params, people=256, room=16, prefix=256, int8=False):
    """The optimised program of the decoding loop, and the bytes of its caches."""
    sampling = Sampling(cache="int8" if int8 else "full")
    requests = np.zeros((people, 2), np.int64)
    decoder, weights = decode.weights_for_decoding(model, params)
    engine = sample._Engine(
        weights, programs_of(decoder, sampling, (1,)), sampling, np.zeros((1, 2), np.uint32),
        None, linear.parts(decoder.layout, "rows"), linear.parts(decoder.layout, "rows_to_draw"),
    )  # fmt: skip
    window = sample._computed(model, params, [tuple(range(2, prefix + 2))])
    _, asked, answers = engine._begun(window, sample._Batch([0], [requests]))
    answers = engine.programs.with_capacity(answers, room)
    lowered = engine.programs.go_on.lower(
        engine.weights, asked, answers, np.zeros(people, bool), np.int32(room), np.int32(0)
    )
    suffix = sum(leaf.nbytes for leaf in jax.tree.leaves(answers.suffix))
    return lowered.compile(), suffix, engine.weights


@pytest.mark.parametrize("int8", [False, True])
def test_decoding_copies_neither_cache_nor_weights(int8):
    model, params = small_model(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3
    )
    compiled, suffix, weights = compiled_decoding(model, params, int8=int8)
    # The caches that come in are those that go out.
    assert compiled.memory_analysis().alias_size_in_bytes >= suffix
    shapes = {
        tuple(leaf.shape)
        for tree in (weights.layers, weights.shared, compiled_caches(int8))
        for leaf in jax.tree.leaves(tree)
        if leaf.size > 2000
    }
    moved = re.findall(
        r"= \w+\[([\d,]*)\]\S* (?:copy|transpose|concatenate|slice|dynamic-slice)\(",
        compiled.as_text(),
    )
    found = {tuple(int(size) for size in shape.split(",") if size) for shape in moved}
    assert found
    assert not found & shapes


def compiled_caches(int8):
    from befm_jax.inference import kv_cache

    return [kv_cache.capacity((people, 2, 16, slots), jnp.float32, int8=int8)
            for people, slots in ((256, 16), (1, 256))]  # fmt: skip


def test_layers_apart_or_stacked_decode_alike(monkeypatch):
    """Where memory has no room for a copy, the stacked weights are read."""
    model, params = small_model(seed=6, vocab_size=24)
    options = {"stop_ids": (1,), "sampling": Sampling(max_new_tokens=12)}
    apart = sample.populations(model, params, many_requests(), **options)
    monkeypatch.setattr(decode, "weights_for_decoding", lambda *given: given)
    stacked = sample.populations(model, params, many_requests(), **options)
    assert [texts(one) for one in stacked] == [texts(one) for one in apart]


def test_answers_end_at_any_stop_token_and_say_when_they_did_not():
    model, params = small_model(vocab_size=12)
    prompt = [token % 12 for token in PROMPT]
    draws = sample.population(
        model, params, prompt, 500, stop_ids=(1, 3), sampling=Sampling(max_new_tokens=5)
    )
    for row, length, stopped in zip(draws.tokens, draws.lengths, draws.stopped, strict=True):
        assert not np.isin(row[:length], (1, 3)).any()
        assert (length < 5 and row[length] in (1, 3)) if stopped else length == 5
    assert 0 < draws.stopped.mean() < 1


def test_looking_on_the_way_changes_no_draw_before_an_end():
    """Answers that end with token 5 or 6, looked for every few tokens, and a stop token."""
    model, params = small_model(vocab_size=24)
    prompt = [token % 24 for token in PROMPT]
    options = {"stop_ids": (1,), "seed": 2, "sampling": Sampling(max_new_tokens=70)}
    plain = sample.population(model, params, prompt, 40, **options)
    looked = sample.population(
        model, params, prompt, 40, **options, ended=lambda _, ids: 5 in ids or 6 in ids
    )
    early = 0
    for before, after in zip(texts(plain), texts(looked), strict=True):
        assert before[: len(after)] == after
        end = min((before.index(token) for token in (5, 6) if token in before), default=None)
        if end is None:
            assert before == after
        else:
            assert end < len(after) <= end + sample.LOOK_EVERY
            early += len(after) < len(before)
    assert early > 10
    never = sample.population(model, params, prompt, 40, **options, ended=lambda _, ids: False)
    assert texts(never) == texts(plain)
    np.testing.assert_array_equal(never.stopped, plain.stopped)


def test_a_short_answer_costs_few_steps_and_programs():
    model, params = small_model(seed=1, vocab_size=23)
    sampling = Sampling(temperature=0, max_new_tokens=400)
    seen = []

    def ended(_, ids):
        seen.append(len(ids))
        return len(ids) >= 40

    prompt, never = [token % 23 for token in PROMPT[:9]], 23  # an id that is never drawn
    draws = sample.population(
        model, params, prompt, 1, stop_ids=(never,), sampling=sampling, ended=ended
    )
    assert seen == [16, 32, 48]
    assert draws.lengths.tolist() == [48]
    # Room for 16 tokens, then for 64; what the answer may be at most is in no program.
    assert programs_of(model, sampling, (never,)).go_on._cache_size() == 2


class TestNextToken:
    """Which tokens can be drawn, by temperature, top-k and top-p."""

    LOGITS = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))

    def drawn(self, sampling, n=4000):
        keys = jax.random.split(jax.random.key(0), n)
        logits = jnp.broadcast_to(self.LOGITS, (n, 4))
        return np.bincount(next_token(logits, keys, sampling), minlength=4) / n

    def test_default_is_the_distribution_itself(self):
        np.testing.assert_allclose(self.drawn(Sampling()), [0.4, 0.3, 0.2, 0.1], atol=0.03)

    def test_zero_temperature_is_greedy(self):
        np.testing.assert_array_equal(self.drawn(Sampling(temperature=0)), [1, 0, 0, 0])

    def test_temperature_sharpens(self):
        expected = np.array([0.4, 0.3, 0.2, 0.1]) ** 2
        np.testing.assert_allclose(
            self.drawn(Sampling(temperature=0.5)), expected / expected.sum(), atol=0.03
        )

    def test_top_k_keeps_the_likeliest(self):
        np.testing.assert_allclose(self.drawn(Sampling(top_k=2)), [4 / 7, 3 / 7, 0, 0], atol=0.03)

    @pytest.mark.parametrize(("p", "kept"), [(0.05, 1), (0.39, 1), (0.45, 2), (0.75, 3), (0.95, 4)])
    def test_top_p_keeps_the_fewest_that_reach_it(self, p, kept):
        expected = np.array([0.4, 0.3, 0.2, 0.1]) * (np.arange(4) < kept)
        np.testing.assert_allclose(
            self.drawn(Sampling(top_p=p)), expected / expected.sum(), atol=0.03
        )

    def test_greedy_takes_the_first_of_equals_in_any_vocabulary(self):
        random = np.random.default_rng(0)
        for size in (1, 7, 127, 128, 129, 1000):
            logits = random.integers(0, 4, (50, size)).astype(np.float32)
            logits[0] = -np.inf
            logits[0, -1] = -1e30
            found = next_token(jnp.asarray(logits), None, Sampling(temperature=0))
            np.testing.assert_array_equal(found, logits.argmax(axis=1))

    @pytest.mark.parametrize("size", [130, 700])
    def test_draws_of_a_large_vocabulary_follow_the_softmax(self, size):
        logits = 2 * np.random.default_rng(1).standard_normal(size).astype(np.float32)
        logits[[0, 3, size - 1]] = -np.inf
        n = 200_000
        keys = jax.random.split(jax.random.key(5), n)
        rows = jnp.broadcast_to(jnp.asarray(logits), (n, size))
        counts = np.bincount(next_token(rows, keys, Sampling()), minlength=size)
        expected = np.exp(logits.astype(np.float64))
        expected *= n / expected.sum()
        assert (counts[expected == 0] == 0).all()
        often = expected > 5
        observed = np.append(counts[often], counts[~often].sum())
        wanted = np.append(expected[often], expected[~often].sum())
        assert stats.chisquare(observed, wanted).pvalue > 1e-3
        shifted = wanted**1.02 / (wanted**1.02).sum() * n
        assert stats.chisquare(observed, shifted).pvalue < 1e-6


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1},
                {"max_new_tokens": 0}, {"temperature": float("nan")}, {"cache": "int4"}],
)  # fmt: skip
def test_impossible_settings_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)


def test_layers_are_copied_where_there_is_room_for_it(monkeypatch):
    """On a CPU: in half of what the machine has to spare."""
    model, params = small_model()
    layers = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"]))
    for free, apart in ((2 * layers, True), (2 * layers - 1, False)):
        monkeypatch.setattr(decode, "_free_of_machine", lambda free=free: free)
        assert isinstance(decode.weights_for_decoding(model, params)[1], Unstacked) is apart


def test_what_a_machine_has_to_spare_is_told_by_linux():
    if not Path("/proc/meminfo").is_file():
        pytest.skip("no /proc/meminfo here: there is no limit then")
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < decode._free_of_machine() < physical

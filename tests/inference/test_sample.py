"""Populations: draws follow the exact scores, greedy follows transformers, nobody is disturbed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import carried_over, reference_model
from scipy import stats
from small import small_model

from befm_jax.inference import sample, score
from befm_jax.inference.sample import Sampling
from befm_jax.llama.model import Llama

PROMPT = tuple(np.random.default_rng(0).integers(2, 97, 37).tolist())


def texts(draws):
    return [
        tuple(row[:length].tolist())
        for row, length in zip(draws.tokens, draws.lengths, strict=True)
    ]


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
    exact = np.exp(score.answers(model, params, [(prompt, sequences)])[0].log_probs)
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


def test_a_short_answer_costs_few_steps_and_one_program():
    model, params = small_model(seed=1, vocab_size=23)
    sampling = Sampling(temperature=0, max_new_tokens=400)
    seen = []

    def ended(_, ids):
        seen.append(len(ids))
        return len(ids) >= 40

    draws = sample.population(
        model, params, PROMPT[:9], 1, stop_ids=(22,), sampling=sampling, ended=ended
    )
    assert seen == [16, 32, 48]
    assert draws.lengths.tolist() == [48]
    _, go_on = sample._decode(model, sampling, (22,))
    assert go_on._cache_size() == 1


class TestNextToken:
    """Which tokens can be drawn, by temperature, top-k and top-p."""

    LOGITS = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))

    def drawn(self, sampling, n=4000):
        keys = jax.random.split(jax.random.key(0), n)
        logits = jnp.broadcast_to(self.LOGITS, (n, 4))
        return np.bincount(sample.next_token(logits, keys, sampling), minlength=4) / n

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


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1},
                {"max_new_tokens": 0}, {"temperature": float("nan")}],
)  # fmt: skip
def test_impossible_settings_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)

"""Exact scores against one-by-one log-likelihoods, and bits that do not move with company."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from befm_jax.data import forest as forests
from befm_jax.data import games
from befm_jax.data.forest import Encoded
from befm_jax.inference import score
from befm_jax.llama.model import Llama
from tests.helpers.parity import carried_over, reference_model
from tests.helpers.small import SMALL, game_tokenizer, random_paths, small_model


def one_by_one(reference, path):
    """transformers' log-likelihood of an answer, each token after its real predecessors."""
    sequence, ((start, _),) = torch.tensor([path.ids]), path.learnt
    with torch.no_grad():
        log_probs = reference(sequence).logits.log_softmax(-1)[0, :-1]
    picked = log_probs[torch.arange(len(log_probs)), sequence[0, 1:]]
    return float(picked[start - 1 :].double().sum())


def test_log_probs_equal_transformers_one_sequence_at_a_time(tmp_path):
    reference = reference_model(vocab_size=97)
    config, params = carried_over(reference, tmp_path)
    paths = random_paths(0)
    found = score.log_probs(Llama(config), params, paths)
    expected = [one_by_one(reference, path) for path in paths]
    np.testing.assert_allclose(found, expected, atol=5e-5)


def question(seed, answers=40, length=70):
    random = np.random.default_rng(seed)
    prompt = tuple(random.integers(2, 97, length).tolist())
    return prompt, [(5, 7 + number, 6, 1) for number in range(answers)]


def test_a_score_is_the_same_to_the_bit_in_any_company():
    model, params = small_model()
    mine = question(0)
    (alone,) = scored(model, params, [mine])
    others = [question(seed, answers=5 * seed, length=10 * seed) for seed in range(1, 6)]
    for company in ([mine, *others], [*others, mine], [mine, mine]):
        together = scored(model, params, company)[company.index(mine)]
        np.testing.assert_array_equal(together.log_probs, alone.log_probs)


def test_packed_questions_score_as_each_alone(monkeypatch):
    """Windows of several rows; some prompts begin alike, some have a row to themselves."""
    model, params = small_model()
    stem = question(3, length=200)[0]
    questions = [
        question(seed, answers=1 + 5 * seed % 9, length=10 + 60 * seed) for seed in range(7)
    ]
    questions += [((*stem[: 100 + 20 * n], 5), question(n)[1]) for n in range(6)]
    expected = scored(model, params, questions)
    groups = [[Encoded.of(prompt, ids) for ids in answers] for prompt, answers in questions]
    for longest, row in ((8256, 1024), (1024, 256), (512, 512)):
        monkeypatch.setattr(score, "LONGEST_ROW", longest)
        monkeypatch.setattr(score, "ROW", row)
        for order in (range(13), range(12, -1, -1)):
            found = dict(score.each_packed(model, params, [groups[at] for at in order]))
            for number, at in enumerate(order):
                for one, other in zip(found[number], expected[at], strict=True):
                    np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


def test_what_different_prompts_share_is_computed_once(monkeypatch):
    """A person's fifty next answers: one chain, five alternatives behind each question."""
    model, params = small_model()
    slots = []
    build = score.forests.build
    monkeypatch.setattr(
        score.forests, "build",
        lambda *given: [built := build(*given), slots.append(built.report.slots_used)][0],
    )  # fmt: skip
    history, questions = (2, 3), []
    for number in range(50):
        history += (4 + number % 3,) * 8
        questions.append((history, [(10 + answer, 1) for answer in range(5)]))
        history += (10 + number % 5, 1)
    list(score.each_answers(model, params, questions))
    assert sum(slots) == len(history) - 1 + 50 * 4


def scored(model, params, questions, rows=1, order=None):
    """Every question's scores, by `each_group`, in the questions' own order."""
    order = list(range(len(questions))) if order is None else order
    groups = [[Encoded.of(questions[at][0], ids) for ids in questions[at][1]] for at in order]
    found = dict(score.each_group(model, params, groups, rows))
    assert sorted(found) == list(range(len(questions)))
    return [found[order.index(at)] for at in range(len(questions))]


QUESTIONS = [question(seed, answers=1 + 7 * seed % 30, length=5 + 23 * seed) for seed in range(9)]


@pytest.fixture(scope="module")
def one_at_a_time():
    return scored(*small_model(), QUESTIONS)


def test_one_row_at_a_time_order_moves_no_bit(one_at_a_time):
    order = [5, 1, 8, 0, 2, 7, 3, 6, 4]
    for found, expected in zip(
        scored(*small_model(), QUESTIONS, order=order), one_at_a_time, strict=True
    ):
        np.testing.assert_array_equal(found.log_probs, expected.log_probs)
        np.testing.assert_array_equal(found.greedy, expected.greedy)


@pytest.mark.parametrize(("rows", "backwards"), [(3, True), (16, False)])
def test_rows_together_move_scores_by_rounding_alone(one_at_a_time, rows, backwards):
    order = list(range(len(QUESTIONS)))[:: -1 if backwards else 1]
    for found, expected in zip(
        scored(*small_model(), QUESTIONS, rows, order), one_at_a_time, strict=True
    ):
        np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(found.greedy, expected.greedy)


def test_rows_together_repeat_every_bit():
    first, second = (scored(*small_model(), QUESTIONS, rows=4) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.log_probs, other.log_probs)


@pytest.mark.parametrize("length", [384, 1024])
def test_padding_moves_scores_by_rounding_alone(one_at_a_time, length, monkeypatch):
    monkeypatch.setattr(score, "bucket", lambda used: max(used, length))
    for found, expected in zip(scored(*small_model(), QUESTIONS), one_at_a_time, strict=True):
        np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5, rtol=0)


def test_company_in_one_forest_moves_scores_by_rounding_alone(one_at_a_time):
    """Questions packed into shared rows, some of them one tree because they begin alike."""
    stem = QUESTIONS[3][0]
    questions = [*QUESTIONS, ((*stem[:60], 5, 6), QUESTIONS[1][1]), ((*stem, 7), [(5, 1), (6, 1)])]
    model, params = small_model()
    expected = [*one_at_a_time, *scored(model, params, questions[-2:])]
    paths = [Encoded.of(prompt, ids) for prompt, answers in questions for ids in answers]
    together = score.log_probs(model, params, paths)
    np.testing.assert_allclose(
        together, np.concatenate([one.log_probs for one in expected]), atol=1e-5, rtol=0
    )


def test_rows_are_never_more_slots_than_the_longest_row(monkeypatch):
    shapes, full = [], []
    compiled = score._token_scores

    def watched(model):
        def run(params, forest, reads):
            shapes.append(forest.tokens.shape)
            full.append(bool((reads.column.max(axis=1) >= 0).all()))
            return compiled(model)(params, forest, reads)

        return run

    monkeypatch.setattr(score, "_token_scores", watched)
    monkeypatch.setattr(score, "LONGEST_ROW", 512)
    questions = [question(seed, answers=2, length=10 + 30 * (seed % 9)) for seed in range(40)]
    scored(*small_model(), questions, rows=4)
    # One shape for each length, however many rows were left over at the end.
    assert sorted(set(shapes)) == [(2, 192), (2, 256), (4, 64), (4, 96), (4, 128)]
    assert full.count(False) <= 6


def test_lengths_of_one_bucket_share_a_program():
    model, params = small_model(seed=3, vocab_size=98)
    questions = [question(seed, answers=3, length=92 + seed) for seed in range(20)]
    scored(model, params, questions, rows=8)
    assert score._token_scores(model)._cache_size() == 1


def test_greedy_says_what_greedy_decoding_writes(tmp_path):
    """Against transformers' own generate: its answer is greedy, and no other is."""
    reference = reference_model(vocab_size=97, initializer_range=0.3)
    config, params = carried_over(reference, tmp_path)
    prompt = tuple(np.random.default_rng(5).integers(2, 97, 30).tolist())
    with torch.no_grad():
        written = reference.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=6, eos_token_id=None,
            pad_token_id=1,
        )[0, len(prompt) :].tolist()  # fmt: skip
    assert len(set(written)) > 2
    answers = [tuple(written[:length]) for length in range(1, 7)]
    others = [
        (*written[:place], (written[place] + 1) % 97, *written[place + 1 :]) for place in range(6)
    ]
    found = scored(Llama(config), params, [(prompt, [*answers, *others])])[0]
    assert found.greedy.tolist() == [True] * 6 + [False] * 6


def test_of_equally_likely_tokens_the_lowest_id_is_greedy():
    model, params = small_model()
    head = np.array(params["lm_head"]["weight"])
    prompt, _ = question(6, length=20)
    likeliest = int(
        scored(model, params, [(prompt, [(token,) for token in range(97)])])[0].log_probs.argmax()
    )
    head[[0, 96]] = head[likeliest]
    params = params | {"lm_head": {"weight": jnp.asarray(head)}}
    equals = sorted({0, likeliest, 96})
    found = scored(model, params, [(prompt, [(token,) for token in equals])])[0]
    assert len(set(found.log_probs)) == 1
    assert found.greedy.tolist() == [True, *[False] * (len(equals) - 1)]
    assert int(torch.argmax(torch.tensor(found.log_probs))) == 0


def test_repeating_a_call_repeats_every_bit():
    model, params = small_model()
    first, second = (
        next(score.each_answers(model, params, [question(3)])).log_probs for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_the_distribution_and_the_mass_outside_add_up():
    model, params = small_model()
    prompt, _ = question(1)
    ends_at_once = next(
        score.each_answers(model, params, [(prompt, [(token, 1) for token in range(2, 97)])])
    )
    one_token = next(
        score.each_answers(model, params, [(prompt, [(token,) for token in range(97)])])
    )
    assert one_token.outside == pytest.approx(0, abs=1e-6)
    assert one_token.probabilities.sum() == pytest.approx(1)
    inside = np.exp(ends_at_once.log_probs).sum()
    assert ends_at_once.outside == pytest.approx(1 - inside)
    np.testing.assert_allclose(
        ends_at_once.probabilities, np.exp(ends_at_once.log_probs) / inside, rtol=1e-6
    )


def test_a_hopelessly_unlikely_set_still_has_a_distribution():
    found = score.AnswerDistribution(np.array([-2000.0, -2001.0]), np.array([-1999.0, -2000.0]))
    assert found.outside == 1
    assert found.ends_after_answer == pytest.approx(1 / np.e)
    np.testing.assert_allclose(found.probabilities, [1 / (1 + np.exp(-1)), 1 / (1 + np.e)])


def test_the_probability_of_ending_is_that_of_transformers_after_each_answer(tmp_path):
    reference = reference_model(vocab_size=97)
    config, params = carried_over(reference, tmp_path)
    prompt, answers = question(4, answers=12)
    # One is the beginning of another, one is cut short, and one is nothing but an end.
    answers += [(5, 1), (5, 7, 1), (8, 1), (1,)]
    found = next(score.each_answers(Llama(config), params, [(prompt, answers)]))
    whole = [one_by_one(reference, Encoded.of(prompt, ids)) for ids in answers]
    stems = [
        one_by_one(reference, Encoded.of(prompt, ids[:-1])) if ids[:-1] else 0 for ids in answers
    ]
    np.testing.assert_allclose(found.log_probs, whole, atol=5e-5)
    np.testing.assert_allclose(found.stem_log_probs, stems, atol=5e-5)
    expected = np.exp(whole).sum() / np.exp(stems).sum()
    assert found.ends_after_answer == pytest.approx(expected, rel=1e-4)
    assert 0 < found.ends_after_answer < 1


def test_the_probability_of_ending_costs_no_slot(monkeypatch):
    """Its tokens are those of the answers, in the same rows."""
    model, params = small_model()
    prompt, answers = question(5)
    built = []
    build = score.forests.build
    monkeypatch.setattr(
        score.forests, "build", lambda *args: built.append(build(*args)) or built[-1]
    )
    next(score.each_answers(model, params, [(prompt, answers)]))
    score.log_probs(model, params, [Encoded.of(prompt, ids) for ids in answers])
    with_stems, without = built
    assert with_stems.report.slots_used == without.report.slots_used


def test_answers_that_need_several_rows_are_all_scored(monkeypatch):
    model, params = small_model()
    prompt, answers = question(2, answers=80)
    whole = next(score.each_answers(model, params, [(prompt, answers)])).log_probs
    monkeypatch.setattr(score, "LONGEST_ROW", 128)
    in_rows = next(score.each_answers(model, params, [(prompt, answers)])).log_probs
    np.testing.assert_allclose(in_rows, whole, atol=1e-5)


def test_what_can_not_be_scored_is_an_error(monkeypatch):
    model, params = small_model()
    monkeypatch.setattr(score, "LONGEST_ROW", 64)
    with pytest.raises(score.RowTooShortError, match="longer than a row"):
        next(score.each_answers(model, params, [question(0)]))


def test_a_number_of_rows_below_one_is_an_error():
    with pytest.raises(ValueError, match="rows"):
        list(score.each_group(*small_model(), [], rows=0))


def test_the_longest_context_fits_with_its_last_token():
    model, params = small_model(num_hidden_layers=1)
    prompt = tuple(np.random.default_rng(0).integers(2, 97, score.LONGEST_CONTEXT).tolist())
    with pytest.raises(score.RowTooShortError):
        score.log_probs(model, params, [Encoded.of(prompt, (5,) * 66)])
    assert forests.build([Encoded.of(prompt, (5,))], score.LONGEST_ROW).places[0] is not None


def test_buckets_hold_what_they_are_for_and_are_few():
    sizes = [score.bucket(length) for length in range(1, score.LONGEST_ROW + 1)]
    assert all(size >= length for length, size in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 16
    assert all(size <= 64 or size <= 1.5 * length for length, size in enumerate(sizes, start=1))


def test_real_games_score_as_each_answer_alone():
    tokenizer = game_tokenizer()
    model, params = small_model(vocab_size=tokenizer.vocab_size)
    game = games.get("public_goods")
    prompt = tokenizer.prompt(game.prompt())
    written = [tokenizer.answer(game.answers.written[value]) for value in (0, 7, 20)]
    together = next(score.each_answers(model, params, [(prompt, written)])).log_probs
    alone = [score.log_probs(model, params, [Encoded.of(prompt, ids)])[0] for ids in written]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_bfloat16_scores_stay_near_float32():
    model, params = small_model()
    exact = next(score.each_answers(model, params, [question(0)])).probabilities
    rough = next(
        score.each_answers(Llama(SMALL, dtype=jnp.bfloat16), params, [question(0)])
    ).probabilities
    assert 0.5 * np.abs(exact - rough).sum() < 0.05


def test_a_batch_that_is_alone_has_no_more_rows_than_it_needs():
    """And one behind full ones has theirs, whose program is there."""
    asked = [question(seed, answers=2, length=20) for seed in range(6)]
    groups = [[Encoded.of(prompt, ids) for ids in answers] for prompt, answers in asked]
    laid_out = [score._lay_out([one], 512) for one in enumerate(groups)]
    assert [batch.rows for batch in score._batches(laid_out[:3], 4, 1)] == [3]
    assert [batch.rows for batch in score._batches(laid_out[:3], 4, 2)] == [4]
    assert [batch.rows for batch in score._batches(laid_out, 4, 1)] == [4, 4]

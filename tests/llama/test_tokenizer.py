"""One chat layout, exactly one BOS, text that stays text; the tiny tokenizer is SentencePiece's."""

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from befm_jax.data import games
from befm_jax.llama import scratch
from befm_jax.llama.tokenizer import LLAMA3_SPECIAL, TemplateError, Tokenizer

GAMES = [games.get(name) for name in games.ids()]
TEXTS = [text for game in GAMES for text in (*game.prompt(), game.answers.format(1))]


@pytest.fixture(scope="module")
def learnt():
    """The tokenizer, and the SentencePiece model that it was made from."""
    kept = {}
    as_fast = scratch._as_fast

    def keep(model):
        kept["sentencepiece"] = model
        return as_fast(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "_as_fast", keep)
        return scratch.train_tokenizer(TEXTS), kept["sentencepiece"]


@pytest.fixture(scope="module")
def tokenizer(learnt):
    return learnt[0]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_those_of_sentencepiece(learnt, text):
    tokenizer, sentence_piece = learnt
    assert isinstance(sentence_piece, sentencepiece.SentencePieceProcessor)
    assert tokenizer._ordinary(text) == sentence_piece.encode(text)


@given(st.text(max_size=60).filter(lambda text: text.strip() == text and text))
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.answer(text)) == text


@pytest.mark.parametrize("game", GAMES, ids=lambda game: game.id)
def test_prompts_equal_the_rendered_template_with_one_bos(tokenizer, game):
    system, user = game.prompt()
    prompt = tokenizer.prompt(system, user)
    rendered = tokenizer._backend.apply_chat_template(
        [{"role": "system", "content": system}, {"role": "user", "content": user}],
        add_generation_prompt=True,
    )
    assert list(prompt) == list(rendered["input_ids"])
    assert prompt.count(tokenizer.bos_id) == 1
    assert prompt[0] == tokenizer.bos_id


def test_a_whole_conversation_is_prompt_then_answer(tokenizer):
    whole = tokenizer._backend.apply_chat_template(
        [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": "[33]"}],
        tokenize=True,
    )["input_ids"]
    assert list(tokenizer.prompt("", "How much?") + tokenizer.answer("[33]")) == list(whole)


def test_numbers_up_to_three_digits_are_one_token(tokenizer):
    assert {len(tokenizer.answer(f"[{number}]")) for number in range(1000)} == {4}


@pytest.mark.parametrize("mark", LLAMA3_SPECIAL)
def test_a_special_token_in_a_text_stays_text(tokenizer, mark):
    plain = tokenizer.prompt("Rules.", "I say this.")
    typed = tokenizer.prompt(f"Rules. {mark}", f"I say {mark} this.")
    special = {tokenizer._special[name] for name in LLAMA3_SPECIAL}
    assert [i for i in typed if i in special] == [i for i in plain if i in special]
    assert mark in tokenizer.decode(typed)
    assert tokenizer.answer(mark).count(tokenizer.end_of_turn) == 1


def test_messages_do_not_leak_into_each_other(tokenizer):
    text = tokenizer.decode(tokenizer.prompt("\ue000\ue002", "the user's words"))
    assert text.count("the user's words") == 1


def test_saving_and_loading_keep_every_id(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    back = Tokenizer.load(tmp_path, more_stop_ids=(7,))
    for game in GAMES:
        assert back.prompt(*game.prompt()) == tokenizer.prompt(*game.prompt())
    assert back.end_of_turn == tokenizer.end_of_turn
    assert back.stop_ids == tuple(sorted({7, *tokenizer.stop_ids}))


def test_a_template_that_drops_a_message_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|eot_id|>")
    with pytest.raises(TemplateError, match="exactly once"):
        Tokenizer.load(tmp_path)


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_training_is_deterministic():
    first, second = (scratch.train_tokenizer(TEXTS) for _ in range(2))
    assert first.prompt(*GAMES[0].prompt()) == second.prompt(*GAMES[0].prompt())

"""What is loaded besides weights: where answers stop, which template, what the model reads."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

import befm_jax
from befm_jax import tasks
from befm_jax.adapters import chat_template, export, lora, peft
from befm_jax.data import games, questionnaires
from befm_jax.data.forest import Encoded
from befm_jax.data.items import examples_of
from befm_jax.data.questionnaires import Questionnaire
from befm_jax.data.responses import Exact, Sampled
from befm_jax.errors import UserError
from befm_jax.inference import sample, score
from befm_jax.llama import hf
from befm_jax.respondents import merging
from befm_jax.tasks.games import item_of
from befm_jax.tasks.wording import DEFAULT
from tests.helpers.small import game_tokenizer, small_model

GAME = games.get("public_goods")


@pytest.fixture
def directory(tmp_path):
    """A small random model as transformers would leave it."""
    tokenizer = game_tokenizer()
    model, params = small_model(vocab_size=tokenizer.vocab_size)
    hf.save(tmp_path / "model", model.config, params)
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(directory):
    """A LoRA adapter for it, as others leave one."""
    _, params = hf.load(directory)
    peft.save(directory.parent / "adapter", lora.init(jax.random.key(0), params, rank=2), "model")
    return directory.parent / "adapter"


def generation_config(directory, **fields):
    (directory / "generation_config.json").write_text(json.dumps(fields))


def test_every_end_of_the_models_files_stops_an_answer(directory):
    before = befm_jax.load(directory)
    free = before.simulate(GAME, 200, seed=1)
    draws = sample.population(
        before.model, before.params, before.tokenizer.prompt(GAME.prompt()), 2000,
        stop_ids=before.tokenizer.stop_ids,
    )  # fmt: skip
    # What many an answer has for its third token now ends it.
    token = int(np.bincount(draws.tokens[draws.lengths > 2, 2]).argmax())
    assert token not in before.tokenizer.stop_ids
    generation_config(directory, eos_token_id=[token, 0])
    after = befm_jax.load(directory)
    assert set(after.tokenizer.stop_ids) == {*before.tokenizer.stop_ids, token, 0}
    shorter = after.simulate(GAME, 200, seed=1)
    for text, whole in zip(shorter.texts, free.texts, strict=True):
        assert whole.startswith(text)
    assert shorter.texts != free.texts


def test_sampling_settings_of_a_model_are_ignored_and_kept_in_its_origin(directory):
    expected = befm_jax.load(directory)
    assert "ignored_generation_config" not in expected.origin
    generation_config(directory, do_sample=True, temperature=0.1, top_k=1, bos_token_id=0)
    found = befm_jax.load(directory)
    ignored = {"do_sample": True, "temperature": 0.1, "top_k": 1}
    assert found.origin["ignored_generation_config"] == ignored
    assert found.simulate(GAME, 50).texts == expected.simulate(GAME, 50).texts


def test_a_stop_id_that_can_not_be_drawn_has_no_effect(directory):
    before = befm_jax.load(directory)
    generation_config(
        directory, eos_token_id=[before.tokenizer.vocab_size + 9, before.tokenizer.stop_ids[0]]
    )
    after = befm_jax.load(directory)
    assert after.tokenizer.stop_ids == before.tokenizer.stop_ids
    assert after.simulate(GAME, 5).texts == before.simulate(GAME, 5).texts


def test_a_damaged_generation_config_is_an_error_that_names_it(directory):
    (directory / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is 'end'"):
        befm_jax.load(directory)


def test_where_the_system_message_was_put_is_in_the_metadata(directory):
    assert "system" not in befm_jax.load(directory).origin["chat_template"]
    template = directory / "chat_template.jinja"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no\x1b') }}{% endif %}"
    template.write_text(refuses + template.read_text())
    engine = befm_jax.load(directory)
    assert engine.origin["chat_template"]["system"].endswith(": no\\x1b")
    (_, system), (_, user) = GAME.prompt()
    assert f"{system}\n\n{user}" in engine.first_prompt([item_of(GAME)])["text"]


def test_an_adapter_of_another_template_is_refused_unless_forced(directory, adapter):
    tokenizer = befm_jax.load(directory).tokenizer
    unknown = befm_jax.load(directory, adapter)
    assert unknown.origin["chat_template"]["adapter"].startswith("unknown")
    chat_template.save(adapter, tokenizer.template_hash)
    same = befm_jax.load(directory, adapter)
    assert same.origin["chat_template"] == {
        "sha256": tokenizer.template_hash,
        "adapter": "the one that the adapter was trained with",
    }
    template = directory / "chat_template.jinja"
    template.write_text(template.read_text().replace("\n\n", "\n"))
    with pytest.raises(UserError, match="trained with another chat template"):
        befm_jax.load(directory, adapter)
    forced = befm_jax.load(directory, adapter, force_template=True)
    assert forced.origin["chat_template"]["adapter"].startswith("forced")
    assert forced.tokenizer.template_hash != tokenizer.template_hash


def test_an_adapter_of_another_base_is_refused_unless_forced(directory, adapter):
    assert befm_jax.load(directory, adapter).origin["adapter_base"] == (
        "the one that the adapter names"
    )
    stored = hf.open_model(directory)
    config = stored.config
    trained = peft.load(adapter, config)
    peft.save(adapter, trained, "model", base_fingerprint=hf.fingerprint(stored))
    for quantize in ("no", "int8"):
        same = befm_jax.load(directory, adapter, quantize=quantize)
        assert same.origin["adapter_base"] == "the one that the adapter was trained on"
    _, others = small_model(1, vocab_size=config.vocab_size)
    hf.save(directory, config, others)
    with pytest.raises(UserError, match="trained on another base"):
        befm_jax.load(directory, adapter)
    forced = befm_jax.load(directory, adapter, force_base=True)
    assert forced.origin["adapter_base"].startswith("forced")
    # What it makes of the other base, merged, is a base of its own.
    export.model(directory, config, lora.merge(forced.params), forced.tokenizer)
    with pytest.raises(UserError, match="trained on another base"):
        befm_jax.load(directory, adapter)


def test_weights_that_are_not_finite_are_neither_asked_nor_merged(directory, tmp_path):
    path = directory / "model.safetensors"
    stored = load_file(path)
    stored["model.norm.weight"][3] = np.nan
    save_file(stored, path)
    for quantize in ("no", "int8"):
        broken = befm_jax.load(directory, quantize=quantize)
        with pytest.raises(UserError, match=r"numbers are not finite: norm/weight"):
            broken.distribution(GAME)
        with pytest.raises(UserError, match=r"numbers are not finite: .*norm/weight"):
            broken.simulate(GAME, 5)
    with pytest.raises(UserError, match="numbers are not finite"):
        merging.merged(directory, None, tmp_path / "merged", asked=[GAME])
    assert not (tmp_path / "merged").exists()


def test_a_prompt_of_more_tokens_than_the_model_has_positions_is_refused(directory):
    whole = befm_jax.load(directory)
    prompt = len(whole.tokenizer.prompt(GAME.prompt()))
    answer = max(len(whole.tokenizer.answer(text)) for text in GAME.answers.written)
    path = directory / "config.json"
    fields = json.loads(path.read_text())

    def with_positions(positions):
        path.write_text(json.dumps(fields | {"max_position_embeddings": positions}))
        return befm_jax.load(directory)

    enough = with_positions(prompt + answer - 1)
    np.testing.assert_array_equal(enough.distribution(GAME).shares, whole.distribution(GAME).shares)
    enough.simulate(GAME, 2, how=Sampled(max_tokens=answer))
    with pytest.raises(UserError, match=rf"{prompt} tokens, and an answer up to {answer + 1};"):
        enough.simulate(GAME, 2, how=Sampled(max_tokens=answer + 1))
    with pytest.raises(UserError, match=rf"public_goods: .*{prompt} .*max_position_embeddings"):
        with_positions(prompt + answer - 2).distribution(GAME)


def test_a_token_without_an_embedding_is_taken_if_it_can_not_occur(directory):
    expected = befm_jax.load(directory).distribution(GAME).shares
    backend = AutoTokenizer.from_pretrained(directory)
    backend.add_special_tokens({"pad_token": "[PAD]"})
    backend.save_pretrained(directory)
    padded = befm_jax.load(directory)
    assert padded.tokenizer.vocab_size == padded.model.config.vocab_size + 1
    np.testing.assert_array_equal(padded.distribution(GAME).shares, expected)
    template = (directory / "chat_template.jinja").read_text()
    for written in ("{{ pad_token }}", "[PAD]"):
        (directory / "chat_template.jinja").write_text(
            template.replace("{{ bos_token }}", "{{ bos_token }}" + written)
        )
        with pytest.raises(UserError, match=r"ids up to \d+; the model has embeddings of \d+"):
            befm_jax.load(directory)
    (directory / "chat_template.jinja").write_text(template)
    backend.add_tokens(["contribute"])
    backend.save_pretrained(directory)
    with pytest.raises(UserError, match=r"ids up to \d+; the model has embeddings of \d+"):
        befm_jax.load(directory)


def test_the_first_prompt_is_what_transformers_reads(directory):
    engine = befm_jax.load(directory)
    first_prompt = engine.first_prompt([item_of(GAME), item_of("dictator")])
    (_, system), (_, user) = GAME.prompt()
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    reference = AutoTokenizer.from_pretrained(directory)
    assert first_prompt == {
        "item": "public_goods",
        "ids": reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"],
        "text": reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
    }
    assert engine.describe() == engine.origin
    assert engine.first_prompt([]) == {}


def test_weights_in_float16_are_computed_in_float32(directory):
    """No kernel takes float16; what it holds float32 holds exactly."""
    path = directory / "model.safetensors"
    stored = {name: array.astype(np.float16) for name, array in load_file(path).items()}
    save_file(stored, path)
    half = befm_jax.load(directory)
    assert half.origin["dtype"] == "float32"
    save_file({name: array.astype(np.float32) for name, array in stored.items()}, path)
    whole = befm_jax.load(directory)
    np.testing.assert_array_equal(half.distribution(GAME).shares, whole.distribution(GAME).shares)


def test_several_devices_answer_as_one(directory, adapter):
    alone = befm_jax.load(directory, adapter)
    assert alone.origin["mesh"] == "one device"
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(alone.params)} == {1}
    several = []
    for devices, mesh in ((3, "data 3"), (4, "data 2 x tensor 2")):
        several.append(befm_jax.load(directory, adapter, devices=devices))
        assert several[-1].origin == alone.origin | {"mesh": mesh}
        assert several[-1].device == f"{devices} x cpu (cpu)"
    last = befm_jax.load(directory, adapter, devices=jax.devices()[5:6])
    assert {dev for leaf in jax.tree.leaves(last.params) for dev in leaf.devices()} == {
        jax.devices()[5]
    }
    for other in (*several, last):
        assert other.simulate(GAME, 60, seed=3).texts == alone.simulate(GAME, 60, seed=3).texts
        np.testing.assert_allclose(
            other.distribution(GAME).shares, alone.distribution(GAME).shares, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("devices", "said"),
    [(9, "devices is 9; it must be 1 to 8"), (0, "devices is 0"), ([], "devices is empty")],
)
def test_more_devices_than_there_are_is_an_error_that_says_how_many(directory, devices, said):
    with pytest.raises(UserError, match=said):
        befm_jax.load(directory, devices=devices)


def test_in_a_notebook_a_model_is_a_line_and_a_population_a_table_and_a_picture(directory):
    model = befm_jax.load(directory)
    assert re.fullmatch(rf"<Engine of {directory}: llama, 2 layers .*, on .*cpu.*>", repr(model))
    people = model.simulate("dictator", 20)
    assert repr(people).startswith("<Simulation of dictator: 20 draws, ")
    assert "\n" not in repr(model) + repr(people)
    table = people.to_pandas()
    assert list(table) == ["game", "participant", "choice", "text"]
    assert table["choice"].isna().sum() == people.choices.count(None)
    assert [None if np.isnan(choice) else choice for choice in table["choice"]] == people.choices
    bars = people.plot().patches
    assert sum(bar.get_height() for bar in bars) == 20 - people.choices.count(None)


class TestAPersonsAnswersInARow:
    """Answers that were given one after the other are scored and learnt in one pass."""

    FORM = questionnaires.get("bfi_25")
    PERSON = Questionnaire(
        "p", "bfi_25", {code: at % 6 for at, code in enumerate(FORM.statements)}, 31
    )

    def items(self):
        return list(tasks.get("survey/next").items(self.PERSON, DEFAULT, np.random.default_rng(0)))

    def test_scores_are_those_of_each_asked_alone(self, directory):
        engine = befm_jax.load(directory)
        items = self.items()
        together = list(engine.respond(items, Exact()))
        for number in (0, 1, 12, 24):
            (alone,) = engine.respond([items[number]], Exact())
            np.testing.assert_allclose(together[number].weights, alone.weights, atol=1e-5)
            assert together[number].outside == pytest.approx(alone.outside, abs=1e-5)

    def test_the_loss_of_the_conversation_is_the_sum_of_each_answers(self, directory):
        engine = befm_jax.load(directory)
        items = self.items()
        (example,) = examples_of(items)
        ids, spans = engine.tokenizer.encode(example.messages, example.spans)
        whole = score.log_probs(engine.model, engine.params, [Encoded(ids, spans)])
        answers = [
            Encoded.of(
                engine.tokenizer.prompt(item.prompt),
                engine.tokenizer.answer(item.answers.written[item.target.argmax()]),
            )
            for item in items
        ]
        apart = [score.log_probs(engine.model, engine.params, [one])[0] for one in answers]
        assert whole[0] == pytest.approx(sum(apart), rel=1e-5)

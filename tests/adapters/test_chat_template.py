"""An adapter knows the chat template that it was trained with, and another one is refused."""

import hashlib
import json

import pytest

from befm_jax.adapters import chat_template
from befm_jax.adapters.lora import AdapterError
from befm_jax.llama.tokenizer import Tokenizer
from tests.helpers.chat_tokenizers import qwen3

TEMPLATE = (
    "{% for m in messages %}\n<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}\n"
)
HASH = hashlib.sha256(TEMPLATE.encode()).hexdigest()
OTHER = hashlib.sha256(b"another").hexdigest()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(qwen3(template=TEMPLATE)[0])


@pytest.fixture(scope="module")
def another():
    return Tokenizer(qwen3(template=TEMPLATE.replace("m.content", "m.content | trim"))[0])


def write_ours(directory):
    chat_template.save(directory, HASH)


def write_jinja(directory):
    (directory / "chat_template.jinja").write_bytes(TEMPLATE.encode())


def write_tokenizer_config(directory):
    fields = {"chat_template": TEMPLATE, "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))


def write_named_templates(directory):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))


@pytest.mark.parametrize(
    "write", [write_ours, write_jinja, write_tokenizer_config, write_named_templates]
)
def test_a_template_is_known_from_every_file_that_may_hold_it(tmp_path, write, tokenizer, another):
    write(tmp_path)
    (file,) = tmp_path.iterdir()
    assert chat_template.read(tmp_path) == (HASH, file)
    assert chat_template.check(tmp_path, tokenizer) == "the one that the adapter was trained with"
    with pytest.raises(AdapterError) as error:
        chat_template.check(tmp_path, another)
    for part in (str(file), HASH[:12], "--force_template"):
        assert part in str(error.value)
    forced = chat_template.check(tmp_path, another, force=True)
    assert forced.startswith("forced")
    assert HASH in forced


@pytest.mark.parametrize(
    "same",
    [
        TEMPLATE + "\n",
        "{# mine #}" + TEMPLATE,
        TEMPLATE.replace("{{ m.role", "{% generation %}{{ m.role").replace(
            "m.content }}", "m.content }}{% endgeneration %}"
        ),
    ],
)
def test_a_template_of_other_words_that_writes_the_same_is_the_same(
    tmp_path, tokenizer, another, same
):
    """As PEFT leaves it, and as we store it of the tokenizer that it was trained with."""
    (tmp_path / "chat_template.jinja").write_text(same)
    assert chat_template.check(tmp_path, tokenizer) == "the one that the adapter was trained with"
    with pytest.raises(AdapterError, match="another chat template"):
        chat_template.check(tmp_path, another)
    chat_template.save(tmp_path, Tokenizer(qwen3(template=same)[0]).rendered_hash())
    assert chat_template.check(tmp_path, tokenizer) == "the one that the adapter was trained with"
    with pytest.raises(AdapterError, match="another chat template"):
        chat_template.check(tmp_path, another)


@pytest.mark.parametrize("text", ["", "{% if %}", "{{ raise_exception('no') }}"])
def test_a_template_that_writes_nothing_is_another_one(tmp_path, tokenizer, text):
    (tmp_path / "chat_template.jinja").write_text(text)
    with pytest.raises(AdapterError, match="another chat template"):
        chat_template.check(tmp_path, tokenizer)
    assert chat_template.check(tmp_path, tokenizer, force=True).startswith("forced")


def test_what_an_adapter_was_trained_with_comes_before_what_lies_beside_it(tmp_path):
    write_jinja(tmp_path)
    chat_template.save(tmp_path, OTHER)
    assert chat_template.read(tmp_path) == (OTHER, tmp_path / "chat_template_hash.json")


def test_line_ends_make_no_other_template(tmp_path):
    for line_end in ("\r\n", "\r"):
        text = TEMPLATE.replace("\n", line_end)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
        assert chat_template.read(tmp_path) == (HASH, tmp_path / "tokenizer_config.json")
    (tmp_path / "chat_template.jinja").write_bytes(text.encode())
    assert chat_template.read(tmp_path) == (HASH, tmp_path / "chat_template.jinja")


@pytest.mark.parametrize("content", [None, {}, {"chat_template": None}])
def test_an_adapter_that_does_not_say_is_taken_and_that_is_said(tmp_path, content, tokenizer):
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    assert chat_template.read(tmp_path) is None
    assert chat_template.check(tmp_path, tokenizer).startswith("unknown")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template_hash.json", b"{", "not valid JSON"),
        ("chat_template_hash.json", b'{"sha": "x"}', "sha256 is None"),
        ("chat_template.jinja", b"\xff\xfe", "UTF-8"),
        ("tokenizer_config.json", b"[]", "JSON object"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template is 3; it must be a text"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', "it must be a text"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message, tokenizer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterError, match=message) as error:
        chat_template.check(tmp_path, tokenizer)
    assert name in str(error.value)

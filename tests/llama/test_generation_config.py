"""Where answers stop is the model's to say; how they are drawn is not."""

import json

import pytest
from transformers import GenerationConfig

from befm_jax.errors import UserError
from befm_jax.llama import generation_config


def write(directory, fields):
    (directory / "generation_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("ends", "expected"), [(2, (2,)), ([128001, 128008, 128009], (128001, 128008, 128009)),
                           (None, ()), ([], ())]
)  # fmt: skip
def test_one_end_or_several_are_all_read(tmp_path, ends, expected):
    write(tmp_path, {"eos_token_id": ends})
    assert generation_config.read(tmp_path).stop_ids == expected


def test_a_file_that_transformers_wrote_gives_its_ends_and_every_setting(tmp_path):
    settings = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20,
        "repetition_penalty": 1.1, "suppress_tokens": [3, 4], "max_new_tokens": 512,
    }  # fmt: skip
    GenerationConfig(
        **settings, eos_token_id=[7, 8], bos_token_id=1, pad_token_id=0
    ).save_pretrained(tmp_path)
    found = generation_config.read(tmp_path)
    assert found.stop_ids == (7, 8)
    assert found.ignored == settings


def test_a_setting_that_nobody_here_has_heard_of_is_listed_too(tmp_path):
    write(tmp_path, {"top_secret": 3, "min_p": 0.1, "typical_p": None, "bos_token_id": 1})
    assert generation_config.read(tmp_path).ignored == {"top_secret": 3, "min_p": 0.1}


def test_a_directory_without_the_file_says_nothing(tmp_path):
    assert generation_config.read(tmp_path) == generation_config.GenerationConfig()
    generation_config.copy(tmp_path, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[2]", "it must be a JSON object"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>'; it must be a token id or a list"),
        ('{"eos_token_id": [2, null]}', r"eos_token_id is \[2, None\]"),
        ('{"eos_token_id": true}', "eos_token_id is True"),
        ('{"eos_token_id": -1}', "eos_token_id is -1"),
        ('{"eos_token_id": 2.5}', "eos_token_id is 2.5"),
        (f'{{"eos_token_id": {10**30}}}', "eos_token_id is 1000"),
        ('{"temperature": NaN}', "not a finite number"),
        ('{"temperature": ' + "[" * 10**5, "nested too deeply"),
    ],
)
def test_a_damaged_file_is_named_with_its_field(tmp_path, content, message):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        generation_config.read(tmp_path)
    assert "generation_config.json" in str(error.value)

"""lm-evaluation-harness on this engine, against its own `hf` class on the same checkpoint."""

import json
import logging
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

# Read when `datasets` is imported: nothing here may reach for the network.
os.environ["HF_DATASETS_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import lm_eval
import lm_eval.models
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from befm_jax.adapters import lora, peft
from befm_jax.data import games
from befm_jax.errors import UserError
from befm_jax.inference import sample
from befm_jax.llama import hf
from befm_jax.llama.tokenizer import LLAMA3_SPECIAL, Tokenizer
from befm_jax.serving import lm_harness
from befm_jax.serving.lm_harness import BefmLM
from tests.helpers.parity import reference_model
from tests.helpers.small import game_tokenizer

ROOT = Path(__file__).resolve().parents[2]
COMMAND_CACHE = str(Path(tempfile.gettempdir()) / f"befm_jax_commands_{os.getuid()}")
BOS, END_OF_TEXT, HEADER = LLAMA3_SPECIAL[0], LLAMA3_SPECIAL[1], LLAMA3_SPECIAL[2]
# Short enough that contexts are cut and long texts need several windows.
MAX_LENGTH = 320
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
fewshot_split: test
num_fewshot: 1
metric_list:
  - metric: acc
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
""",
    "tiny_generation": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{options[0]}}"
generation_kwargs:
  until: ["5", "the"]
  max_gen_toks: 40
metric_list:
  - metric: exact_match
""",
}
QUESTIONS = [
    *(games.get(name).user[:200] for name in games.ids()),
    "Say ",
    f"A question with {LLAMA3_SPECIAL[-1]} in it",
    "naïve — 猫 🐈\n",
    games.get(games.ids()[0]).user * 3,
]
OPTIONS = ["yes", "no, never", " [50]", "[5]", "the whole of it\n\n", "猫", "yes"]


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_torch():
    """A model this small is slower on several threads, by far where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model of transformers' own, with a tokenizer that begins texts with BOS."""
    directory = tmp_path_factory.mktemp("checkpoint")
    game_tokenizer().save(directory)
    tokenizer = Tokenizer.load(directory)
    tokenizer.hugging_face.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.bos_id)]
    )
    tokenizer.save(directory)
    model = reference_model(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, head_dim=32,
        max_position_embeddings=1024, initializer_range=0.2, bos_token_id=tokenizer.bos_id,
        eos_token_id=list(tokenizer.stop_ids),
    )  # fmt: skip
    with torch.no_grad():
        # Special tokens that come up: ends of an answer, and one that is only a stop string.
        often = [*tokenizer.stop_ids, tokenizer.hugging_face.convert_tokens_to_ids(HEADER)]
        model.lm_head.weight[often] *= 2
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """A used adapter: its B is not zero any more."""
    directory = tmp_path_factory.mktemp("adapter")
    _, params = hf.load(checkpoint)
    made = lora.init(jax.random.key(0), params, rank=4)
    noise = np.random.default_rng(0)
    for weight in made.weights.values():
        weight["b"] = jnp.asarray(0.2 * noise.standard_normal(weight["b"].shape), jnp.float32)
    peft.save(directory, made, str(checkpoint))
    return directory


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files, and the documents that they name, as a user would write them."""
    directory = tmp_path_factory.mktemp("tasks")
    documents = directory / "documents.jsonl"
    with documents.open("w", encoding="utf-8") as file:
        for number, question in enumerate(QUESTIONS):
            options = OPTIONS[: 2 + number % 6]
            row = {"question": question, "options": options, "answer": 0, "text": question * 3}
            file.write(json.dumps(row) + "\n")
    for name, body in TASKS.items():
        head = {"data_files": {"test": str(documents)}, "cache_dir": str(directory / "cache")}
        (directory / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {json.dumps(head)}\n{body}",
            encoding="utf-8",
        )
    return directory


@pytest.fixture(scope="module")
def ours(checkpoint):
    return BefmLM(str(checkpoint), max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    return HFLM(str(checkpoint), max_length=MAX_LENGTH, device="cpu", dtype="float32")


@pytest.fixture
def said(caplog):
    """What is logged, also after lm-eval has taken its logger away from pytest."""
    logger = logging.getLogger("lm_eval.befm_jax")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=number)
        for number, one in enumerate(arguments)
    ]


def assert_same_log_likelihoods(found, expected):
    """Equal to what float32 allows: `hf` adds a text's log-probabilities up in float32."""
    np.testing.assert_allclose(found, expected, atol=3e-5, rtol=2e-7)


@pytest.mark.parametrize(
    ("chat", "with_adapter"), [(False, False), (True, True)], ids=["plain", "chat, adapter"]
)
def test_every_sample_of_every_kind_of_task_is_that_of_hf(
    chat, with_adapter, checkpoint, adapter, tasks
):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def samples(model, **arguments):
        found = lm_eval.simple_evaluate(
            model=model,
            model_args={"pretrained": str(checkpoint), "max_length": MAX_LENGTH, **arguments},
            tasks=list(TASKS), task_manager=manager, apply_chat_template=chat,
            fewshot_as_multiturn=chat, log_samples=True, bootstrap_iters=0, batch_size=1,
            device="cpu",
        )  # fmt: skip
        return found["samples"]

    our = samples("befm_jax", **({"adapter": str(adapter)} if with_adapter else {}))
    their = samples("hf", dtype="float32", **({"peft": str(adapter)} if with_adapter else {}))
    for task in TASKS:
        assert len(our[task]) == len(QUESTIONS)
        for one, other in zip(our[task], their[task], strict=True):
            assert one["arguments"] == other["arguments"]
            found, expected = ([answer for (answer,) in side["resps"]] for side in (one, other))
            if task == "tiny_choice":
                assert_same_log_likelihoods([pair[0] for pair in found], [p[0] for p in expected])
                assert [pair[1] for pair in found] == [pair[1] for pair in expected]
            elif task == "tiny_rolling":
                assert_same_log_likelihoods(found, expected)
            else:
                assert found == expected
    generated = {sample["resps"][0][0] for sample in our["tiny_generation"]}
    assert len(generated) > 5


def beginnings(theirs, context, count=3):
    """What `hf` writes greedily after a context: its first one, two, ... tokens as texts."""
    ids = torch.tensor([theirs.tok_encode(context)])
    with torch.no_grad():
        written = theirs.model.generate(
            ids, do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0
        )[0, ids.shape[1] :]  # fmt: skip
    return [theirs.tok_decode(written[: end + 1]) for end in range(count)]


def pairs_of_every_kind(theirs):
    short = QUESTIONS[0][:60]
    contexts = ["", "Say ", "trailing  \n", f"{BOS}twice?", f"a {HEADER} b", short, QUESTIONS[-1]]
    pairs = [(context, option) for context in contexts for option in OPTIONS]
    pairs += [(context, text) for context in (short, "Say", "a b") for text in
              beginnings(theirs, context)]  # fmt: skip
    pairs += [("", f"{BOS}yes"), ("x", "y" * 200), (short, QUESTIONS[1])]
    pairs += pairs[3:9]
    random.Random(0).shuffle(pairs)
    return pairs


@pytest.mark.parametrize("batch_size", [1, 5, "auto"])
def test_log_likelihoods_of_every_kind_of_pair_are_those_of_hf(batch_size, checkpoint, theirs):
    pairs = pairs_of_every_kind(theirs)
    model = BefmLM(str(checkpoint), max_length=MAX_LENGTH, batch_size=batch_size)
    found = model.loglikelihood(requests("loglikelihood", pairs))
    expected = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert_same_log_likelihoods([pair[0] for pair in found], [pair[0] for pair in expected])
    assert [pair[1] for pair in found] == [pair[1] for pair in expected]
    assert 3 <= sum(greedy for _, greedy in found) <= len(found) / 2


def test_a_log_likelihood_does_not_move_a_bit_with_order_and_company(ours, theirs):
    pairs = pairs_of_every_kind(theirs)
    together = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    backwards = ours.loglikelihood(requests("loglikelihood", pairs[::-1]), disable_tqdm=True)
    assert backwards[::-1] == together
    # A question is its context with all its options: they are one tree.
    context = QUESTIONS[0][:60]
    alone = [pair for pair in pairs if pair[0] == context]
    found = ours.loglikelihood(requests("loglikelihood", alone), disable_tqdm=True)
    assert found == [answer for pair, answer in zip(pairs, together, strict=True) if pair in alone]


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("tokenizer_adds_bos", [True, False])
def test_texts_become_the_tokens_of_hf(add_bos_token, tokenizer_adds_bos, checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    if not tokenizer_adds_bos:
        for file in tmp_path.glob("*token*"):
            file.unlink()
        game_tokenizer().save(tmp_path)
    our = BefmLM(str(tmp_path), add_bos_token=add_bos_token)
    their = HFLM(str(tmp_path), device="cpu", add_bos_token=add_bos_token)
    assert our.prefix_token_id == their.prefix_token_id
    assert our.eot_token_id == their.eot_token_id
    for text in (*QUESTIONS, "", " spaced ", f"{BOS}begun", f"{END_OF_TEXT}{BOS}"):
        assert our.tok_encode(text) == their.tok_encode(text)
        assert our.tok_encode(text, add_special_tokens=False) == their.tok_encode(
            text, add_special_tokens=False
        )
        if text:
            assert our._encode(text, text.startswith(BOS)) == (
                their.tok_batch_encode([text])[0][0].tolist()
            )


def test_another_prefix_token_is_that_of_hf(checkpoint):
    text = requests("loglikelihood_rolling", [(QUESTIONS[0][:200],)])
    found = BefmLM(str(checkpoint), prefix_token_id=7).loglikelihood_rolling(text)
    their = HFLM(str(checkpoint), device="cpu", prefix_token_id=7, dtype="float32")
    assert_same_log_likelihoods(found, their.loglikelihood_rolling(text))


@pytest.mark.parametrize("length", [7, 16])
def test_rolling_windows_of_any_length_are_those_of_hf(length, checkpoint):
    our = BefmLM(str(checkpoint), max_length=length, batch_size=4)
    their = HFLM(str(checkpoint), max_length=length, device="cpu", dtype="float32")
    ids = our.tok_encode(QUESTIONS[0])
    texts = [our.tokenizer.decode(ids[1 : 1 + size]) for size in range(1, 3 * length + 2)] + [""]
    arguments = requests("loglikelihood_rolling", [(text,) for text in texts])
    assert_same_log_likelihoods(
        our.loglikelihood_rolling(arguments, disable_tqdm=True),
        their.loglikelihood_rolling(arguments, disable_tqdm=True),
    )


GENERATIONS = [
    {},
    {"until": "5"},
    {"until": ["the", "a", "77"], "max_gen_toks": 100},
    {"until": [HEADER], "max_gen_toks": 100},
    {"until": ["", END_OF_TEXT], "max_new_tokens": 40},
    {"max_gen_toks": 1},
    {"temperature": 0.0, "do_sample": False, "num_beams": 1, "max_gen_toks": 40},
]


@pytest.mark.parametrize("arguments", GENERATIONS, ids=str)
def test_greedy_texts_are_those_of_hf(arguments, ours, theirs):
    contexts = [*QUESTIONS[:4], f"{BOS}begun", QUESTIONS[-1], QUESTIONS[0]]
    wanted = [(context, arguments) for context in contexts]
    found = ours.generate_until(requests("generate_until", wanted), disable_tqdm=True)
    # `hf` stops at an empty stop string and appends to the list that it is given.
    theirs_wanted = [
        (context, {**arguments, "until": [stop for stop in arguments.get("until", []) if stop]})
        for context in contexts
    ]
    expected = theirs.generate_until(requests("generate_until", theirs_wanted), disable_tqdm=True)
    assert found == expected
    assert len(set(found)) > 3


def test_stop_strings_that_straddle_tokens_are_found(ours, theirs):
    free = [(question, {"max_gen_toks": 100}) for question in QUESTIONS]
    texts = theirs.generate_until(requests("generate_until", free), disable_tqdm=True)
    whole, context = max(zip(texts, QUESTIONS, strict=True), key=lambda pair: len(pair[0]))
    assert len(whole) > 60
    stops = [whole[start : start + 4] for start in range(3, 45, 2)]
    wanted = requests(
        "generate_until", [(context, {"until": [stop], "max_gen_toks": 100}) for stop in stops]
    )
    found = ours.generate_until(wanted, disable_tqdm=True)
    assert found == [whole.split(stop)[0] for stop in stops]
    assert found == theirs.generate_until(wanted, disable_tqdm=True)


def test_a_short_answer_does_not_cost_all_the_steps_that_are_allowed(ours, monkeypatch):
    kept = []
    each_population = sample.each_population

    def watched(*arguments, **options):
        for number, draws in each_population(*arguments, **options):
            kept.append(draws)
            yield number, draws

    monkeypatch.setattr(sample, "each_population", watched)
    wanted = [(question, {}) for question in QUESTIONS]
    texts = ours.generate_until(requests("generate_until", wanted), disable_tqdm=True)
    whole, context = max(zip(texts, QUESTIONS, strict=True), key=lambda pair: len(pair[0]))
    kept.clear()
    ours.generate_until(requests("generate_until", [(context, {"until": whole[2:5]})]))
    filler = ours.simulator.tokenizer.stop_ids[0]
    assert kept[0].tokens.shape[1] == lm_harness.MAX_GEN_TOKS
    assert (kept[0].tokens[0, sample.LOOK_EVERY :] == filler).all()


@pytest.mark.parametrize("cache", ["full", "int8"])
def test_texts_written_together_are_those_written_one_by_one(cache, checkpoint, ours, theirs):
    """Greedy and drawn, with ends and limits of their own, some of them asked several times."""
    kinds = [
        {"max_gen_toks": 40},
        {"max_gen_toks": 40, "until": ["5", "the"]},
        {"max_gen_toks": 20, "temperature": 1.0},
    ]
    wanted = [(question, kind) for kind in kinds for question in QUESTIONS]
    wanted += [wanted[-1]] * 3
    together = BefmLM(str(checkpoint), max_length=MAX_LENGTH, batch_size=5, cache=cache)
    alone = BefmLM(str(checkpoint), max_length=MAX_LENGTH, cache=cache)
    found = together.generate_until(requests("generate_until", wanted), disable_tqdm=True)
    assert found == alone.generate_until(requests("generate_until", wanted), disable_tqdm=True)
    assert together.get_model_info()["model_cache"] == cache
    if cache == "full":
        greedy = [(context, dict(kind)) for context, kind in wanted[: 2 * len(QUESTIONS)]]
        expected = theirs.generate_until(requests("generate_until", greedy), disable_tqdm=True)
        assert found[: len(greedy)] == expected


def test_draws_differ_between_repeats_and_do_not_depend_on_company(checkpoint, ours):
    drawn = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    mine = [(QUESTIONS[0], drawn)] * 6
    others = [(question, drawn) for question in QUESTIONS[1:4]]
    alone = ours.generate_until(requests("generate_until", mine), disable_tqdm=True)
    together = ours.generate_until(
        requests("generate_until", [*others, *mine, (QUESTIONS[0], {"max_gen_toks": 12})]),
        disable_tqdm=True,
    )
    assert together[3:9] == alone
    assert len(set(alone)) == 6
    assert ours.generate_until(requests("generate_until", mine[:3]), disable_tqdm=True) == alone[:3]
    other_seed = BefmLM(str(checkpoint), max_length=MAX_LENGTH, seed=1)
    assert other_seed.generate_until(requests("generate_until", mine), disable_tqdm=True) != alone
    # The likeliest token alone is the greedy one; a temperature is enough to ask for draws.
    narrow = [(QUESTIONS[0], {"temperature": 0.7, "top_k": 1, "max_gen_toks": 12}),
              (QUESTIONS[0], {"temperature": 0.7, "top_p": 1e-6, "max_gen_toks": 12})]  # fmt: skip
    texts = ours.generate_until(requests("generate_until", narrow), disable_tqdm=True)
    assert texts == [together[9]] * 2


# Of few lengths, and short: what takes time over several devices is to compile.
CONTEXTS = ["Say ", "trailing  \n", *(f"{question[:40]}:" for question in QUESTIONS[:3])]


@pytest.fixture(params=[("no", "4"), ("int8", 4)], ids=["plain", "int8"])
def several_and_one(request, checkpoint):
    """The same model over four devices, which the command line may name as text, and on one."""
    quantize, devices = request.param
    both = [
        BefmLM(str(checkpoint), batch_size=5, quantize=quantize, devices=number)
        for number in (devices, 1)
    ]
    meshes = [model.get_model_info()["model_origin"]["mesh"] for model in both]
    assert meshes == ["data 2 x tensor 2", "one device"]
    for model, number in zip(both, (4, 1), strict=True):
        leaves = jax.tree.leaves(model.simulator.params)
        assert {leaf.sharding.num_devices for leaf in leaves} == {number}
    return both


def test_several_devices_score_as_one(several_and_one, theirs):
    pairs = [(context, option) for context in CONTEXTS for option in OPTIONS]
    pairs += [("Say", text) for text in beginnings(theirs, "Say")]
    pairs = requests("loglikelihood", pairs)
    found, expected = (model.loglikelihood(pairs, disable_tqdm=True) for model in several_and_one)
    np.testing.assert_allclose(
        [one[0] for one in found], [one[0] for one in expected], rtol=0, atol=1e-4
    )
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert any(greedy for _, greedy in found)
    texts = requests("loglikelihood_rolling", [(context,) for context in CONTEXTS])
    found, expected = (
        model.loglikelihood_rolling(texts, disable_tqdm=True) for model in several_and_one
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("several_and_one", [("no", 4)], indirect=True, ids=["plain"])
def test_several_devices_write_what_one_writes(several_and_one, monkeypatch):
    """Greedy and drawn; some are asked several times, some end on the way."""
    monkeypatch.setattr(sample, "LOOK_EVERY", 4)
    kinds = [{"max_gen_toks": 12, "until": ["5"]}, {"max_gen_toks": 12, "temperature": 1.0}]
    wanted = [(context, kind) for kind in kinds for context in CONTEXTS]
    wanted = requests("generate_until", wanted + [wanted[-1]] * 3)
    found, expected = (model.generate_until(wanted, disable_tqdm=True) for model in several_and_one)
    assert found == expected
    assert len(set(found)) > len(CONTEXTS) + 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty: not supported"),
        ({"num_beams": 4}, "num_beams: not supported"),
        ({"do_sample": True}, "temperature above 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "top_p": 2.0}, "top_p"),
        ({"temperature": "warm"}, "warm"),
        ({"max_gen_toks": 0}, "max_new_tokens"),
        ({"max_gen_toks": MAX_LENGTH}, "leave no tokens"),
        ({"until": [5]}, "until"),
        ({"until": 5}, "until"),
        (
            {"do_sample": "often", "temperature": 1.0},
            "do_sample is 'often'; it must be True or False",
        ),
    ],
)
def test_a_generation_argument_that_can_not_be_honoured_is_an_error(arguments, message, ours):
    with pytest.raises(UserError, match=message):
        ours.generate_until(requests("generate_until", [("Say", arguments)]))


def test_draws_that_nobody_asked_for_are_said(ours, said):
    wanted = [("Say", {"do_sample": False, "temperature": 1.0, "max_gen_toks": 2})]
    ours.generate_until(requests("generate_until", wanted))
    assert "{'temperature': 1.0} have no effect without do_sample" in said.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft": "somewhere"}, "takes no peft; it takes pretrained, adapter"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be one of auto, float32, bfloat16"),
        ({"cache": "int4"}, "cache is .int4.; it must be one of full, int8"),
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number of at least 1"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"max_length": 100_000}, "max_length is 100000; it must be at most 8192"),
        ({"max_length": 1025}, r"max_length is 1025; the model has 1024 positions \(max_posit"),
        ({"device": "cuda:1"}, "JAX runs on .* cpu"),
        ({"devices": 9}, "devices is 9; it must be 1 to 8"),
        ({"devices": 0}, "devices is 0; it must be a whole number"),
        ({"devices": 2.5}, "devices is 2.5; it must be a whole number"),
        ({"devices": float("inf")}, "devices is inf; it must be a whole number"),
        ({"devices": True}, "devices is True; it must be a whole number"),
        ({"devices": "all"}, "devices is 'all'; it must be a whole number"),
        ({"adapter": "nowhere"}, "nowhere"),
        ({"adapter": ""}, "an empty name.*no such adapter directory"),
        ({"pretrained": None}, "pretrained is missing"),
        ({"quantize": "int4"}, "quantize is 'int4'; it must be one of no, int8"),
        ({"force_template": "yes"}, "force_template is 'yes'; it must be True or False"),
        ({"enable_thinking": "yes"}, "enable_thinking is 'yes'; it must be True or False"),
        ({"chat_template_args": "x"}, "chat_template_args is 'x'; it must be a dictionary"),
        ({"force_base": 2}, "force_base is 2; it must be True or False"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'; it must be True or False"),
        ({"prefix_token_id": 10**6}, "prefix_token_id is 1000000; it must be a token id below"),
    ],
)
def test_a_model_argument_that_can_not_be_honoured_is_an_error(options, message, checkpoint):
    with pytest.raises((UserError, FileNotFoundError), match=message):
        BefmLM(**{"pretrained": str(checkpoint)} | options)


def test_what_lm_eval_passes_by_itself_is_taken(checkpoint, said):
    model = BefmLM(str(checkpoint), batch_size="auto:4", max_batch_size=6, device="cuda:0")
    assert model.batch_size == 6
    assert "JAX runs on" in said.text
    assert model.max_length == 1024
    assert BefmLM(str(checkpoint), device="cpu", dtype="auto").batch_size == 1
    assert get_model("hf") is HFLM


def test_contexts_that_are_cut_are_counted_and_said(checkpoint, said):
    model = BefmLM(str(checkpoint), max_length=20)
    pairs = [("word " * 30, "yes"), ("word " * 30, "no"), ("short", "yes")]
    length = len(model.tok_encode(("word " * 30).rstrip()))
    found = model.loglikelihood(requests("loglikelihood", pairs))
    model.generate_until(requests("generate_until", [(pairs[0][0], {"max_gen_toks": 5})] * 2))
    lost = sum(length + len(model._encode_pair(*pair)[1]) - 21 for pair in pairs[:2])
    assert "2 of 3 contexts were too long for max_length=20" in said.text
    assert f"truncated from the left, {lost}" in said.text
    cut = model.get_model_info()["contexts_cut"]
    assert cut["loglikelihood"] == {"requests": 3, "cut": 2, "tokens_cut": lost}
    assert cut["generate_until"]["cut"] == 2
    assert json.dumps(model.get_model_info())
    assert all(log_prob < 0 for log_prob, _ in found)


def test_continuations_that_can_not_be_scored_are_an_error(checkpoint):
    model = BefmLM(str(checkpoint), max_length=20)
    with pytest.raises(UserError, match="no token of its own"):
        model.loglikelihood(requests("loglikelihood", [("Say", "")]))
    with pytest.raises(UserError, match="more than max_length=20"):
        model.loglikelihood(requests("loglikelihood", [("Say", " yes" * 30)]))


def with_template(checkpoint, directory, template):
    for file in checkpoint.iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.jinja").write_text(template)
    return BefmLM(str(directory))


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": f"Hello {END_OF_TEXT}"},
    {"role": "assistant", "content": "Yes"},
]


def test_conversations_are_rendered_as_hf_renders_them(ours, theirs):
    for last, open_ended in ((2, True), (3, False)):
        assert ours.apply_chat_template(CONVERSATION[:last], open_ended) == (
            theirs.apply_chat_template(CONVERSATION[:last], open_ended)
        )
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tokenizer_name == theirs.tokenizer_name


def test_a_template_that_prints_the_day_prints_the_same_one_every_day(checkpoint, tmp_path):
    template = (
        "{{ bos_token }}{% if not date_string is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
        "{% for message in messages %}{{ message['content'] }}<|eot_id|>{% endfor %}"
    )
    model = with_template(checkpoint, tmp_path, template)
    assert model.apply_chat_template(CONVERSATION[1:2]).startswith(f"{BOS}26 Jul 2024Hello")


def test_a_template_without_system_messages_has_them_before_the_users_as_in_training(
    checkpoint, tmp_path
):
    template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}"
        "{{ message['content'] }}<|eot_id|>{% endfor %}"
    )
    model = with_template(checkpoint, tmp_path, template)
    asked = f"{BOS}Be brief.\n\nHello {END_OF_TEXT}<|eot_id|>"
    assert model.apply_chat_template(CONVERSATION[:2]) == asked
    assert "no system role" in model.get_model_info()["model_origin"]["chat_template"]["system"]


def test_thinking_and_other_variables_of_a_template_are_those_of_hf(checkpoint, tmp_path):
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ tone or '' }}"
    )
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").unlink()
    # What the answer of the whole conversation begins with.
    (tmp_path / "chat_template.jinja").write_text(
        template.replace("{{ m.content }}", "{{ ('<think>\n\n</think>\n\n' if loop.last and "
                         "m.role == 'assistant' else '') + m.content }}")
    )  # fmt: skip
    for options in (
        {},
        {"enable_thinking": False},
        {"enable_thinking": True},
        {"chat_template_args": {"tone": "calm"}},
        {"chat_template_args": {"enable_thinking": True}, "enable_thinking": False},
    ):
        ours = BefmLM(str(tmp_path), **options)
        thinks = {"think_end_token": "</think>"} if options.get("enable_thinking") else {}
        theirs = HFLM(str(tmp_path), device="cpu", **options, **thinks)
        assert ours.apply_chat_template(CONVERSATION[1:2]) == (
            theirs.apply_chat_template(CONVERSATION[1:2])
        )
    prompt = BefmLM(str(tmp_path), enable_thinking=False).apply_chat_template(CONVERSATION[1:2])
    assert prompt.endswith("<think>\n\n</think>\n\n")


def command(*arguments):
    environment = os.environ | {
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("BEFM_TEST_CACHE", COMMAND_CACHE),
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_command_runs_tasks_and_writes_what_it_found(checkpoint, adapter, tasks, tmp_path):
    ran = command(
        "-m", "befm_jax.lm_harness", "--model", "befm_jax",
        "--model_args", f"pretrained={checkpoint},adapter={adapter},dtype=float32,max_length=320",
        "--tasks", "tiny_choice", "--include_path", tasks, "--batch_size", "4",
        "--output_path", tmp_path / "scored",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "|tiny_choice|" in ran.stdout
    (file,) = (tmp_path / "scored").rglob("results*.json")
    results = json.loads(file.read_text())
    assert 0 <= results["results"]["tiny_choice"]["acc,none"] <= 1
    assert results["config"]["model_origin"]["adapter"] == str(adapter)
    assert results["config"]["contexts_cut"]["loglikelihood"]["cut"] > 0


def test_a_mistake_on_the_command_line_is_answered_in_one_line(tasks, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv",
        ["lm_harness", "--model", "befm_jax", "--model_args", "pretrained=/nowhere",
         "--tasks", "tiny_choice", "--include_path", str(tasks)],
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        lm_harness.main()
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: /nowhere: no such model directory, nor a hub id")


def test_what_lm_eval_complains_of_is_answered_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: get_model("befm_jex"))
    with pytest.raises(SystemExit):
        lm_harness.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Attempted to load model 'befm_jex'")
    assert ", hf" in line


def test_a_fault_of_ours_keeps_its_stack_trace(monkeypatch):
    def broken():
        raise ValueError("ours")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", broken)
    with pytest.raises(ValueError, match="ours"):
        lm_harness.main()


def test_without_the_extra_the_command_says_what_to_install():
    program = (
        "import runpy, sys; sys.modules['lm_eval'] = None; "
        "runpy.run_module('befm_jax.lm_harness', run_name='__main__')"
    )
    ran = command("-c", program)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == (
        "error: lm-evaluation-harness is not installed: pip install 'befm_jax[lm-eval]'"
    )

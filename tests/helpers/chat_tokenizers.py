"""Byte-level BPE tokenizers in the manner of Llama 3 and of Qwen3, and templates with their traits.

Each comes with a plain tokenizer of the same pieces that has never heard of a special token: what
a text is to it, is what the text is.
"""

from functools import lru_cache

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from befm_jax.data import games

GAMES = [games.get(name) for name in games.ids()]
TEXTS = [
    text
    for game in GAMES
    for text in (*(message.text for message in game.prompt()), game.answers.written[1])
]

# How the two families cut a text before they join bytes; they differ in numbers.
_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
QWEN3_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Added to Qwen3's vocabulary, but not marked as special.
QWEN3_MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")

# A system message in any case, with dates; tools; every message trimmed.
LLAMA31 = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- set told = "" %}
{%- if messages[0].role == "system" %}
    {%- set told = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Knowledge ends: December 2023\\nToday: " + date_string + "\\n\\n" + told + "<|eot_id|>" }}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}
    {{- message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
# No BOS; messages as they are; the last answer has an empty thought before it, and so has the
# prompt if thinking is off; a line end behind every turn.
QWEN3 = """
{%- set ns = namespace(asked=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.asked = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\\n" }}
    {%- if message.role != "assistant" %}
        {{- message.content }}
    {%- else %}
        {%- set thought, said = "", message.content %}
        {%- if "</think>" in said %}
            {%- set thought = said.split("</think>")[0].split("<think>")[-1].strip("\\n") %}
            {%- set said = said.split("</think>")[-1] %}
        {%- endif %}
        {%- if loop.index0 > ns.asked and loop.last %}
            {{- "<think>\\n" + thought + "\\n</think>\\n\\n" + said.lstrip("\\n") }}
        {%- else %}
            {{- said }}
        {%- endif %}
    {%- endif %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\\n\\n</think>\\n\\n" }}
    {%- endif %}
{%- endif %}
"""


@lru_cache
def _learnt(digits: str) -> str:
    """A byte-level BPE of the games' texts, without any special token, in `tokenizers`' JSON."""
    learnt = FastTokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUTS.format(digits=digits)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learnt.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learnt.train_from_iterator([*TEXTS, *["\n\n"] * 50], trainer)
    return learnt.to_str()


def llama3(template: str = LLAMA31, puts_bos: bool = True, **options):
    """Llama 3's manner: `(tokenizer for transformers, plain tokenizer)`.  There is no pad token."""
    fast = FastTokenizer.from_str(_learnt("{1,3}"))
    fast.add_special_tokens([AddedToken(name, normalized=False) for name in LLAMA3_TOKENS])
    if puts_bos:
        bos = LLAMA3_TOKENS[0]
        fast.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, fast.token_to_id(bos))]
        )
    options = {"bos_token": LLAMA3_TOKENS[0], "eos_token": "<|eot_id|>"} | options
    backend = PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=template, **options)
    return backend, FastTokenizer.from_str(_learnt("{1,3}"))


def qwen3(template: str = QWEN3, **options):
    """Qwen3's manner: no BOS, markers that are not special."""
    fast = FastTokenizer.from_str(_learnt(""))
    fast.add_special_tokens([AddedToken(name, normalized=False) for name in QWEN3_TOKENS])
    fast.add_tokens([AddedToken(name, normalized=False) for name in QWEN3_MARKERS])
    options = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | options
    backend = PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=template, **options)
    return backend, FastTokenizer.from_str(_learnt(""))

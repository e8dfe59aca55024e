"""Text to token ids and back, with one chat layout for training, scoring and sampling.

Special tokens enter by id, from the chat template alone.  A message's text is always encoded as
ordinary text: a `<|eot_id|>` typed by a survey respondent stays ten characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from befm_jax.errors import UserError

# Llama 3's chat layout, for checkpoints that ship none (base models and our own tiny ones).
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
)  # fmt: skip
# Some templates print the day; the day must not change what a model is asked.  This is the value
# that Llama 3.1's own template falls back on.
_DATE = "26 Jul 2024"
# Stand-ins for the messages while a template is rendered: private-use characters, in no real text.
_SYSTEM, _USER, _ANSWER = "\ue000\ue001", "\ue000\ue002", "\ue000\ue003"


class TemplateError(UserError):
    """A chat template that this layout can't be taken from."""


class Tokenizer:
    """A Hugging Face fast tokenizer and its chat template.

    `end_of_turn` is the id that the template puts behind an answer; `stop_ids` are all ids that
    end one.
    """

    def __init__(self, backend: PreTrainedTokenizerFast, more_stop_ids: Iterable[int] = ()) -> None:
        if backend.chat_template is None:
            absent = [token for token in LLAMA3_SPECIAL if token not in backend.get_vocab()]
            if absent:
                raise TemplateError(
                    f"the tokenizer has no chat template, and not Llama 3's {', '.join(absent)}"
                )
            backend.chat_template = LLAMA3_TEMPLATE
        self._backend = backend
        added = backend.added_tokens_decoder
        self._special = {str(token): index for index, token in added.items() if token.special}
        self._split = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")
        after_answer = self._skeleton(with_system=False, with_answer=True).split(_ANSWER)[-1]
        ends = [part for part in self._split.split(after_answer) if part in self._special]
        if not ends:
            raise TemplateError("the chat template puts no special token behind an answer")
        self.end_of_turn = self._special[ends[0]]
        eos = [] if backend.eos_token_id is None else [backend.eos_token_id]
        self.stop_ids = tuple(sorted({self.end_of_turn, *eos, *more_stop_ids}))
        self._layout = lru_cache(maxsize=4)(self._skeleton)

    @classmethod
    def load(cls, directory: str | Path, more_stop_ids: Iterable[int] = ()) -> Tokenizer:
        """The tokenizer of a local Hugging Face directory (`tokenizer.json`).

        Raises:
            FileNotFoundError: the directory has no tokenizer.
            TemplateError: a damaged tokenizer, or no usable chat template.
        """
        if not (Path(directory) / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{directory}: no tokenizer.json")
        try:
            backend: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # whatever the library stumbles over in a damaged file
            raise TemplateError(f"{directory}: the tokenizer can't be read ({error!r})") from error
        return cls(backend, more_stop_ids)

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's files into a directory, for `load` and for transformers."""
        self._backend.save_pretrained(str(directory))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return len(self._backend)

    @property
    def bos_id(self) -> int | None:
        """The id that every conversation begins with, if the tokenizer has one."""
        bos: int | None = self._backend.bos_token_id
        return bos

    @property
    def hugging_face(self) -> PreTrainedTokenizerFast:
        """The Hugging Face tokenizer beneath, for programs that have conventions of their own."""
        return self._backend

    def render(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """The chat template's text of a conversation, special tokens written by their names.

        `options` are those of transformers' `apply_chat_template`.  Raises jinja2.TemplateError
        where the template refuses the conversation.
        """
        rendered: Any = self._backend.apply_chat_template(
            [dict(one) for one in messages], tokenize=False, date_string=_DATE, **options
        )
        return str(rendered)

    def prompt(self, system: str, user: str) -> tuple[int, ...]:
        """Ids of a conversation up to where the answer begins: exactly one BOS, at the start.

        An empty `system` leaves the system message out.  White space around a message is dropped,
        as Llama's own templates do.
        """
        layout = self._layout(bool(system.strip()), False)
        return tuple(self._fill(layout, {_SYSTEM: system.strip(), _USER: user.strip()}))

    def answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer and its end-of-turn token: what is learnt and scored."""
        return (*self._ordinary(text.strip()), self.end_of_turn)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def _skeleton(self, with_system: bool, with_answer: bool) -> str:
        """The template's own text, with stand-ins where the messages go."""
        messages = [{"role": "user", "content": _USER}]
        if with_system:
            messages.insert(0, {"role": "system", "content": _SYSTEM})
        if with_answer:
            messages.append({"role": "assistant", "content": _ANSWER})
        try:
            text = self.render(messages, add_generation_prompt=not with_answer)
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise TemplateError(f"the chat template refuses {roles}: {error}") from error
        expected = [_USER] + [_SYSTEM] * with_system + [_ANSWER] * with_answer
        for mark in expected:
            if text.count(mark) != 1:
                raise TemplateError("the chat template doesn't render every message exactly once")
        bos = self._backend.bos_token
        if bos is not None and text.count(bos) > 1:
            raise TemplateError(f"the chat template writes {bos} more than once")
        if bos is not None and not text.startswith(bos):
            text = bos + text
        return text

    def _fill(self, layout: str, messages: dict[str, str]) -> list[int]:
        """Encodes a skeleton with the messages in place; a special token is always a boundary."""
        ids: list[int] = []
        for part in self._split.split(layout):
            if part in self._special:
                ids.append(self._special[part])
                continue
            filled = re.sub("|".join(messages), lambda mark: messages[mark[0]], part)
            ids.extend(self._ordinary(filled))
        return ids

    def _ordinary(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = self._backend.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        return ids

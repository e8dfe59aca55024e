"""Text to token ids and back, with one chat layout for training, scoring and sampling.

The layout is the model's own chat template, rendered with stand-ins for the messages.  Special
tokens enter by id, from the template alone.  A message's text is opaque: it is always encoded as
ordinary text, so a `<|eot_id|>` typed by a survey respondent stays ten characters, and a template
that would act on a text (Qwen3's looks for `</think>` in answers) does not see it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
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
# that Llama 3.1's own template falls back on, in the place of transformers' clock.
_NO_CLOCK = "{%- macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"
# Stand-ins for the messages while a template is rendered: private-use characters, in no real text.
_MARKS = {"system": "\ue000\ue001", "user": "\ue000\ue002", "assistant": "\ue000\ue003"}
_ROLES = {mark: role for role, mark in _MARKS.items()}
_MARK = re.compile("|".join(_ROLES))
_GIVEN = ("system", "user")
_WORD = re.compile(r"[\w\s]+")
# Real texts in their place, to hold the ids against those of transformers: letters of both cases,
# digits, and what a template might escape.
_PROBES = {
    "system": "Play fair & be kind.",
    "user": "Don't you <want> 10 {coins}?",
    "assistant": "[Yes], 7",
}


class TemplateError(UserError):
    """A chat template, or a text, that does not give the ids that the whole conversation has."""


class _Text(NamedTuple):
    """A message: its white space before and after, which templates treat each in its own way."""

    before: str
    core: str
    after: str

    @classmethod
    def of(cls, text: str) -> _Text:
        core = text.strip()
        if not core:
            return cls("", "", "")
        start = len(text) - len(text.lstrip())
        return cls(text[:start], core, text[start + len(core) :])

    def around(self, core: str) -> str:
        """Another core in the same white space."""
        return self.before + core + self.after

    @property
    def space(self) -> _Text:
        """The white space alone."""
        return self._replace(core="")


_EMPTY = _Text("", "", "")


@dataclass(frozen=True)
class _Layout:
    """What a template writes, with stand-ins for the messages.

    `prompt`: up to where the answer begins; `header`: what of it stands behind the last special
    token or message; `answer`: on to the end of the turn; `end`: the token that ends it; `rest`:
    what follows in a whole conversation, and is not learnt.
    """

    prompt: str
    header: str
    answer: str
    end: str
    rest: str


class Tokenizer:
    """A Hugging Face fast tokenizer and its chat template.

    `end_of_turn` is the id that the template puts behind an answer; `stop_ids` are all ids that
    end one; `template_hash` tells templates apart.

    For every text that holds no special token, `prompt(...) + answer(...)` is what transformers'
    `apply_chat_template` gives for the whole conversation (with `enable_thinking=False` and the
    day fixed), up to the end of the answer's turn.  A template for which that does not hold is
    refused.
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
        try:
            self._template = str(backend.get_chat_template())
        except ValueError as error:
            raise TemplateError(f"no chat template is the default one: {error}") from error
        self._special = _control_tokens(backend, self._template)
        self._rendered = (_NO_CLOCK if "strftime_now" in self._template else "") + self._template
        # The longest first, as the tokenizer itself takes them.
        names = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self._inside, self._at_start = _text_encoders(backend, self._special)
        # A BOS that the template leaves to the tokenizer, which puts one before every text.
        bos = backend.bos_token_id
        self._puts_bos = bos is not None and backend("a")["input_ids"][:1] == [bos]
        self._layout = lru_cache(maxsize=64)(self._checked_layout)
        self._usual = self._layout(None, _EMPTY, _EMPTY)
        self.end_of_turn = self._special[self._usual.end]
        eos = [] if backend.eos_token_id is None else [backend.eos_token_id]
        self.stop_ids = tuple(sorted({self.end_of_turn, *eos, *more_stop_ids}))

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
            backend: Any = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever the library stumbles over in a damaged file
            raise TemplateError(f"{directory}: the tokenizer can't be read ({error!r})") from error
        try:
            return cls(backend, more_stop_ids)
        except TemplateError as error:
            raise TemplateError(f"{directory}: {error}") from error

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's files into a directory, for `load` and for transformers."""
        self._backend.save_pretrained(str(directory))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return len(self._backend)

    @property
    def bos_id(self) -> int | None:
        """The tokenizer's BOS, if it has one."""
        bos: int | None = self._backend.bos_token_id
        return bos

    @property
    def template_hash(self) -> str:
        """What `hash_of` says of the chat template that is used."""
        return hash_of(self._template)

    @property
    def hugging_face(self) -> PreTrainedTokenizerFast:
        """The Hugging Face tokenizer beneath, for programs that have conventions of their own."""
        return self._backend

    def render(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """The chat template's text of a conversation, special tokens written by their names.

        `options` are those of transformers' `apply_chat_template`; the day is fixed.  Raises what
        the template raises where it refuses the conversation (jinja2.TemplateError, most often).
        """
        rendered: Any = self._backend.apply_chat_template(
            [dict(one) for one in messages],
            chat_template=self._rendered,
            tokenize=False,
            **options,
        )
        return str(rendered)

    def prompt(self, system: str, user: str) -> tuple[int, ...]:
        """Ids of a conversation up to where the answer begins, with one BOS if the model has one.

        An empty `system` leaves the system message out.  White space around a message is kept or
        dropped as the template does it: Llama's drop it, Qwen's keep it.

        Raises TemplateError where the template refuses these messages.
        """
        told, asked = _Text.of(system), _Text.of(user)
        layout = self._layout(told.space if told.core else None, asked.space, _EMPTY)
        usual = self._usual
        if (layout.header, layout.answer, layout.end) != (usual.header, usual.answer, usual.end):
            raise TemplateError("the chat template writes an answer otherwise after these messages")
        return tuple(self._start(layout.prompt, {"system": told.core, "user": asked.core}))

    def answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer and its end-of-turn token: what is learnt and scored.

        Raises TemplateError where the answer's first characters would be one token with the last
        of the prompt.
        """
        given = _Text.of(text)
        try:
            layout = self._layout(None, _EMPTY, given.space)
            return (*self._continued(layout, given.core), self._special[layout.end])
        except TemplateError as error:
            raise TemplateError(f"the answer {text[:40]!r}: {error}") from error

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of ids; special tokens are left out, or written out where `special` is true."""
        return str(
            self._backend.decode(
                list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )
        )

    def _checked_layout(self, system: _Text | None, user: _Text, answer: _Text) -> _Layout:
        """What the template writes around messages in such white space (their cores are empty).

        Raises TemplateError where prompt and answer would not be the whole conversation's ids.
        """
        said = {"user": user, "assistant": answer}
        if system is not None:
            said = {"system": system, **said}
        marked = {role: text.around(_MARKS[role]) for role, text in said.items()}
        prompt, whole = self._render(marked, answered=False), self._render(marked, answered=True)
        for role in said:
            if whole.count(_MARKS[role]) != 1 or prompt.count(_MARKS[role]) != (role in _GIVEN):
                raise TemplateError("the chat template doesn't render every message exactly once")
        self._check_bos(whole)
        if not whole.startswith(prompt):
            raise TemplateError(
                "the chat template asks for an answer otherwise than it writes one: "
                + _parting(prompt, whole)
            )
        after = whole[len(prompt) :]
        end = self._split.search(after, after.index(_MARKS["assistant"]))
        if end is None:
            raise TemplateError("the chat template puts no special token behind an answer")
        header = _MARK.split(self._split.split(prompt)[-1])[-1]
        layout = _Layout(prompt, header, after[: end.start()], end[0], after[end.end() :])
        self._check_ids(layout, said)
        return layout

    def _render(self, messages: Mapping[str, str], answered: bool) -> str:
        """The template's text for one message a role, up to the answer or with it."""
        said = [
            {"role": role, "content": text}
            for role, text in messages.items()
            if answered or role in _GIVEN
        ]
        try:
            return self.render(
                said,
                add_generation_prompt=not answered,
                enable_thinking=False,  # Qwen3 would reason before it answers
            )
        except Exception as error:  # a template is a program, and may stumble over anything
            roles = ", ".join(message["role"] for message in said)
            raise TemplateError(f"the chat template refuses {roles}: {error}") from error

    def _check_bos(self, whole: str) -> None:
        bos = self._backend.bos_token
        if bos is None or bos not in whole:
            return
        # SmolLM's BOS is also what opens every message: <|im_start|>user.
        opens_messages = whole.count(bos) == sum(whole.count(bos + role) for role in _MARKS)
        if not whole.startswith(bos) or (whole.count(bos) > 1 and not opens_messages):
            raise TemplateError(f"the chat template writes {bos} more than once, or not first")

    def _check_ids(self, layout: _Layout, said: Mapping[str, _Text]) -> None:
        """Holds prompt and answer, with real texts, against the whole conversation at once."""
        probes = {role: text.around(_PROBES[role]) for role, text in said.items()}
        whole = self._render(probes, answered=True)
        theirs = list(
            self._backend(whole, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        )
        if self._puts_bos and theirs[:1] != [self.bos_id]:
            theirs.insert(0, self.bos_id)
        ours = [
            *self._start(layout.prompt, _PROBES),
            *self._continued(layout, _PROBES["assistant"]),
            self._special[layout.end],
            *self._fill(layout.rest, _PROBES),
        ]
        if ours != theirs:
            raise TemplateError(
                "prompt and answer are not what the chat template makes of the whole "
                f"conversation: {self._difference(ours, theirs)}"
            )

    def _continued(self, layout: _Layout, answer: str) -> list[int]:
        """Ids of an answer as it goes on from the prompt, without the end of the turn."""
        cores = {"assistant": answer}
        header = self._fill(layout.header, cores)
        joined = self._fill(layout.header + layout.answer, cores)
        if joined[: len(header)] != header:
            begins = _MARK.sub(lambda _: answer, layout.answer)[:8]
            raise TemplateError(
                f"with this chat template a prompt ends in {layout.header!r}, and that and "
                f"{begins!r} after it are cut into tokens that belong to both"
            )
        return joined[len(header) :]

    def _difference(self, ours: Sequence[int], theirs: Sequence[int]) -> str:
        """Where two lists of ids part, in words."""
        same = _same(ours, theirs)
        one, other = (self.decode(ids[same : same + 4], special=True) for ids in (ours, theirs))
        return (
            f"after {self.decode(ours[max(0, same - 4) : same], special=True)!r}, {one!r} "
            f"{list(ours[same : same + 4])} here, {other!r} {list(theirs[same : same + 4])} there"
        )

    def _start(self, layout: str, messages: Mapping[str, str]) -> list[int]:
        """Encodes a layout that a conversation begins with."""
        ids = self._fill(layout, messages, at_start=True)
        if self._puts_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self._special[str(self._backend.bos_token)])
        return ids

    def _fill(self, layout: str, messages: Mapping[str, str], at_start: bool = False) -> list[int]:
        """Encodes a layout with the messages in place; a special token is always a boundary."""
        ids: list[int] = []
        for part in self._split.split(layout):
            if part in self._special:
                ids.append(self._special[part])
            else:
                filled = _MARK.sub(lambda mark: messages[_ROLES[mark[0]]], part)
                ids.extend(self._ordinary(filled, at_start and not ids))
        return ids

    def _ordinary(self, text: str, at_start: bool = False) -> list[int]:
        """Ids of a text in which nothing is a special token."""
        encoder = self._at_start if at_start else self._inside
        ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        return ids


def hash_of(template: str) -> str:
    """A chat template's SHA-256 in hex, of its text in UTF-8 with line ends as on Unix."""
    return hashlib.sha256(re.sub("\r\n?", "\n", template).encode()).hexdigest()


def _control_tokens(backend: PreTrainedTokenizerFast, template: str) -> dict[str, int]:
    """The tokens, with their ids, that only a template may write.

    Those marked special, and added ones that occur in the template and are no word: Qwen3 has
    `<think>` among its added tokens without marking it.
    """
    return {
        token.content: index
        for index, token in backend.added_tokens_decoder.items()
        if token.special or (token.content in template and not _WORD.fullmatch(token.content))
    }


def _text_encoders(
    backend: PreTrainedTokenizerFast, control: Iterable[str]
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Copies of the tokenizer that take no control token for one: for texts inside, at the start.

    They differ where the tokenizer puts a space before the beginning of a conversation alone
    (Llama 2's does).
    """
    written = backend.backend_tokenizer.to_str()
    at_start = _text_encoder(written, control)
    inside = written.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
    return at_start if inside == written else _text_encoder(inside, control), at_start


def _text_encoder(written: str, control: Iterable[str]) -> tokenizers.Tokenizer:
    encoder = tokenizers.Tokenizer.from_str(written)
    encoder.no_truncation()
    encoder.no_padding()
    # What is already there keeps its id; it is only marked, and what is marked is split.
    encoder.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in control])
    encoder.encode_special_tokens = True
    return encoder


def _same(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _parting(prompt: str, whole: str) -> str:
    """Where a prompt leaves the conversation that it should begin, in words."""
    same = _same(prompt, whole)
    asked, written = prompt[same : same + 40], _MARK.sub("(message)", whole[same : same + 40])
    before = _MARK.sub("(message)", prompt[max(0, same - 40) : same])
    return f"after {before!r} it asks with {asked!r} and writes {written!r}"

"""Text to token ids and back, with one chat layout for training, scoring and sampling.

The layout is the model's own chat template, rendered with placeholders for the messages, of which
there may be any number.  Special tokens enter by id, from the template alone.  A message's text is
opaque: it is always encoded as ordinary text, so a `<|eot_id|>` typed by a survey respondent stays
ten characters, and a template that would act on a text (Qwen3's looks for `</think>` in answers)
does not see it.
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

from befm_jax.data.items import ROLES, Message
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
# Placeholders for the messages while a template is rendered: private-use characters, in no real
# text.  The number of the message is written with two of them, in base 4,096.
_FIRST, _BASE = 0xE100, 4096
_MARK = re.compile("\ue000([\ue100-\uf0ff])([\ue100-\uf0ff])")
_WORD = re.compile(r"[\w\s]+")
# Real texts in their place, to compare the ids with those of transformers: letters of both cases,
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

    role: str
    before: str
    core: str
    after: str

    @classmethod
    def of(cls, role: str, text: str) -> _Text:
        core = text.strip()
        if not core:
            return cls(role, "", "", "")
        start = len(text) - len(text.lstrip())
        return cls(role, text[:start], core, text[start + len(core) :])

    def around(self, core: str) -> dict[str, str]:
        """Another core in the same white space, as templates take a message."""
        return {"role": self.role, "content": self.before + core + self.after}

    @property
    def space(self) -> _Text:
        """The white space alone."""
        return self._replace(core="")


# The messages' texts, without white space around them, by number.
_Cores = Sequence[str] | Mapping[int, str]
_EMPTY = _Text("user", "", "", "")
_EMPTY_ANSWER = _EMPTY._replace(role="assistant")


@dataclass(frozen=True)
class _Layout:
    """What a template writes, with placeholders for the messages.

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
        self._conversation = lru_cache(maxsize=64)(self._checked_conversation)
        self._usual = self._layout((_EMPTY, _EMPTY_ANSWER))
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

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of a conversation up to where the answer begins, with one BOS if the model has one.

        A blank system message is left out.  White space around a message is kept or dropped as the
        template does it: Llama's drop it, Qwen's keep it.

        Raises TemplateError where the template refuses these messages.
        """
        texts = _texts(messages)
        layout = self._layout((*(text.space for text in texts), _EMPTY_ANSWER))
        usual = self._usual
        ours, theirs = ((one.header, _unmarked(one.answer), one.end) for one in (layout, usual))
        if ours != theirs:
            raise TemplateError("the chat template writes an answer otherwise after these messages")
        return tuple(self._start(layout.prompt, [text.core for text in texts]))

    def answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer and its end-of-turn token: what is learnt and scored.

        Raises TemplateError where the answer's first characters would be one token with the last
        of the prompt.
        """
        given = _Text.of("assistant", text)
        try:
            layout = self._layout((_EMPTY, given.space))
            return (*self._continued(layout, given.core), self._special[layout.end])
        except TemplateError as error:
            raise TemplateError(f"the answer {text[:40]!r}: {error}") from error

    def encode(
        self, messages: Sequence[Message], spans: Sequence[tuple[int, int, int]] = ()
    ) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Ids of a whole conversation, and where in them the learnt tokens are.

        `spans` are those of `data.items.Example`: `(message, start, stop)` by characters; where
        there are none the last message is learnt, as `prompt` and `answer` cut it.  A span begins
        and ends with a token: what is learnt never shares one with what is not.  One that reaches
        the end of an assistant's message goes on to the end of its turn.  White space that a
        message begins or ends with is given, except before a learnt end of turn.

        Returns the ids, which are those of transformers' `apply_chat_template` but for the cuts
        within a message, and `(start, stop)` of every span by tokens.

        Raises TemplateError where the template refuses the conversation, or would make one token of
        a message's beginning and what is before it.
        """
        if not spans:
            prompt, answer = self.prompt(messages[:-1]), self.answer(messages[-1].text)
            return prompt + answer, ((len(prompt), len(prompt) + len(answer)),)
        texts = _texts(messages)
        whole = self._conversation(tuple(text.space for text in texts))
        # Only a blank system message, the first, is left out.
        missing = len(messages) - len(texts)
        moved = [(number - missing, start, stop) for number, start, stop in spans]
        return self._cut(whole, texts, moved)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of ids; special tokens are left out, or written out where `special` is true."""
        return str(
            self._backend.decode(
                list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )
        )

    def _checked_layout(self, texts: tuple[_Text, ...]) -> _Layout:
        """What the template writes around messages in such white space (their cores are empty).

        The last is the answer.  Raises TemplateError where prompt and answer would not be the whole
        conversation's ids.
        """
        marked = [text.around(_mark(number)) for number, text in enumerate(texts)]
        prompt = self._render(marked[:-1], add_generation_prompt=True)
        whole = self._checked_whole(marked)
        if _numbers(prompt) != list(range(len(texts) - 1)):
            raise TemplateError("the chat template doesn't render every message exactly once")
        if not whole.startswith(prompt):
            raise TemplateError(
                "the chat template asks for an answer otherwise than it writes one: "
                + _parting(prompt, whole)
            )
        after = whole[len(prompt) :]
        end = self._split.search(after, after.index(_mark(len(texts) - 1)))
        if end is None:
            raise TemplateError("the chat template puts no special token behind an answer")
        header = _unmarked(self._split.split(prompt)[-1])[-1]
        layout = _Layout(prompt, header, after[: end.start()], end[0], after[end.end() :])
        cores = _probes(texts)
        ours = [
            *self._start(layout.prompt, cores),
            *self._continued(layout, cores[-1]),
            self._special[layout.end],
            *self._fill(layout.rest, cores),
        ]
        self._check_ids(ours, texts, cores, "prompt and answer are")
        return layout

    def _checked_conversation(self, texts: tuple[_Text, ...]) -> str:
        """What the template writes of a whole conversation, placeholders for its messages.

        Raises TemplateError where that is not the conversation's ids.
        """
        whole = self._checked_whole([text.around(_mark(at)) for at, text in enumerate(texts)])
        cores = _probes(texts)
        self._check_ids(self._start(whole, cores), texts, cores, "the messages one by one are")
        return whole

    def _checked_whole(self, marked: Sequence[Mapping[str, str]]) -> str:
        """A whole conversation's text; every message is in it once, and one BOS."""
        whole = self._render(marked, add_generation_prompt=False)
        if _numbers(whole) != list(range(len(marked))):
            raise TemplateError("the chat template doesn't render every message exactly once")
        bos = self._backend.bos_token
        if bos is not None and bos in whole:
            # SmolLM's BOS is also what opens every message: <|im_start|>user.
            opening = sum(whole.count(bos + role) for role in ROLES)
            if not whole.startswith(bos) or (whole.count(bos) > 1 and whole.count(bos) != opening):
                raise TemplateError(f"the chat template writes {bos} more than once, or not first")
        return whole

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The template's text of a conversation."""
        try:
            return self.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=False,  # Qwen3 would reason before it answers
            )
        except Exception as error:  # a template is a program, and may stumble over anything
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise TemplateError(f"the chat template refuses {roles}: {error}") from error

    def _check_ids(
        self, ours: list[int], texts: Sequence[_Text], cores: Sequence[str], what: str
    ) -> None:
        """Compares ids of probe texts with those of the whole conversation at once."""
        probes = [text.around(core) for text, core in zip(texts, cores, strict=True)]
        whole = self._render(probes, add_generation_prompt=False)
        theirs = list(
            self._backend(whole, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        )
        if self._puts_bos and theirs[:1] != [self.bos_id]:
            theirs.insert(0, self.bos_id)
        if ours != theirs:
            raise TemplateError(
                f"{what} not what the chat template makes of the whole conversation: "
                f"{self._difference(ours, theirs)}"
            )

    def _cut(
        self, whole: str, texts: Sequence[_Text], spans: Sequence[tuple[int, int, int]]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """The ids of a conversation's text, encoded span by span; see `encode`."""
        ids: list[int] = []
        learnt: list[tuple[int, int]] = []
        todo = _by_message(texts, spans)
        pending = ""  # given text that is not encoded yet
        opened: int | None = None  # where a span began that goes on to the end of its turn

        def flush() -> None:
            nonlocal pending
            if pending:
                ids.extend(self._ordinary(pending, at_start=not ids))
            pending = ""

        for part in self._split.split(whole):
            if part in self._special:
                flush()
                ids.append(self._special[part])
                if opened is not None:
                    learnt.append((opened, len(ids)))
                    opened = None
                continue
            at = 0
            for mark in _MARK.finditer(part):
                pending += part[at : mark.start()]
                at, number = mark.end(), _number(mark)
                core, done = texts[number].core, 0
                for start, stop, to_the_end in todo.get(number, ()):
                    pending += core[done:start]
                    if start == 0:
                        self._check_border(pending, core[:stop])
                    flush()
                    begun = len(ids)
                    pending, done = core[start:stop], stop
                    if to_the_end:
                        opened = begun
                    else:
                        flush()
                        learnt.append((begun, len(ids)))
                pending += core[done:]
            pending += part[at:]
        flush()
        if self._puts_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self._special[str(self._backend.bos_token)])
            learnt = [(start + 1, stop + 1) for start, stop in learnt]
        if opened is not None:
            raise TemplateError("the chat template puts no special token behind an answer")
        return tuple(ids), tuple(learnt)

    def _check_border(self, before: str, text: str) -> None:
        """Raises TemplateError where a message's beginning is one token with what is before it."""
        if before:
            given = self._ordinary(before)
            if self._ordinary(before + text)[: len(given)] != given:
                raise TemplateError(
                    f"with this chat template {before[-20:]!r} and {text[:8]!r} after it are cut "
                    "into tokens that belong to both"
                )

    def _continued(self, layout: _Layout, answer: str) -> list[int]:
        """Ids of an answer as it goes on from the prompt, without the end of the turn."""
        # The answer takes its place after the layout was split: special tokens in it stay text.
        (number,) = _numbers(layout.answer)
        header = self._fill(layout.header, {})
        joined = self._fill(layout.header + layout.answer, {number: answer})
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

    def _start(self, layout: str, cores: _Cores) -> list[int]:
        """Encodes a layout that a conversation begins with."""
        ids = self._fill(layout, cores, at_start=True)
        if self._puts_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self._special[str(self._backend.bos_token)])
        return ids

    def _fill(self, layout: str, cores: _Cores, at_start: bool = False) -> list[int]:
        """Encodes a layout with the messages in place; a special token is always a boundary."""
        ids: list[int] = []
        for part in self._split.split(layout):
            if part in self._special:
                ids.append(self._special[part])
            else:
                filled = _MARK.sub(lambda mark: cores[_number(mark)], part)
                ids.extend(self._ordinary(filled, at_start and not ids))
        return ids

    def _ordinary(self, text: str, at_start: bool = False) -> list[int]:
        """Ids of a text in which nothing is a special token."""
        encoder = self._at_start if at_start else self._inside
        ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        return ids


def _texts(messages: Sequence[Message]) -> list[_Text]:
    """Messages as templates see them, a blank system message at the beginning left out."""
    texts = [_Text.of(message.role, message.text) for message in messages]
    return texts[1:] if texts and texts[0].role == "system" and not texts[0].core else texts


def _mark(number: int) -> str:
    """The placeholder of a message."""
    major, minor = divmod(number, _BASE)
    return f"\ue000{chr(_FIRST + major)}{chr(_FIRST + minor)}"


def _number(mark: re.Match[str]) -> int:
    """Which message a placeholder stands for."""
    return (ord(mark[1]) - _FIRST) * _BASE + ord(mark[2]) - _FIRST


def _numbers(text: str) -> list[int]:
    """Whose placeholders a text holds, in its order."""
    return [_number(mark) for mark in _MARK.finditer(text)]


def _unmarked(text: str) -> list[str]:
    """What is before, between and behind a text's placeholders."""
    return re.split("\ue000..", text)


def _probes(texts: Sequence[_Text]) -> list[str]:
    """A real text for every message."""
    return [_PROBES[text.role] for text in texts]


def _by_message(
    texts: Sequence[_Text], spans: Sequence[tuple[int, int, int]]
) -> dict[int, list[tuple[int, int, bool]]]:
    """Spans by message: `(start, stop)` within its core, and whether the end of turn is learnt."""
    found: dict[int, list[tuple[int, int, bool]]] = {}
    for number, start, stop in spans:
        text = texts[number]
        before, length = len(text.before), len(text.core)
        to_the_end = text.role == "assistant" and stop == before + length + len(text.after)
        within = (min(max(0, start - before), length), min(max(0, stop - before), length))
        if within[0] < within[1] or to_the_end:
            found.setdefault(number, []).append((*within, to_the_end))
    return found


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

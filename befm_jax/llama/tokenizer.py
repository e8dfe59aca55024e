"""Text to token ids and back, with one chat format for training, scoring and sampling.

The format is the model's own chat template, rendered with placeholders for the messages.  Special
tokens come from the template alone.  A message's text is opaque: it is always encoded as ordinary
text, so a `<|eot_id|>` typed by a survey respondent stays ten characters, and a template that
parses texts (Qwen3's looks for `</think>` in answers) does not see it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from transformers import PreTrainedTokenizerFast

from befm_jax import files
from befm_jax.data.items import ROLES, Message
from befm_jax.data.pipeline import Conversation, Ids
from befm_jax.errors import UserError
from befm_jax.llama import rendering

# Llama 3's chat template, for checkpoints without one (base models and our own tiny ones).
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
)  # fmt: skip
# Placeholders for the messages while a template is rendered: private-use characters.  Two of them
# encode the message's index in base 4,096.
_FIRST, _BASE = 0xE100, 4096
_MARK = re.compile("\ue000([\ue100-\uf0ff])([\ue100-\uf0ff])")
_WORD = re.compile(r"[\w\s]+")
# Sample messages, to compare ids with those of transformers: letters of both cases, digits, and
# characters that a template might escape.
_PROBES = {
    "system": "Play fair & be kind.",
    "user": "Don't you <want> 10 {coins}?",
    "assistant": "[Yes], 7",
}
# Conversations by which templates are compared, as their roles.
_CONVERSATIONS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant"),
    ("system", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant"),
)
# Ids must be below this; the largest vocabularies have some hundred thousand.  The memory that
# tokenizers needs to copy a vocabulary is proportional to its largest id.
_IDS = 1 << 24


class TemplateError(UserError):
    """A chat template or text whose parts do not have the token ids of the whole conversation."""


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Raises TemplateError, which begins with `what`, for an error of transformers or tokenizers.

    They have no types of their own; a panic in Rust is not even an Exception.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise TemplateError(f"{what} ({error!r})") from error


class _Text(NamedTuple):
    """A message, split into leading white space, text and trailing white space."""

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
        """Another text in the same white space, as a message for a template."""
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
    """A template's output, with placeholders for the messages.

    `prompt`: up to where the answer begins; `header`: its part after the last special token or
    message; `answer`: from there to the end of the turn; `end`: the token that ends it; `rest`:
    what follows in a complete conversation, and is not learnt.
    """

    prompt: str
    header: str
    answer: str
    end: str
    rest: str


class _Piece(NamedTuple):
    """A special token (`special` is its id), or text that is encoded by itself.

    Where there is text `before`, both are encoded as one, and the piece's ids are those after
    `before`'s own.  `at_start`: a conversation begins with it; `span`: which learnt span it is in.
    """

    text: str
    before: str = ""
    at_start: bool = False
    special: int = -1
    span: int = -1


class Tokenizer:
    """A Hugging Face fast tokenizer and its chat template.

    `end_of_turn` is the id that the template writes after an answer; `stop_ids` are all ids that
    end one; `template_hash` identifies the template.  `refuses_system` is empty, or says why the
    template can't render a system message (Gemma's has none): then that is put before the user's
    text, with a blank line between.

    For every text without special tokens, `prompt(...) + answer(...)` equals transformers'
    `apply_chat_template` of the whole conversation (with `enable_thinking=False` and a fixed date),
    up to the end of the answer's turn.  Raises TemplateError for a template without that property.
    """

    def __init__(self, backend: PreTrainedTokenizerFast, more_stop_ids: Iterable[int] = ()) -> None:
        if backend.chat_template is None:
            absent = [token for token in LLAMA3_SPECIAL if token not in backend.get_vocab()]
            if absent:
                raise TemplateError(
                    "the tokenizer has no chat template, and lacks Llama 3's special tokens "
                    f"{', '.join(absent)}"
                )
            backend.chat_template = LLAMA3_TEMPLATE
        self._backend = backend
        try:
            self._template = str(backend.get_chat_template())
        except ValueError as error:
            raise TemplateError(f"the tokenizer has no default chat template: {error}") from error
        self._special = _control_tokens(backend, self._template)
        # The longest first, as the tokenizer itself matches them.
        names = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self._inside, self._at_start = _text_encoders(backend, self._special)
        # Whether the tokenizer, not the template, adds the BOS.
        bos = backend.bos_token_id
        self._puts_bos = bos is not None and backend("a")["input_ids"][:1] == [bos]
        self._layout = lru_cache(maxsize=64)(self._checked_layout)
        self._conversation = lru_cache(maxsize=64)(self._checked_conversation)
        self._usual = self._layout((_EMPTY, _EMPTY_ANSWER))
        self.refuses_system, with_system = "", ""
        texts = (_EMPTY._replace(role="system"), _EMPTY, _EMPTY_ANSWER)
        try:
            with_system = self._checked_whole(
                [text.around(_mark(at)) for at, text in enumerate(texts)]
            )
        except TemplateError as error:
            self.refuses_system = str(error)
        written = self._usual.prompt + self._usual.end + with_system
        self._written = {*self._split.split(written), *([backend.bos_token] * self._puts_bos)}
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
        file = Path(directory) / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{directory}: no tokenizer.json")
        rendering.start()
        _check_model(file)
        # Not at the top: AutoTokenizer imports PyTorch where it is installed, which takes seconds.
        from transformers import AutoTokenizer

        try:
            with library_errors("the tokenizer can't be read"):
                backend: Any = AutoTokenizer.from_pretrained(
                    str(directory), local_files_only=True, trust_remote_code=False
                )
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
    def largest_id(self) -> int:
        """The largest id that a conversation can have.

        A special token that the template does not write, such as one for padding, has no part in
        it: its id may be beyond a model's embeddings.
        """
        return max(
            index
            for token, index in self._backend.get_vocab().items()
            if token in self._written or token not in self._special
        )

    @property
    def bos_id(self) -> int | None:
        """The tokenizer's BOS, if it has one."""
        bos: int | None = self._backend.bos_token_id
        return bos

    @property
    def template_hash(self) -> str:
        """The `hash_of` of the chat template in use."""
        return hash_of(self._template)

    def rendered_hash(self, template: str = "") -> str:
        """SHA-256 in hex of what a template (by default the one in use) writes for conversations.

        Templates that write the same, and refuse the same, have the same, whatever their text.

        Raises TemplateError where it refuses a question alone.
        """
        written: list[str | None] = []
        for space in ("", " \n"):
            for roles in _CONVERSATIONS:
                probes = [
                    {"role": role, "content": space + _PROBES[role] + space} for role in roles
                ]
                try:
                    written.append(self._render(probes, roles[-1] == "user", template))
                except TemplateError:
                    if roles == ("user",):
                        raise
                    written.append(None)
        return hashlib.sha256(json.dumps(written).encode()).hexdigest()

    @property
    def hugging_face(self) -> PreTrainedTokenizerFast:
        """The wrapped Hugging Face tokenizer, for programs with conventions of their own."""
        return self._backend

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The chat template's text of a conversation, with special tokens by name.

        `options` are those of transformers' `apply_chat_template`; the date is fixed.  Raises
        TemplateError where the template refuses the conversation.
        """
        if self.refuses_system:
            given = [Message(message["role"], message["content"]) for message in messages]
            messages = [
                {"role": role, "content": text} for role, text in _without_system(given, ())[0]
            ]
        return self._text(messages, self._template, options)

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of a conversation up to where the answer begins, with one BOS if the model has one.

        A blank system message is left out, and one that the template refuses is put before the
        user's text.  The template decides whether white space around a
        message is kept: Llama's drop it, Qwen's keep it.

        Raises TemplateError where the template rejects these messages.
        """
        ((ids, _),) = self._encode([self._prompt_pieces(messages)])
        return ids

    def answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer and its end-of-turn token: what is learnt and scored.

        Raises TemplateError where a token would span the border of prompt and answer.
        """
        ((ids, _),) = self._encode([self._answer_pieces(text)])
        return ids

    def encode(
        self, messages: Sequence[Message], spans: Sequence[tuple[int, int, int]] = ()
    ) -> Ids:
        """Ids of a whole conversation, and the ranges of learnt tokens in them.

        `spans` are those of `data.items.Example`: `(message, start, stop)` in characters; without
        any the last message is learnt, split as by `prompt` and `answer`.  Spans start and end at
        token boundaries: no token is partly learnt.  A span to the end of an assistant's message
        includes the end of its turn.  Leading and trailing white space of a message is context,
        not learnt, except before a learnt end of turn.

        Returns the ids, which are those of transformers' `apply_chat_template` except at span
        borders within a message, and `(start, stop)` of every span in tokens.

        Raises TemplateError where the template rejects the conversation, or a token would span the
        border of a learnt message and what is before it.
        """
        return self.encode_batch([(messages, spans)])[0]

    def encode_batch(self, conversations: Iterable[Conversation]) -> list[Ids]:
        """Each conversation's `encode`: quicker, since their texts are encoded together."""
        return self._encode([self._pieces(messages, spans) for messages, spans in conversations])

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of ids; special tokens are left out unless `special` is true."""
        return str(
            self._backend.decode(
                list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )
        )

    def _checked_layout(self, texts: tuple[_Text, ...]) -> _Layout:
        """The template's layout for messages with this white space (their cores are empty).

        The last message is the answer.  Raises TemplateError where the ids of prompt and answer
        would differ from those of the whole conversation.
        """
        marked = [text.around(_mark(number)) for number, text in enumerate(texts)]
        prompt = self._render(marked[:-1], add_generation_prompt=True)
        whole = self._checked_whole(marked)
        if _numbers(prompt) != list(range(len(texts) - 1)):
            raise TemplateError("the chat template doesn't render every message exactly once")
        if not whole.startswith(prompt):
            raise TemplateError(
                "the chat template's generation prompt is not how it begins an answer: "
                + _prompt_difference(prompt, whole)
            )
        after = whole[len(prompt) :]
        end = self._split.search(after, after.index(_mark(len(texts) - 1)))
        if end is None:
            raise TemplateError("the chat template writes no special token after an answer")
        header = _unmarked(self._split.split(prompt)[-1])[-1]
        layout = _Layout(prompt, header, after[: end.start()], end[0], after[end.end() :])
        cores = _probes(texts)
        ours = [
            *self._opened(self._filled(layout.prompt, cores)),
            *self._answered(layout, cores[-1]),
            *self._filled(layout.rest, cores, within=True),
        ]
        self._check_ids(ours, texts, cores, "prompt and answer have")
        return layout

    def _checked_conversation(self, texts: tuple[_Text, ...]) -> str:
        """The template's text of a whole conversation, with placeholders for its messages.

        Raises TemplateError where its ids would differ from the conversation's.
        """
        whole = self._checked_whole([text.around(_mark(at)) for at, text in enumerate(texts)])
        cores = _probes(texts)
        ours = self._opened(self._filled(whole, cores))
        self._check_ids(ours, texts, cores, "the messages one by one have")
        return whole

    def _checked_whole(self, marked: Sequence[Mapping[str, str]]) -> str:
        """A whole conversation's text; checks that every message is in it once, and one BOS."""
        whole = self._render(marked, add_generation_prompt=False)
        if _numbers(whole) != list(range(len(marked))):
            raise TemplateError("the chat template doesn't render every message exactly once")
        bos = self._backend.bos_token
        if bos is not None and bos in whole:
            # SmolLM's BOS also opens every message: <|im_start|>user.
            opening = sum(whole.count(bos + role) for role in ROLES)
            if not whole.startswith(bos) or (whole.count(bos) > 1 and whole.count(bos) != opening):
                raise TemplateError(f"the chat template writes {bos} more than once, or not first")
        return whole

    def _render(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool,
        template: str = "",
    ) -> str:
        """A template's (by default the own one's) text of a conversation."""
        options = {
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": False,  # Qwen3 would reason before it answers
        }
        return self._text(messages, template or self._template, options)

    def _text(
        self, messages: Sequence[Mapping[str, str]], template: str, options: Mapping[str, Any]
    ) -> str:
        try:
            variables = self._backend.special_tokens_map | dict(options)
            return rendering.render(template, messages, variables)
        except rendering.RenderError as error:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise TemplateError(f"the chat template refuses {roles}: {error}") from error

    def _check_ids(
        self, pieces: list[_Piece], texts: Sequence[_Text], cores: Sequence[str], what: str
    ) -> None:
        """Compares ids of probe texts with those of the whole conversation."""
        ((ids, _),) = self._encode([pieces])
        ours = list(ids)
        probes = [text.around(core) for text, core in zip(texts, cores, strict=True)]
        whole = self._render(probes, add_generation_prompt=False)
        with library_errors("a text can't be encoded"):
            encoded = self._backend(whole, add_special_tokens=False, split_special_tokens=False)
        theirs = list(encoded["input_ids"])
        if self._puts_bos and theirs[:1] != [self.bos_id]:
            theirs.insert(0, self.bos_id)
        if ours != theirs:
            raise TemplateError(
                f"{what} other token ids than the whole conversation: "
                f"{self._difference(ours, theirs)}"
            )

    def _pieces(
        self, messages: Sequence[Message], spans: Sequence[tuple[int, int, int]]
    ) -> list[_Piece]:
        """A conversation in pieces; see `encode`."""
        if not spans:
            return [
                *self._prompt_pieces(messages[:-1]),
                *self._answer_pieces(messages[-1].text),
            ]
        if self.refuses_system:
            messages, spans = _without_system(messages, spans)
        texts = _texts(messages)
        whole = self._conversation(tuple(text.space for text in texts))
        # Only a blank system message, the first, is left out.
        dropped = len(messages) - len(texts)
        by_message = _by_message(texts, spans, dropped)
        pieces: list[_Piece] = []
        # Text that is in no piece yet, what it is encoded with, and which span it is in.
        pending, before, span = "", "", -1

        def flush() -> None:
            nonlocal pending, before
            if pending:
                pieces.append(_Piece(pending, before, at_start=not pieces, span=span))
            pending = before = ""

        for part in self._split.split(whole):
            if part in self._special:
                flush()
                pieces.append(_Piece(part, special=self._special[part], span=span))
                span = -1
                continue
            at = 0
            for mark in _MARK.finditer(part):
                pending += part[at : mark.start()]
                at, number = mark.end(), _number(mark)
                core, done = texts[number].core, 0
                for learnt_span, start, stop, to_the_end in by_message.get(number, ()):
                    pending += core[done:start]
                    header = pending if start == 0 else ""
                    flush()
                    pending, before, span, done = core[start:stop], header, learnt_span, stop
                    if not to_the_end:
                        flush()
                        span = -1
                pending += core[done:]
            pending += part[at:]
        flush()
        if span >= 0:
            raise TemplateError("the chat template writes no special token after an answer")
        return self._opened(pieces)

    def _prompt_pieces(self, messages: Sequence[Message]) -> list[_Piece]:
        if self.refuses_system:
            messages, _ = _without_system(messages, ())
        texts = _texts(messages)
        layout = self._layout((*(text.space for text in texts), _EMPTY_ANSWER))
        usual = self._usual
        turn, usual_turn = (
            (part.header, _unmarked(part.answer), part.end) for part in (layout, usual)
        )
        if turn != usual_turn:
            raise TemplateError("the chat template's answer format depends on the messages before")
        return self._opened(self._filled(layout.prompt, [text.core for text in texts]))

    def _answer_pieces(self, text: str) -> list[_Piece]:
        given = _Text.of("assistant", text)
        try:
            return self._answered(self._layout((_EMPTY, given.space)), given.core)
        except TemplateError as error:
            raise TemplateError(f"the answer {text[:40]!r}: {error}") from error

    def _answered(self, layout: _Layout, answer: str) -> list[_Piece]:
        """The pieces of a learnt answer after the prompt, with the end of the turn."""
        # The answer is inserted after the layout is split: special tokens in it stay text.
        (number,) = _numbers(layout.answer)
        pieces = self._filled(layout.header + layout.answer, {number: answer}, within=True, span=0)
        if layout.header:
            rest = pieces[0].text.removeprefix(layout.header)
            pieces[0] = pieces[0]._replace(text=rest, before=layout.header)
        end = _Piece(layout.end, special=self._special[layout.end], span=0)
        return [*(piece for piece in pieces if piece.text), end]

    def _filled(
        self, layout: str, cores: _Cores, within: bool = False, span: int = -1
    ) -> list[_Piece]:
        """The pieces of a layout with the messages inserted; special tokens are boundaries.

        `within`: it is not the beginning of a conversation.
        """
        pieces: list[_Piece] = []
        for part in self._split.split(layout):
            if part in self._special:
                pieces.append(_Piece(part, special=self._special[part], span=span))
            elif filled := _MARK.sub(lambda mark: cores[_number(mark)], part):
                pieces.append(_Piece(filled, at_start=not (within or pieces), span=span))
        return pieces

    def _opened(self, pieces: list[_Piece]) -> list[_Piece]:
        """A conversation's pieces, with the BOS that the tokenizer adds."""
        if not self._puts_bos or [piece.special for piece in pieces[:1]] == [self.bos_id]:
            return pieces
        bos = str(self._backend.bos_token)
        return [_Piece(bos, special=self._special[bos]), *pieces]

    def _encode(self, conversations: Sequence[Sequence[_Piece]]) -> list[Ids]:
        """Each conversation's ids and learnt ranges of ids; every distinct text is encoded once."""
        ids: dict[tuple[str, bool], list[int]] = {
            (text, piece.at_start): []
            for pieces in conversations
            for piece in pieces
            if piece.special < 0
            for text in (piece.before, piece.before + piece.text)
        }
        for at_start, encoder in ((False, self._inside), (True, self._at_start)):
            texts = [text for text, starts in ids if starts == at_start]
            if not texts:
                continue
            with library_errors("a text can't be encoded"):
                encoded = encoder.encode_batch_fast(texts, add_special_tokens=False)
            for text, one in zip(texts, encoded, strict=True):
                ids[text, at_start] = one.ids
        return [_joined(pieces, ids) for pieces in conversations]

    def _difference(self, ours: Sequence[int], theirs: Sequence[int]) -> str:
        """Describes the first difference of two lists of ids."""
        at = _common_length(ours, theirs)
        part, expected = (self.decode(ids[at : at + 4], special=True) for ids in (ours, theirs))
        return (
            f"after {self.decode(ours[max(0, at - 4) : at], special=True)!r}, {part!r} "
            f"{list(ours[at : at + 4])}, expected {expected!r} {list(theirs[at : at + 4])}"
        )


def _texts(messages: Sequence[Message]) -> list[_Text]:
    """Messages in parts, without a blank system message at the beginning."""
    texts = [_Text.of(message.role, message.text) for message in messages]
    return texts[1:] if texts and texts[0].role == "system" and not texts[0].core else texts


def _without_system(
    messages: Sequence[Message], spans: Sequence[tuple[int, int, int]]
) -> tuple[Sequence[Message], Sequence[tuple[int, int, int]]]:
    """A conversation, and spans of it, with its system message before the user's first text."""
    if not messages or messages[0].role != "system" or not messages[0].text.strip():
        return messages, spans
    (_, system), *rest = messages
    if not rest or rest[0].role != "user":
        return [Message("user", system), *rest], spans
    before = system + "\n\n"
    moved = [
        (max(0, message - 1), start + shift, stop + shift)
        for message, start, stop in spans
        for shift in [len(before) if message == 1 else 0]
    ]
    return [Message("user", before + rest[0].text), *rest[1:]], moved


def _mark(number: int) -> str:
    """The placeholder of a message."""
    major, minor = divmod(number, _BASE)
    return f"\ue000{chr(_FIRST + major)}{chr(_FIRST + minor)}"


def _number(mark: re.Match[str]) -> int:
    """The index of a placeholder's message."""
    return (ord(mark[1]) - _FIRST) * _BASE + ord(mark[2]) - _FIRST


def _numbers(text: str) -> list[int]:
    """The message indices of a text's placeholders, in order."""
    return [_number(mark) for mark in _MARK.finditer(text)]


def _unmarked(text: str) -> list[str]:
    """The text before, between and after placeholders."""
    return re.split("\ue000..", text)


def _probes(texts: Sequence[_Text]) -> list[str]:
    """A sample text for every message."""
    return [_PROBES[text.role] for text in texts]


def _by_message(
    texts: Sequence[_Text], spans: Sequence[tuple[int, int, int]], dropped: int
) -> dict[int, list[tuple[int, int, int, bool]]]:
    """Spans by message, of which the first `dropped` are not in `texts`.

    Each is `(number, start, stop)` within the message's core, and whether the end of turn is
    learnt.
    """
    by_message: dict[int, list[tuple[int, int, int, bool]]] = {}
    for number, (message, start, stop) in enumerate(spans):
        text = texts[message - dropped]
        before, length = len(text.before), len(text.core)
        to_the_end = text.role == "assistant" and stop == before + length + len(text.after)
        within = (min(max(0, start - before), length), min(max(0, stop - before), length))
        if within[0] < within[1] or to_the_end:
            of_message = by_message.setdefault(message - dropped, [])
            of_message.append((number, *within, to_the_end))
    return by_message


def _joined(pieces: Sequence[_Piece], ids_of: Mapping[tuple[str, bool], list[int]]) -> Ids:
    """The ids of a conversation, and its learnt ranges."""
    ids: list[int] = []
    learnt: dict[int, tuple[int, int]] = {}
    for piece in pieces:
        begun = len(ids)
        if piece.special >= 0:
            ids.append(piece.special)
        else:
            own = ids_of[piece.before + piece.text, piece.at_start]
            if piece.before:
                before = ids_of[piece.before, piece.at_start]
                if own[: len(before)] != before:
                    raise TemplateError(
                        "with this chat template a token spans the border of "
                        f"{piece.before[-20:]!r} and {piece.text[:40]!r} after it"
                    )
                own = own[len(before) :]
            ids += own
        if piece.span >= 0:
            learnt[piece.span] = (learnt.get(piece.span, (begun,))[0], len(ids))
    return tuple(ids), tuple(learnt.values())


def hash_of(template: str) -> str:
    """A chat template's SHA-256 in hex, in UTF-8 with Unix line ends."""
    return hashlib.sha256(re.sub("\r\n?", "\n", template).encode()).hexdigest()


def _check_model(file: Path) -> None:
    """Checks what the library would not say of the model in a `tokenizer.json`.

    Raises TemplateError for ids that would take all memory, and for random tokens.
    """
    model = files.read_object(file, TemplateError).get("model")
    model = model if isinstance(model, dict) else {}
    if model.get("dropout"):
        raise TemplateError(
            f"{file}: dropout is {model['dropout']!r}; it must be null, or a text has other tokens "
            "each time"
        )
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):  # a list has no ids
        for token, index in vocabulary.items():
            if isinstance(index, int) and index >= _IDS:
                raise TemplateError(
                    f"{file}: the id of {token!r} is {index}; it must be below {_IDS:,}"
                )


def _control_tokens(backend: PreTrainedTokenizerFast, template: str) -> dict[str, int]:
    """The tokens that only a template may write, with their ids.

    Those marked special, and added ones that occur in the template and are not words: Qwen3's
    `<think>` is an added token that is not marked special.
    """
    return {
        token.content: index
        for index, token in backend.added_tokens_decoder.items()
        if token.special or (token.content in template and not _WORD.fullmatch(token.content))
    }


def _text_encoders(
    backend: PreTrainedTokenizerFast, control: Iterable[str]
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Copies of the tokenizer that encode control tokens as text: within and at the start.

    They differ where the tokenizer prepends a space at the start of a conversation alone (Llama 2).
    """
    written = backend.backend_tokenizer.to_str()
    at_start = _text_encoder(written, control)
    inside = written.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
    return at_start if inside == written else _text_encoder(inside, control), at_start


def _text_encoder(written: str, control: Iterable[str]) -> tokenizers.Tokenizer:
    encoder = tokenizers.Tokenizer.from_str(written)
    encoder.no_truncation()
    encoder.no_padding()
    # Existing tokens keep their ids; marking them special makes the encoder split them as text.
    encoder.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in control])
    encoder.encode_special_tokens = True
    return encoder


def _common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Length of the common prefix."""
    pairs = zip(left, right, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _prompt_difference(prompt: str, whole: str) -> str:
    """Describes the first difference of a prompt and the conversation that it should begin."""
    at = _common_length(prompt, whole)
    prompted, written = prompt[at : at + 40], _MARK.sub("(message)", whole[at : at + 40])
    before = _MARK.sub("(message)", prompt[max(0, at - 40) : at])
    return f"after {before!r} it prompts with {prompted!r} and writes {written!r}"

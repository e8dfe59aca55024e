r"""Runs tasks of lm-evaluation-harness on this engine, to measure forgetting by fine-tuning.

    python -m befm_jax.lm_harness --model befm_jax \
        --model_args pretrained=RUN_OR_HF_DIR,adapter=ADAPTER_DIR,dtype=bfloat16 \
        --tasks arc_easy,gsm8k --batch_size 8 --output_path scored

The arguments are those of lm-evaluation-harness's own command line (`lm-eval`), with the additional
model `befm_jax`.  From Python: import this module, then
`lm_eval.simple_evaluate(model="befm_jax", model_args={"pretrained": ...}, tasks=[...])`.
"""

from __future__ import annotations

import bisect
import hashlib
import logging
import math
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

try:
    import lm_eval
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    missing = "lm-evaluation-harness is not installed: pip install 'befm_jax[lm-eval]'"
    raise ModuleNotFoundError(missing, name="lm_eval") from error
import lm_eval.models  # fills the registry, which lm-eval skips once it has a model
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from befm_jax import cli
from befm_jax.config import CACHES, DTYPES, QUANTIZE
from befm_jax.data.forest import Encoded
from befm_jax.distributed import mesh as meshes
from befm_jax.errors import UserError, printable
from befm_jax.inference import sample, score
from befm_jax.inference.sample import Request, Sampling
from befm_jax.llama.tokenizer import library_errors
from befm_jax.respondents import engine

# A child of the harness's logger, so that LMEVAL_LOG_LEVEL applies.
logger = logging.getLogger("lm_eval.befm_jax")

MAX_GEN_TOKS = 256
MAX_BATCH_SIZE = 64
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k")
_GENERATION = ("until", "do_sample", *_SAMPLING, *_LIMITS)


@dataclass(frozen=True)
class Generation:
    """Sampling settings of an answer, and the stop strings that end it."""

    sampling: Sampling
    until: tuple[str, ...]


@register_model("befm_jax")
class BefmLM(TemplateLM):
    """A befm_jax model in lm-evaluation-harness, token for token like its own `hf` class.

    Texts are tokenized as there: special tokens in what the harness writes, a rendered chat
    template included, are parsed, so `<|eot_id|>` in a question is one token.  That is lm-eval's
    convention and holds in this class alone; everywhere else in befm_jax special tokens in data are
    encoded as text.  Differences from `hf`:

    - Templates that print the date get a fixed one.  A tokenizer without a chat template has that
      of Llama 3.  Where a template refuses system messages, they are put before the user's text, as
      everywhere in befm_jax; `hf` leaves them out.
    - Any stop id ends a generation: the end of turn of the chat template, the tokenizer's end of
      text, and those of the model's configuration.
    - Draws come from the model's own distribution, at the task's temperature, truncated by the
      task's settings alone (transformers' default is top-k 50).  They depend on `seed` and the
      context, and are reproducible; the repeats of one question are independent.
    - At most `score.LONGEST_CONTEXT` tokens are read, fewer where the model has fewer positions.
    - A continuation without tokens, or one that does not fit, is an error.

    The options of one question share its prompt in one token tree, and the repeats of one question
    are drawn together.  With `batch_size=1` the other questions do not change a bit of a question's
    log-likelihoods, or of the logits that its answer is drawn from.

    Args:
        pretrained: a training run's directory, a Hugging Face directory or a hub id.
        adapter: a LoRA adapter in PEFT's format: a directory or a hub id.
        dtype: "float32", "bfloat16" or "auto" (the default: the run's, or the stored one).
        quantize: "no" or "int8": the quantisation of the base (by default the run's).
        force_template: accept an adapter that was trained with another chat template.
        cache: "full" or "int8": the key-value cache of generation.
        batch_size: rows of log-likelihoods per batch and data-parallel device, and questions
            answered together over all devices, or "auto" (`max_batch_size`).  Memory for
            log-likelihoods is bounded by the longest row; for answers it grows with the size.
        max_batch_size: the value of "auto".
        max_length: tokens that are read before the last one; longer contexts are truncated from the
            left, with a warning and a count in the results.
        device: compared with JAX's platform; has no effect.
        devices: the number of this machine's devices, over which weights are sharded as far as the
            model's heads allow, and beyond that rows (by default all accelerators, or one CPU
            device).  Results are the same on any number, but for rounding.
        add_bos_token: whether texts begin with BOS; by default as the tokenizer does.
        prefix_token_id: the token before an empty context; by default BOS.
        enable_thinking: passed to the chat template.  False is what befm_jax trains, scores and
            samples with; by default the template decides, as with `hf`, and Qwen3's asks for
            thoughts.
        chat_template_args: further variables of the chat template, by name.
        seed: of the draws, where a task samples.

    Raises:
        FileNotFoundError: a directory or a file in it is missing.
        UserError: an argument, model, tokenizer or adapter that can't be used.
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        adapter: str | Path | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        force_template: bool = False,
        cache: str = "full",
        batch_size: int | str = 1,
        max_batch_size: int = MAX_BATCH_SIZE,
        max_length: int | None = None,
        device: str | None = None,
        devices: int | str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UserError(
                f"model_args: befm_jax takes no {', '.join(sorted(unknown))}; it takes pretrained, "
                "adapter, dtype, quantize, force_template, cache, batch_size, max_batch_size, "
                "max_length, device, devices, add_bos_token, prefix_token_id, enable_thinking, "
                "chat_template_args, seed"
            )
        if pretrained is None:
            raise UserError("model_args: pretrained is missing; it must be a model")
        if dtype not in (None, "auto", *DTYPES):
            raise UserError(
                f"model_args: dtype is {dtype!r}; it must be one of auto, {', '.join(DTYPES)}"
            )
        if quantize not in (None, *QUANTIZE):
            raise UserError(
                f"model_args: quantize is {quantize!r}; it must be one of {', '.join(QUANTIZE)}"
            )
        if force_template not in (True, False):
            raise UserError(
                f"model_args: force_template is {force_template!r}; it must be True or False"
            )
        if cache not in CACHES:
            raise UserError(
                f"model_args: cache is {cache!r}; it must be one of {', '.join(CACHES)}"
            )
        _check_device(device)
        if devices is not None:
            devices = _whole("devices", devices)
        automatic = str(batch_size).partition(":")[0] == "auto"
        self.batch_size = _whole(
            "batch_size", max_batch_size if automatic else batch_size, " (or auto)"
        )
        if max_length is not None:
            max_length = _whole("max_length", max_length)
            if max_length > score.LONGEST_CONTEXT:
                raise UserError(
                    f"model_args: max_length is {max_length}; it must be at most "
                    f"{score.LONGEST_CONTEXT}"
                )
        if add_bos_token not in (None, True, False):
            raise UserError(
                f"model_args: add_bos_token is {add_bos_token!r}; it must be True or False"
            )
        if enable_thinking not in (None, True, False):
            raise UserError(
                f"model_args: enable_thinking is {enable_thinking!r}; it must be True or False"
            )
        if not isinstance(chat_template_args, Mapping | None):
            raise UserError(
                f"model_args: chat_template_args is {chat_template_args!r}; it must be a dictionary"
            )
        self._template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self._template_args["enable_thinking"] = enable_thinking
        self.simulator = engine.load(
            pretrained,
            adapter,
            None if dtype == "auto" else dtype,
            quantize,
            force_template,
            devices,
        )
        self.tokenizer = self.simulator.tokenizer.hugging_face
        if add_bos_token and self.tokenizer.bos_token_id is None:
            raise UserError("model_args: add_bos_token, but the tokenizer has no BOS token")
        if prefix_token_id not in (None, *range(self.simulator.tokenizer.vocab_size)):
            raise UserError(
                f"model_args: prefix_token_id is {prefix_token_id!r}; it must be a token id below "
                f"{self.simulator.tokenizer.vocab_size}"
            )
        config = self.simulator.model.config
        self.max_length: int = max_length or min(
            config.max_position_embeddings, score.LONGEST_CONTEXT
        )
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._seed = seed
        self._cache = cache
        self._truncated: dict[str, dict[str, int]] = {}
        self._first_prompt: dict[str, Any] | None = None
        self._warned: set[str] = set()

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text; its end of turn if it has no other."""
        eos: int | None = self.tokenizer.eos_token_id
        return self.simulator.tokenizer.end_of_turn if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """The context of an empty context, and of the first window of a rolling text."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self.simulator.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The key of lm-eval's cache of rendered requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text with special tokens parsed; with BOS by default or `add_bos_token`.

        A text that begins with BOS's name gets no second one.
        """
        if add_special_tokens is not None:
            return self._ids(string, add_special_tokens)
        return self._encode(string, has_bos=string.startswith(self._name(self.prefix_token_id)))

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without a generation prompt the last turn stays open.

        Raises UserError if the template refuses it.
        """
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        return self.simulator.tokenizer.render(chat_history, **(self._template_args | options))

    def get_model_info(self) -> dict[str, Any]:
        """The model's metadata, for lm-eval's results file."""
        return {
            "model_origin": self.simulator.origin,
            "model_device": self.simulator.device,
            "model_max_length": self.max_length,
            "model_cache": self._cache,
            "chat_template_args": self._template_args,
            "contexts_cut": self._truncated,
            "first_prompt": self._first_prompt,
        }

    def _note_first(self, prompts: Iterable[Sequence[int]]) -> None:
        """Keeps the very first prompt for the results file."""
        first = next(iter(prompts), None)
        if self._first_prompt is None and first is not None:
            text = self.simulator.tokenizer.decode(first, special=True)
            self._first_prompt = {"ids": list(first), "text": text}

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        for (context, continuation), _context_ids, ids in requests:
            if not ids:
                raise UserError(
                    f"the continuation {_short(continuation)} has no token of its own after "
                    f"{_short(context[-40:])}"
                )
            if len(ids) > self.max_length:
                raise UserError(
                    f"the continuation {_short(continuation)} has {len(ids)} tokens, more than "
                    f"max_length={self.max_length}"
                )
        scores: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        pairs = [(context_ids, ids) for _, context_ids, ids in requests]
        for number, answer in self._scored(pairs, "loglikelihood", disable_tqdm):
            scores[number] = answer
            self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of full texts, in disjoint windows.

        Every token is predicted once, from as much context as a window has; the first from BOS.
        """
        pairs: list[tuple[list[int], list[int]]] = []
        of_request: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                of_request.append(number)
        by_window = [math.nan] * len(pairs)
        for number, (log_prob, _) in self._scored(pairs, "loglikelihood_rolling", disable_tqdm):
            by_window[number] = log_prob
        totals = [0.0] * len(requests)
        for number, log_prob in zip(of_request, by_window, strict=True):
            totals[number] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, up to a stop id, a stop string or the token limit.

        Raises UserError for a generation argument that is unknown or out of range.
        """
        numbers_of: dict[tuple[str, Generation], list[int]] = {}
        for number, request in enumerate(requests):
            context, arguments = request.args
            numbers_of.setdefault((context, self._generation(arguments)), []).append(number)
        prompts = {key: self._prompt(*key, len(numbers)) for key, numbers in numbers_of.items()}
        self._note_first(prompts.values())
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for key, texts in self._continuations(prompts, numbers_of):
                for number, text in zip(numbers_of[key], texts, strict=True):
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(texts))
        self._warn_of_truncation("generate_until")
        return answers

    def _scored(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        kind: str,
        disable_tqdm: bool,
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Scores `(context, continuation)` ids; yields `(number, (log-prob, greedy))`.

        Pairs of one context are the leaves of one tree.  The longest come first, so that running
        out of memory happens at once.
        """
        numbers_of: dict[tuple[int, ...], list[int]] = {}
        for number, (context, continuation) in enumerate(pairs):
            limit = self.max_length + 1 - len(continuation)
            self._count(kind, 1, len(context) - limit)
            numbers_of.setdefault(tuple(context[-limit:]), []).append(number)
        self._note_first(numbers_of)
        order = sorted(
            numbers_of,
            key=lambda context: (
                -len(context) - max(len(pairs[number][1]) for number in numbers_of[context])
            ),
        )
        groups = (
            [Encoded.of(context, pairs[number][1]) for number in numbers_of[context]]
            for context in order
        )
        with tqdm(total=len(pairs), desc=kind, disable=disable_tqdm) as bar:
            for group, scores in score.each_group(
                self.simulator.model, self.simulator.params, groups, self.batch_size
            ):
                numbers = numbers_of[order[group]]
                each = zip(numbers, scores.log_probs, scores.greedy, strict=True)
                for number, log_prob, greedy in each:
                    yield number, (float(log_prob), bool(greedy))
                bar.update(len(numbers))
        self._warn_of_truncation(kind)

    def _generation(self, arguments: Mapping[str, Any]) -> Generation:
        """A task's generation arguments, checked; greedy unless it samples.

        Without `do_sample` a temperature above 0 samples.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        if given.get("num_beams") == 1:
            del given["num_beams"]
        unknown = sorted(set(given) - set(_GENERATION))
        if unknown:
            raise UserError(
                f"generation argument {', '.join(unknown)}: not supported; supported are "
                f"{', '.join(_GENERATION)}, and num_beams=1"
            )
        until = given.get("until", [])
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, list) or not all(isinstance(stop, str) for stop in until):
            raise UserError(
                f"generation argument until is {until!r}; it must be a text or a list of texts"
            )
        try:
            limit = next((int(given[name]) for name in _LIMITS if name in given), MAX_GEN_TOKS)
            sampling = Sampling(
                float(given.get("temperature", 0.0)),
                int(given.get("top_k", 0)),
                float(given.get("top_p", 1.0)),
                max_new_tokens=limit,
                cache=self._cache,
            )
            do_sample = given.get("do_sample", sampling.temperature > 0)
            greedy = replace(sampling, temperature=0.0, top_k=0, top_p=1.0)
            if not isinstance(do_sample, bool):
                raise ValueError(f"do_sample is {do_sample!r}; it must be True or False")
            if do_sample and sampling.temperature == 0:
                raise ValueError("do_sample needs a temperature above 0")
            if not do_sample and sampling != greedy:
                unused = {name: given[name] for name in _SAMPLING if name in given}
                self._warn_once(f"greedy generation: {unused} have no effect without do_sample")
                sampling = greedy
        except (TypeError, ValueError) as error:
            raise UserError(f"generation arguments {dict(arguments)}: {error}") from error
        if limit >= self.max_length:
            raise UserError(
                f"generation arguments: {limit} new tokens leave no tokens for a context in "
                f"max_length={self.max_length}"
            )
        stops = [*until, self._name(self.eot_token_id)]
        return Generation(sampling, tuple(dict.fromkeys(stop for stop in stops if stop)))

    def _prompt(self, context: str, generation: Generation, requests: int) -> list[int]:
        """Ids of a context, truncated from the left to fit with the answer."""
        has_bos = bool(self.tokenizer.bos_token) and context.startswith(self.tokenizer.bos_token)
        ids = self._encode(context, has_bos)
        limit = self.max_length - generation.sampling.max_new_tokens
        self._count("generate_until", requests, len(ids) - limit)
        return ids[-limit:] or [self.prefix_token_id]

    def _continuations(
        self,
        prompts: Mapping[tuple[str, Generation], Sequence[int]],
        numbers_of: Mapping[tuple[str, Generation], Sequence[int]],
    ) -> Iterator[tuple[tuple[str, Generation], list[str]]]:
        """The texts of every context: independent draws, or the greedy answer repeated.

        Contexts with the same sampling settings are batched, `batch_size` at a time.
        """
        by_sampling: dict[Sampling, list[tuple[str, Generation]]] = {}
        for key in prompts:
            by_sampling.setdefault(key[1].sampling, []).append(key)
        for sampling, keys in by_sampling.items():

            def ended(
                number: int, ids: Sequence[int], keys: list[tuple[str, Generation]] = keys
            ) -> bool:
                return self._has_ended(ids, keys[number][1].until)

            # A stop string can span tokens, so the text is searched, every few tokens: most tasks
            # allow 256 tokens or more and end after a line.
            populations = sample.each_population(
                self.simulator.model,
                self.simulator.params,
                [
                    Request(
                        prompts[key],
                        len(numbers_of[key]) if sampling.temperature > 0 else 1,
                        self._seed_of(key[0]),
                    )
                    for key in keys
                ],
                stop_ids=self.simulator.tokenizer.stop_ids,
                sampling=sampling,
                ended=ended,
                prompts=self.batch_size,
            )
            for number, draws in populations:
                key = keys[number]
                texts = [
                    self._text(row[:length].tolist(), key[1].until)
                    for row, length in zip(draws.tokens, draws.lengths, strict=True)
                ]
                yield key, texts * (len(numbers_of[key]) // len(texts))

    def _seed_of(self, context: str) -> int:
        digest = hashlib.sha256(f"{self._seed}:{context}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    def _has_ended(self, ids: Sequence[int], until: Sequence[str]) -> bool:
        """Whether the text contains a stop string, which may name special tokens."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return any(stop in text for stop in until)

    def _text(self, ids: Sequence[int], until: Sequence[str]) -> str:
        """The text up to the first stop string, without special tokens."""
        if self._has_ended(ids, until):
            ids = ids[
                : bisect.bisect_left(
                    range(len(ids)), True, key=lambda end: self._has_ended(ids[:end], until)
                )
            ]
        text = self.simulator.tokenizer.decode(ids)
        for stop in until:
            text = text.split(stop)[0]
        return text

    def _name(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def _encode(self, text: str, has_bos: bool) -> list[int]:
        """Ids of a text; `has_bos`: it begins with the name of BOS, which is parsed."""
        if has_bos or self._add_bos_token is False:
            return self._ids(text, add_special_tokens=False)
        ids = self._ids(text, add_special_tokens=True)
        if self._add_bos_token and ids[:1] != [self.tokenizer.bos_token_id]:
            ids.insert(0, self.tokenizer.bos_token_id)
        return ids

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        with library_errors(f"{_short(text)} can't be encoded"):
            ids = list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        # A special token that no prompt of ours has may be beyond the embeddings.
        embeddings = self.simulator.model.config.vocab_size
        if max(ids, default=0) >= embeddings:
            raise UserError(
                f"{_short(text)} holds {self._name(max(ids))!r}, of id {max(ids)}; the model has "
                f"embeddings of {embeddings}"
            )
        return ids

    def _count(self, kind: str, requests: int, tokens_cut: int) -> None:
        """Counts requests whose context lost `tokens_cut` tokens (none if not above 0)."""
        count = self._truncated.setdefault(kind, {"requests": 0, "cut": 0, "tokens_cut": 0})
        count["requests"] += requests
        if tokens_cut > 0:
            count["cut"] += requests
            count["tokens_cut"] += requests * tokens_cut

    def _warn_of_truncation(self, kind: str) -> None:
        count = self._truncated.get(kind)
        if count and count["cut"]:
            logger.warning(
                "%s: %d of %d contexts were too long for max_length=%d and were truncated from the "
                "left, %d tokens in all",
                kind, count["cut"], count["requests"], self.max_length, count["tokens_cut"],
            )  # fmt: skip

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(printable(message))


def _whole(name: str, value: Any, more: str = "") -> int:
    """A whole number of at least 1, from a number or its text; raises UserError for others."""
    try:
        number = int(value)
    except (OverflowError, TypeError, ValueError):
        number = 0
    # `int` converts 2.5 to 2, and True to 1.
    inexact = isinstance(value, bool) or (not isinstance(value, str) and number != value)
    if number < 1 or inexact:
        raise UserError(
            f"model_args: {name} is {value!r}; it must be a whole number of at least 1{more}"
        )
    return number


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _check_device(device: str | None) -> None:
    """Raises UserError for a device that JAX does not run on.

    "cuda:0", the default of lm-eval's command line, is a warning only.
    """
    if device is None:
        return
    kind, _, number = str(device).partition(":")
    if {"cuda": "gpu"}.get(kind, kind) == jax.default_backend() and number in ("", "0"):
        return
    devices = meshes.devices_in_words(jax.devices())
    if device != "cuda:0":
        raise UserError(
            f"device is {device}, but JAX runs on {devices}; leave it out, and choose by "
            "JAX_PLATFORMS or CUDA_VISIBLE_DEVICES"
        )
    logger.warning("device=cuda:0 (lm-eval's default) has no effect: JAX runs on %s", devices)


def _is_user_error(error: Exception) -> bool:
    """Whether an error is the user's to fix: ours, or raised by lm-eval's own checks."""
    if isinstance(error, UserError | OSError):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    harness = Path(lm_eval.__file__).parent
    return isinstance(error, ValueError) and raised_in.is_relative_to(harness)


def main() -> None:
    """`python -m befm_jax.lm_harness`: lm-eval's command line, with errors in one line."""
    from lm_eval.__main__ import cli_evaluate

    cli.keep_compiled_programs()
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        print(__doc__)
    try:
        cli_evaluate()
    except Exception as error:  # lm-eval has no error type of its own
        if not _is_user_error(error):
            raise
        logger.debug("traceback", exc_info=True)
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)

"""What users would pick instead: PEFT and transformers, on PyTorch.

Given its best reasonable setting: as many threads as cores, scaled-dot-product attention, batches
of like length (as the Trainer's `group_by_length` makes them) for training, and the quickest of a
few batch sizes.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from befm_jax.data import games

TORCH = {"cpu": "cpu", "gpu": "cuda"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Batches of like length are cut from so many batches' observations, as transformers does it.
MEGABATCH = 50

Observation = tuple[Sequence[int], Sequence[int]]


def load(directory: str, device: str, dtype: str, with_weights: bool) -> Any:
    """The model: the weights of its files, or random ones made on the device."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    settings = {"attn_implementation": "sdpa", "dtype": DTYPES[dtype]}
    if with_weights:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, **settings)
        return model.to(TORCH[device])
    with torch.device(TORCH[device]):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), **settings)


def settle(device: str) -> None:
    """Waits until the device has done all that it was told."""
    if device == "gpu":
        torch.cuda.synchronize()


def quickest(settings: Sequence[Any], rate: Callable[[Any], float], unit: str) -> tuple[Any, str]:
    """The setting of the highest rate, and in words what was tried.

    Settings that need more memory than there is are passed over, and said to be.
    """
    rates: dict[Any, float] = {}
    words = []
    for setting in settings:
        try:
            rates[setting] = rate(setting)
            words.append(f"{setting}: {rates[setting]:,.1f} {unit} a second")
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            words.append(f"{setting}: out of memory")
    if not rates:
        raise MemoryError("; ".join(words))
    return max(rates, key=lambda setting: rates[setting]), "; ".join(words)


class Training:
    """LoRA by PEFT: right-padded batches, loss on the answers' tokens, AdamW, clipped to norm 1."""

    def __init__(
        self,
        directory: str,
        device: str,
        dtype: str,
        with_weights: bool,
        batch_sizes: list[int],
        checkpointing: list[bool],
        learning_rate: float,
        seconds: float,
    ) -> None:
        self._directory, self._device, self._seconds = Path(directory), device, seconds
        self._with_weights, self._checkpointing = with_weights, False
        self._settings = list(itertools.product(batch_sizes, checkpointing))
        base = load(directory, device, dtype, with_weights)
        base.config.use_cache = False
        adapter = str(self._directory / "adapter")
        self._model: Any = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        self._model.train()
        self._trained = [one for one in self._model.parameters() if one.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=learning_rate, weight_decay=0.0, fused=True
        )
        rows = json.loads((self._directory / "rows.json").read_text(encoding="utf-8"))
        self._observations: list[Observation] = [
            (ids[:start], ids[start:stop])
            for ids, ((start, stop),), observations, _ in itertools.chain.from_iterable(rows)
            for _ in range(int(observations))
        ]

    def prepare(self) -> dict[str, Any]:
        """Writes the gradient of the checked observations; picks the batch size."""
        since = time.perf_counter()
        found: dict[str, Any] = {}
        if self._with_weights:
            found["loss"] = self._write_gradient()
        chosen, tried = quickest(self._settings, self._rate, "observations")
        self._set(chosen)
        return found | {
            "seconds": time.perf_counter() - since,
            "said": f"batch size and checkpointing {chosen} ({tried})",
        }

    def round(self) -> dict[str, Any]:
        """Steps on random batches for the given time."""
        return self._steps(self._seconds)

    def _set(self, setting: tuple[int, bool]) -> None:
        size, checkpointing = setting
        if checkpointing:
            self._model.enable_input_require_grads()
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        elif self._checkpointing:
            self._model.gradient_checkpointing_disable()
        self._checkpointing = checkpointing
        self._batches = self._drawn(size)

    def _rate(self, setting: tuple[int, bool]) -> float:
        self._set(setting)
        self._steps(0.0)  # the first step allocates
        figures = self._steps(self._seconds / 3)
        return float(figures["observations"] / figures["seconds"])

    def _steps(self, seconds: float) -> dict[str, Any]:
        observations = tokens = 0
        settle(self._device)
        since = time.perf_counter()
        while True:
            batch = next(self._batches)
            self._loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
            observations += len(batch)
            tokens += sum(len(prompt) + len(answer) for prompt, answer in batch)
            settle(self._device)
            passed = time.perf_counter() - since
            if passed >= seconds:
                return {"observations": observations, "tokens": tokens, "seconds": passed}

    def _loss(self, batch: Sequence[Observation]) -> Any:
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        tokens = torch.zeros((len(batch), longest), dtype=torch.long)
        labels = torch.full((len(batch), longest), -100)
        mask = torch.zeros((len(batch), longest), dtype=torch.long)
        for row, (prompt, answer) in enumerate(batch):
            whole = torch.tensor([*prompt, *answer])
            tokens[row, : len(whole)] = whole
            labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
            mask[row, : len(whole)] = 1
        to = TORCH[self._device]
        # Rows without padding are plain causal ones, for which the quickest kernel is taken.
        visible = None if mask.all() else mask.to(to)
        return self._model(
            input_ids=tokens.to(to), attention_mask=visible, labels=labels.to(to)
        ).loss

    def _drawn(self, size: int) -> Iterator[list[Observation]]:
        """Batches without end: epochs in random order, each batch of observations of like length.

        `size` is at most the number of observations.
        """
        random = np.random.default_rng(0)
        count = len(self._observations)
        size = min(size, count)
        mega = size * max(1, min(count // (4 * size), MEGABATCH))
        while True:
            order = random.permutation(count)
            for start in range(0, count, mega):
                some = sorted(
                    order[start : start + mega],
                    key=lambda one: -sum(map(len, self._observations[one])),
                )
                cuts = [some[at : at + size] for at in range(0, len(some), size)]
                for cut in random.permutation(len(cuts)):
                    yield [self._observations[one] for one in cuts[cut]]

    def _write_gradient(self) -> float:
        text = (self._directory / "checked.json").read_text(encoding="utf-8")
        loss = self._loss(
            [(ids[:start], ids[start:stop]) for ids, ((start, stop),), *_ in json.loads(text)]
        )
        loss.backward()
        gradient = {
            name.replace(".default", ""): weight.grad.float().cpu().contiguous()
            for name, weight in self._model.named_parameters()
            if weight.requires_grad
        }
        save_file(gradient, self._directory / "peer_gradient.safetensors")
        self._optimizer.zero_grad()
        return float(loss.detach())


class _Generating:
    """`generate` with `num_return_sequences`: temperature 1, nothing cut off."""

    def __init__(
        self, directory: str, device: str, dtype: str, with_weights: bool, batch_sizes: list[int]
    ) -> None:
        self._directory, self._device, self._sizes = Path(directory), device, batch_sizes
        self._model = load(directory, device, dtype, with_weights).eval()
        self._with_weights = with_weights
        self._size = batch_sizes[0]

    def _generate(
        self, prompt: Sequence[int], number: int, new_tokens: int, **settings: Any
    ) -> Any:
        """Token ids `[number, new_tokens]`, drawn in batches; fewer tokens where all have ended."""
        ids = torch.tensor([list(prompt)], device=TORCH[self._device])
        drawn = []
        for start in range(0, number, self._size):
            with torch.inference_mode():
                whole = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new_tokens,
                    num_return_sequences=min(self._size, number - start),
                    pad_token_id=self._model.config.eos_token_id[0],
                    **(
                        {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
                    ),
                )
            drawn.append(whole[:, len(prompt) :].cpu())
        settle(self._device)
        return drawn

    def _pick_size(self, prompt: Sequence[int], new_tokens: int, most: int, **settings: Any) -> str:
        def rate(size: int) -> float:
            self._size = size
            since = time.perf_counter()
            self._generate(prompt, size, new_tokens, **settings)
            return size / (time.perf_counter() - since)

        self._generate(prompt, 1, new_tokens, **settings)  # the first call sets things up
        sizes = sorted({min(size, most) for size in self._sizes})
        self._size, tried = quickest(sizes, rate, "answers")
        return f"batch size {self._size} ({tried})"


class Population(_Generating):
    """Many answers to one prompt, each of exactly so many tokens."""

    def __init__(
        self, prompt: list[int], participants: int, drawn: int, new_tokens: int, **given: Any
    ) -> None:
        super().__init__(**given)
        self._prompt, self._new_tokens = prompt, new_tokens
        self._participants, self._drawn = participants, drawn

    def prepare(self) -> dict[str, Any]:
        """Greedy tokens to compare; picks the batch size."""
        since = time.perf_counter()
        exactly = {"min_new_tokens": self._new_tokens}
        said = self._pick_size(self._prompt, self._new_tokens, self._drawn, **exactly)
        found: dict[str, Any] = {}
        if self._with_weights:
            greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
            tokens = self._generate(self._prompt, 1, self._new_tokens, **exactly, **greedy)
            found["greedy"] = tokens[0][0].tolist()
        return found | {"seconds": time.perf_counter() - since, "said": said}

    def round(self) -> dict[str, Any]:
        """Draws the stated share; `whole` is the time that all participants would take."""
        seconds = [self._timed(tokens) for tokens in (1, self._new_tokens)]
        batches = -(-self._drawn // self._size)
        steps = (seconds[1] - seconds[0]) / batches / (self._new_tokens - 1)
        return {
            "participants": self._drawn,
            "seconds": seconds[1],
            "whole": seconds[1] * self._participants / self._drawn,
            # Of all participants: a step here serves one batch.
            "step": steps * self._participants / min(self._size, self._drawn),
        }

    def _timed(self, new_tokens: int) -> float:
        since = time.perf_counter()
        self._generate(self._prompt, self._drawn, new_tokens, min_new_tokens=new_tokens)
        return time.perf_counter() - since


class Answers(_Generating):
    """Answers to several games, sampled and parsed."""

    def __init__(self, answers: int, drawn: int, new_tokens: int, **given: Any) -> None:
        super().__init__(**given)
        self._answers, self._drawn, self._new_tokens = answers, drawn, new_tokens
        self._tokenizer: Any = AutoTokenizer.from_pretrained(self._directory)
        self._questions = json.loads(
            (self._directory / "questions.json").read_text(encoding="utf-8")
        )

    def prepare(self) -> dict[str, Any]:
        """Log-probabilities of some answers, by a plain forward pass; picks the batch size."""
        since = time.perf_counter()
        prompt = next(iter(self._questions.values()))["prompt"]
        found: dict[str, Any] = {"said": self._pick_size(prompt, self._new_tokens, self._drawn)}
        if self._with_weights:
            found["log_probs"] = {
                name: [self._log_prob(question["prompt"], ids) for ids in question["checked"]]
                for name, question in self._questions.items()
            }
        return found | {"seconds": time.perf_counter() - since}

    def round(self) -> dict[str, Any]:
        """Draws and parses the stated share of every game's answers."""
        since = time.perf_counter()
        parsed = 0
        for name, question in self._questions.items():
            answers = games.get(name).answers
            for ids in self._generate(question["prompt"], self._drawn, self._new_tokens):
                texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
                parsed += sum(answers.parse(text).position is not None for text in texts)
        seconds = time.perf_counter() - since
        return {
            "answers": self._drawn * len(self._questions),
            "seconds": seconds,
            "whole": seconds * self._answers / self._drawn,
            "parsed": parsed,
        }

    def _log_prob(self, prompt: list[int], answer: list[int]) -> float:
        ids = torch.tensor([prompt + answer], device=TORCH[self._device])
        with torch.inference_mode():
            logits = self._model(ids).logits[0, len(prompt) - 1 : -1].double()
        chosen = torch.tensor(answer, device=ids.device)[:, None]
        return float(logits.log_softmax(-1).gather(1, chosen).sum())

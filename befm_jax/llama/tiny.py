"""A small Llama: a SentencePiece tokenizer trained on given texts, and seeded random weights."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import sentencepiece
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from befm_jax.errors import UserError
from befm_jax.llama import model
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.tokenizer import LLAMA3_SPECIAL, LLAMA3_TEMPLATE, Tokenizer

# Whole numbers of up to three digits are one token each, as in Llama 3's vocabulary.
_NUMBERS = [str(number) for number in range(1000)]


def train_tokenizer(texts: Iterable[str], pieces: int = 600) -> Tokenizer:
    """A SentencePiece BPE tokenizer trained on texts, with Llama 3's chat template.

    The vocabulary is bytes, the numbers 0 to 999, Llama 3's special tokens and about `pieces`
    learnt pieces (fewer where the texts have fewer).  The SentencePiece model is converted to a
    Hugging Face fast tokenizer, which transformers loads.

    Raises:
        UserError: SentencePiece fails: no text, or fewer pieces than there are characters.
    """
    written = io.BytesIO()
    fixed = len(_NUMBERS) + 256 + 1
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in texts for line in text.splitlines() if line),
            model_writer=written,
            model_type="bpe",
            vocab_size=fixed + pieces,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=_NUMBERS,
            bos_id=-1,
            eos_id=-1,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"no tokenizer of {pieces} pieces can be trained: {error}") from error
    sentence_piece = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    return Tokenizer(_as_fast(sentence_piece))


def _as_fast(sentence_piece: Any) -> PreTrainedTokenizerFast:
    """The Hugging Face tokenizer with the same pieces, scores and ids; special tokens come last.

    Special tokens are not pieces of the model, so that their names in a text are encoded as text.
    """
    pieces = [sentence_piece.id_to_piece(index) for index in range(sentence_piece.get_piece_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    # SentencePiece ranks pieces and merges the two neighbours that make the best-ranked one, so a
    # piece gives one merge for every pair that it splits into, in the order of the pieces.
    merges = [
        (piece[:at], piece[at:])
        for piece in pieces
        if not (
            sentence_piece.is_byte(vocabulary[piece])
            or sentence_piece.is_unknown(vocabulary[piece])
        )
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    fast = FastTokenizer(
        models.BPE(
            vocabulary, merges, unk_token=pieces[sentence_piece.unk_id()], byte_fallback=True
        )
    )
    fast.normalizer = normalizers.Replace(" ", "\u2581")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast.add_tokens(_NUMBERS)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=LLAMA3_SPECIAL[0],
        eos_token=LLAMA3_SPECIAL[1],
        additional_special_tokens=list(LLAMA3_SPECIAL[2:]),
        chat_template=LLAMA3_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def init_params(config: LlamaConfig, seed: int, embedding_scale: float) -> model.Params:
    """Seeded random float32 parameters, made with NumPy (no compilation).

    Matrices are normal with standard deviation `1 / sqrt(in)`, divided by `sqrt(2 L)` for residual
    outputs (GPT-2's rule); norms are ones.  `embedding_scale` is the standard deviation of the
    embeddings and of the head.  It limits how far LoRA can move a tiny model's answers: with the
    usual 0.02, training on uniform answers leaves the number tokens nearly parallel, and a
    low-rank update can no longer separate them.
    """
    random = np.random.default_rng(seed)
    flat = {}
    for path, leaf in flax.traverse_util.flatten_dict(model.shapes(config)).items():
        if path[-1] == "bias":
            flat[path] = jnp.zeros(leaf.shape)
        elif path[-2].endswith("norm"):
            flat[path] = jnp.ones(leaf.shape)
        else:
            scale = embedding_scale
            if path[0] == "layers":
                scale = 1 / math.sqrt(leaf.shape[-1])
                if path[-2] in ("o_proj", "down_proj"):
                    scale /= math.sqrt(2 * config.num_hidden_layers)
            draw = random.standard_normal(leaf.shape, np.float32)
            flat[path] = jnp.asarray(draw * np.float32(scale))
    return flax.traverse_util.unflatten_dict(flat)

"""A tokenizer of each of the two common kinds, with a small vocabulary."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from paged_ref.core.model.tokenizer import Tokenizer

EOS = 0  # in both vocabularies


def byte_level() -> Tokenizer:
    """GPT-2's way: every byte is a token, a space belongs to the word that follows it. No BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<eos>", *alphabet, "th", "the", "Ġthe", "Ã©"]
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ã", "©")],
        )
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer(inner)


def sentencepiece() -> Tokenizer:
    """Llama 2's way: ▁ for a space, one more in front, bytes for what has no token. The template adds BOS."""
    words = [
        "</s>",
        "<s>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcthe",
        "▁th",
        "▁the",
        "▁a",
    ]
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate([*words, "▁t"])},
            merges=[("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    return Tokenizer(inner)


TOKENIZERS = {"byte-level": byte_level(), "sentencepiece": sentencepiece()}
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)

"""Encoding, decoding, and text that streams: for a byte-level and for a SentencePiece-style vocabulary."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from paged_ref.core.model.tokenizer import REPLACEMENT, TextStream, Tokenizer

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


def pieces_of(tokenizer: Tokenizer, ids: list[int], prompt_len: int) -> list[str]:
    stream = TextStream(tokenizer, ids[:prompt_len])
    return [stream.push(token_id) for token_id in ids[prompt_len:]] + [stream.flush()]


def prompt_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The prompt's text without a last character that is not complete."""
    return tokenizer.decode(ids).rstrip(REPLACEMENT)


def test_the_template_decides_about_bos() -> None:
    assert TOKENIZERS["byte-level"].encode("") == []
    assert TOKENIZERS["sentencepiece"].encode("a")[0] == 1


@each_tokenizer
def test_decode_undoes_encode(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    text = "the cat\nthé 猫 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@each_tokenizer
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=[REPLACEMENT])), data=st.data())
def test_pieces_join_to_the_text_and_show_no_half_character(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    prompt_len = data.draw(st.integers(0, len(ids)))
    pieces = pieces_of(tokenizer, ids, prompt_len)
    assert prompt_text(tokenizer, ids[:prompt_len]) + "".join(pieces) == tokenizer.decode(ids)
    if tokenizer.decode(ids) and prompt_len < len(ids):
        assert REPLACEMENT not in "".join(pieces)


@given(ids=st.lists(st.integers(0, 260)), data=st.data())
def test_bytes_that_are_no_text_lose_nothing(ids: list[int], data: st.DataObject) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    prompt_len = data.draw(st.integers(0, len(ids)))
    pieces = pieces_of(tokenizer, ids, prompt_len)
    assert prompt_text(tokenizer, ids[:prompt_len]) + "".join(pieces) == tokenizer.decode(ids)


def test_a_character_waits_for_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("a🙂b")
    assert pieces_of(tokenizer, ids, 0) == ["a", "", "", "", "🙂", "b", ""]
    assert pieces_of(tokenizer, ids[:3], 0) == ["a", "", "", REPLACEMENT]  # cut off: flush says so
    assert pieces_of(tokenizer, ids, 3) == ["", "🙂", "b", ""]  # the prompt ends inside it


def test_the_space_before_the_first_piece_belongs_to_it() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("the the")
    assert len(ids) == 3  # BOS, ▁the, ▁the
    assert pieces_of(tokenizer, ids, 2) == [" the", ""]
    assert pieces_of(tokenizer, ids, 1) == ["the", " the", ""]


def test_a_special_token_in_between_keeps_the_space() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    the = tokenizer.encode("the")[1]
    assert pieces_of(tokenizer, [the, EOS, the, EOS, EOS, the], 0) == ["the", "", " the", "", "", " the", ""]

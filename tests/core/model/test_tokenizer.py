"""Encoding, decoding, and text that streams: for a byte-level and for a SentencePiece-style vocabulary."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.vocabularies import EOS, TOKENIZERS, each_tokenizer

from paged_ref.core.model.tokenizer import REPLACEMENT, TextStream, Tokenizer


def pieces_of(tokenizer: Tokenizer, ids: list[int], prompt_len: int) -> list[str]:
    stream = TextStream(tokenizer, ids[:prompt_len])
    return [stream.push(token_id) for token_id in ids[prompt_len:]] + [stream.flush()]


def prompt_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The prompt's text without a last character that is not complete. One that is has the same tokens again."""
    text = tokenizer.decode(ids)
    return text if tokenizer.encode(text)[-3:] == ids[-3:] else text.rstrip(REPLACEMENT)


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


@each_tokenizer
@pytest.mark.parametrize("prompt", ["\ufffd", "the \ufffd", "a\ufffd\ufffd", "\ufffd\ufffd\ufffd"])
def test_a_replacement_character_in_the_prompt_stays_there(name: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(prompt)
    more = tokenizer.encode(prompt + "cat\ufffd")[len(ids) :]
    pieces = pieces_of(tokenizer, ids + more, len(ids))
    assert "".join(pieces) == "cat\ufffd"

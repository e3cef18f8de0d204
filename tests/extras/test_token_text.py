"""The text of single tokens, as screens show it."""

from __future__ import annotations

from support.vocabularies import EOS, TOKENIZERS, each_tokenizer

from paged_ref.extras.token_text import token_text


@each_tokenizer
def test_token_text_is_one_readable_line(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert [token_text(tokenizer, i) for i in tokenizer.encode("a the")][-1] == "·the"
    assert token_text(tokenizer, tokenizer.encode("\n")[-1]) == "↵"
    assert token_text(tokenizer, EOS) in ("<eos>", "</s>")
    assert token_text(tokenizer, 999999) == "<999999>"
    for token_id in range(tokenizer.inner.get_vocab_size()):
        text = token_text(tokenizer, token_id)
        assert text
        assert text.isprintable()

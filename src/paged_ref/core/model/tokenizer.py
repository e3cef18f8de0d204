"""Text to token ids and back, over Hugging Face `tokenizers`, and a stream that shows no half character."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for bytes that are no character (yet)


class Tokenizer:
    """The tokenizer.json of a checkpoint, in the form of `tokenizers.Tokenizer`."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`; the tokenizer's own template adds BOS or does not."""
        return self.inner.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.inner.decode(list(ids))


class TextStream:
    """Turns tokens into text as they come. The pieces, joined, are the text that follows the prompt's."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # A piece is the text of a window less the text of its beginning, which is already out: alone, a
        # token would lose its leading space, and half a character would be a replacement character.
        self._window = list(prompt_ids)
        self._shown_ids = len(self._window)  # tokens of the window whose text is out
        self._shown = tokenizer.decode(self._window)
        if self._shown.endswith(REPLACEMENT) and tokenizer.encode(self._shown)[-3:] != self._window[-3:]:
            # The prompt ends inside a character; its bytes come out with the token that completes it. (A replacement
            # character that the prompt does hold, of three bytes, has the same tokens again.)
            self._shown = self._shown.rstrip(REPLACEMENT)

    def push(self, token_id: int) -> str:
        """The text that `token_id` adds; "" while a character is incomplete."""
        self._window = [*self._window, token_id]
        text = self._tokenizer.decode(self._window)
        if text.endswith(REPLACEMENT):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """What is still held back, with replacement characters for bytes that never became a character."""
        return self._emit(self._tokenizer.decode(self._window))

    def _emit(self, text: str) -> str:
        piece = text[len(self._shown) :]
        if piece:
            newest = self._window[self._shown_ids :]
            newest_text = self._tokenizer.decode(newest)
            if REPLACEMENT in newest_text:  # it begins inside a character: the window keeps the rest of it
                newest, newest_text = self._window, text
            self._window, self._shown_ids, self._shown = newest, len(newest), newest_text
        return piece

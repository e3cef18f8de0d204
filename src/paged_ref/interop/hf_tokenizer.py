"""tokenizer.json from elsewhere: tried when it is loaded, so that none of its faults ends the process later.

The tokenizers library is written in Rust. What it did not expect is a panic there, which reaches Python as an exception
that is no Exception, after a report on stderr; and memory that is not there ends the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import tokenizers
from tokenizers import models

from ..core.model.tokenizer import Tokenizer
from ..extras.reading import JSON_LIMIT, read_text

MOST_PADDING = 1 << 24  # tokens; no context is as long
_TRIED = "Hello, 12 \N{LATIN SMALL LETTER E WITH ACUTE}\n\N{GRINNING FACE} a"


class HFTokenizer(Tokenizer):
    """A tokenizer.json of others: each failure of the library is a ValueError."""

    def encode(self, text: str) -> list[int]:
        try:
            return self.inner.encode(text).ids
        except BaseException as error:
            if not _is_failure(error):
                raise
            raise ValueError(f"the tokenizer cannot encode {text[:40]!r}: {error}") from None

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        try:
            return self.inner.decode(ids)
        except BaseException as error:
            if not _is_failure(error):
                raise
            raise ValueError(f"the tokenizer cannot decode {ids[:8]}: {error}") from None


class MissingTokenizer(Tokenizer):
    """In the place of a tokenizer.json that is not there: token ids go in and come out, and have no text."""

    def __init__(self, directory: Path) -> None:
        super().__init__(tokenizers.Tokenizer(models.WordLevel({})))
        self.directory = directory

    def encode(self, text: str) -> list[int]:
        raise ValueError(f"{self.directory} has no tokenizer.json; token ids are needed in place of {text[:40]!r}")

    def decode(self, ids: Iterable[int]) -> str:
        return ""


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Truncation and padding that it asks for are ignored, as transformers does.

    Raises ValueError, in one sentence, where the file is missing, is no tokenizer, or makes the library panic.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing; a tokenizer.json of Hugging Face tokenizers is needed")
    text = read_text(path, JSON_LIMIT)
    try:
        with _without_reports():
            inner = tokenizers.Tokenizer.from_str(text)
            _ignore_padding_and_truncation(inner)
            _try_out(inner)
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    return HFTokenizer(inner)


def _ignore_padding_and_truncation(inner: tokenizers.Tokenizer) -> None:
    padding = inner.padding or {}
    for name in ("length", "pad_to_multiple_of"):
        if (padding.get(name) or 0) > MOST_PADDING:
            raise ValueError(f"it pads to {padding[name]} tokens; at most {MOST_PADDING} are allowed")
    inner.no_padding()
    inner.no_truncation()


def _try_out(inner: tokenizers.Tokenizer) -> None:
    """Encode a text and decode some tokens. An Exception only says that this text has no tokens here; a panic says that
    the library does not know what this file asks for."""
    with suppress(Exception):  # the library raises Exception itself
        inner.encode(_TRIED)
    for token_id in range(256):
        with suppress(Exception):
            inner.decode([token_id])


def _is_failure(error: BaseException) -> bool:
    """Of the library. Its panics have a type that cannot be imported."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def _without_reports() -> Iterator[None]:
    """Rust writes a report of a panic to stderr before Python sees an exception; here the exception says it all."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)

"""Text to learn from: read, split into stories, encoded as tokens, packed into sequences."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ..core.checks import plural
from ..core.model.tokenizer import Tokenizer
from ..extras.reading import read_file

END = "<|endoftext|>"  # between stories, in text files and as a token, as in GPT-2
NUM_BYTES = 256
PIECE = 4096  # characters of a piece, in a text without END


def read_stories(path: Path) -> list[str]:
    """The stories of a text file, plain or .gz, in UTF-8, split at END. Raises ValueError.

    A text that ends inside a character was cut there, and loses that character. A text without END is cut where a line
    ends, into pieces of about PIECE characters.
    """
    raw = read_file(path, unpack=True)
    if b"\0" in raw:
        raise ValueError(f"{path} is not text: it holds zero bytes")
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(raw)  # which waits for the rest of the last character
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is {raw[error.start]:#04x}"
        raise ValueError(f"{path} is not text in UTF-8: {byte}; a text in Latin-1 must be converted") from None
    stories = text.split(END) if END in text else _pieces(text)
    return [story.strip() for story in stories if story.strip()]


def _pieces(text: str) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(piece)
            piece, size = [], 0
    yield "".join(piece)


def hold_out(stories: list[str], share: float) -> tuple[list[str], list[str]]:
    """Stories to learn from, and the last `share` of them to measure on, which are kept from training.

    At least one is held out. Raises ValueError where none would be left to learn from.
    """
    num_held = max(1, round(share * len(stories)))
    if num_held >= len(stories):
        raise ValueError(
            f"the text is too short: {plural(len(stories), 'story')}, or pieces of {PIECE} characters, with {num_held} "
            "held out; at least one must be left to learn from"
        )
    return stories[:-num_held], stories[-num_held:]


def train_tokenizer(stories: Sequence[str], vocab_size: int, whole: str = "") -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016), as GPT-2 has it. Token 0 is END.

    Each word of `whole` becomes one token: that text is repeated until this is so. Raises ValueError where the
    stories have fewer different pieces than the vocabulary, or the words do not fit.
    """
    if vocab_size <= NUM_BYTES:
        raise ValueError(f"--vocab-size is {vocab_size}; more than the {NUM_BYTES} bytes is needed")
    times = 1
    while times <= 4**6:
        tokenizer = _bpe([*stories, *[whole] * times] if whole else stories, vocab_size)
        if tokenizer.get_vocab_size() < vocab_size:
            raise ValueError(
                f"--vocab-size is {vocab_size}; the text has pieces for {tokenizer.get_vocab_size()} tokens only"
            )
        if len(tokenizer.encode(whole).ids) <= len(whole.split()):
            return Tokenizer(tokenizer)
        times *= 4
    raise ValueError(f"--vocab-size is {vocab_size}; too few for each word of {whole[:40]!r} to be a token")


def _bpe(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, stories: Sequence[str]) -> list[np.ndarray]:
    """Each story's token ids, then END: [length] int32. Raises ValueError for a tokenizer without END."""
    end = tokenizer.encode(END)
    if len(end) != 1:
        raise ValueError(f"the tokenizer has no token {END}")
    return [np.array([*tokenizer.encode(story), *end], dtype=np.int32) for story in stories]


def sequences(stories: Sequence[np.ndarray], context: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """All stories in a random order for each epoch, packed into sequences of at most `context` + 1 tokens.

    A sequence begins where a story begins, and holds as many whole stories as fit; only a story that is longer than a
    sequence is cut. At random, every other sequence has an END in front, so that the model learns text with and
    without one.
    """
    rng = np.random.default_rng([seed, epoch])
    end = stories[0][-1:]  # [1]
    parts: list[np.ndarray] = [end] * int(rng.integers(2))
    for index in rng.permutation(len(stories)):
        story = stories[index]
        if parts and sum(map(len, parts)) + len(story) > context + 1:
            if len(parts) > 1 or len(parts[0]) > 1:
                yield np.concatenate(parts)
            parts = [end] * int(rng.integers(2))
        while len(story) > context + 1:
            yield story[: context + 1]
            story, parts = story[context:], []  # the rest has no END before it
        parts.append(story)
    if sum(map(len, parts)) > 1:
        yield np.concatenate(parts)


def batches(stories: Sequence[np.ndarray], context: int, batch_tokens: int, seed: int) -> Iterator[list[np.ndarray]]:
    """Batches of epoch after epoch, without end: sequences with `batch_tokens` inputs, or just more."""
    batch: list[np.ndarray] = []
    epoch, filled = 0, 0
    while True:
        for sequence in sequences(stories, context, seed, epoch):
            batch.append(sequence)
            filled += len(sequence) - 1
            if filled >= batch_tokens:
                yield batch
                batch, filled = [], 0
        epoch += 1

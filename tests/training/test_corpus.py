"""From a text file to batches of token ids."""

from __future__ import annotations

import gzip
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from paged_ref.training.corpus import (
    END,
    batches,
    encode,
    hold_out,
    read_stories,
    sequences,
    train_tokenizer,
)

WORDS = "Four score and seven years ago our fathers brought forth"
STORIES = [f"The {animal} saw a {thing}. It was happy, and so the {animal} ran." for animal in
           ("cat", "dog", "bird", "fish", "fox") for thing in ("tree", "ball", "house", "river")]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_stories_are_read_and_parted(tmp_path: Path, packed: bool) -> None:
    raw = f"one\n{END}\n two lines\nhere \n{END}\n{END}\nthree é".encode()[:-1]  # cut inside the é
    path = tmp_path / "text"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert read_stories(path) == ["one", "two lines\nhere", "three"]


def test_a_text_without_marks_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"line {number} of a long text" for number in range(1000)]
    path = tmp_path / "text"
    path.write_text("\n".join(lines), encoding="utf-8")
    pieces = read_stories(path)
    assert "\n".join(pieces) == "\n".join(lines)
    assert len(pieces) == 6
    assert all(4096 <= len(piece) + 1 < 4200 for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"\0\1\2", "is not text"),
        (gzip.compress(b"abc" * 99)[:-12], "is damaged"),
        (
            "a caf\u00e9 here".encode("latin-1"),
            "is not text in UTF-8: byte 5 is 0xe9; a text in Latin-1 must be converted",
        ),
    ],
    ids=["missing", "binary", "cut short", "latin-1"],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_stories(path)


def test_a_device_a_pipe_and_a_bomb_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(
            ValueError, match=f"{path} cannot be read: it is a pipe or a device; a regular file is needed"
        ):
            read_stories(path)
    bomb = tmp_path / "bomb.gz"
    bomb.write_bytes(gzip.compress(bytes(1 << 26)) * 64)  # 4 MB, and 4 GiB unpacked
    with pytest.raises(
        ValueError, match=r"bomb.gz has \d+ bytes and unpacks to more than \d+; at most that many are read"
    ):
        read_stories(bomb)


def test_the_last_stories_are_held_out_and_never_learned() -> None:
    learned, held = hold_out(STORIES, 0.2)
    assert len(held) == 4
    assert learned + held == STORIES
    assert len(hold_out(STORIES, 0.001)[1]) == 1
    with pytest.raises(ValueError, match="the text is too short: 1 story,"):
        hold_out(STORIES[:1], 0.2)


def test_each_of_the_words_is_one_token_and_any_text_comes_back() -> None:
    tokenizer = train_tokenizer(STORIES, 330, WORDS)
    assert [tokenizer.decode([token]).strip() for token in tokenizer.encode(WORDS)] == WORDS.split()
    text = "Ein Käfer, 2 日本 \n\n\ttabs"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert train_tokenizer(STORIES, 330, WORDS).inner.to_str() == tokenizer.inner.to_str()


@pytest.mark.parametrize(
    ("vocab_size", "words", "reason"),
    [
        (256, "", "--vocab-size is 256; more than the 256 bytes is needed"),
        (5000, "", r"--vocab-size is 5000; the text has pieces for \d+ tokens only"),
        (262, WORDS, "--vocab-size is 262; too few for each word of 'Four score"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(vocab_size: int, words: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        train_tokenizer(STORIES, vocab_size, words)


def test_an_epoch_has_every_story_once_and_begins_sequences_with_one() -> None:
    tokenizer = train_tokenizer(STORIES, 300)
    stories = encode(tokenizer, STORIES)
    assert all(story[-1] == 0 for story in stories)
    packed = list(sequences(stories, 60, seed=1, epoch=0))
    found = Counter(tuple(part) for ids in packed for part in np.split(ids, np.flatnonzero(ids == 0) + 1) if len(part))
    found.pop((0,))  # the marks that some sequences have in front
    assert found == Counter(map(tuple, stories))
    assert all(1 < len(ids) <= 61 for ids in packed)
    assert 0.2 < np.mean([ids[0] == 0 for ids in packed]) < 0.8
    assert len({len(ids) for ids in packed}) > 1
    again, other = (list(sequences(stories, 60, seed=1, epoch=epoch)) for epoch in (0, 1))
    assert all(map(np.array_equal, packed, again))
    assert not all(map(np.array_equal, packed, other))


@pytest.mark.parametrize("epoch", range(4))
def test_a_story_longer_than_the_context_is_cut_and_every_token_is_still_a_target_once(epoch: int) -> None:
    story = np.array([*range(1, 30), 0])
    packed = list(sequences([story], 8, seed=0, epoch=epoch))
    assert [len(ids) for ids in packed] == [9, 9, 9, 6]
    assert [int(token) for ids in packed for token in ids[1:]] == [*range(2, 30), 0]


def test_batches_have_the_tokens_asked_for_epoch_after_epoch() -> None:
    stories = encode(train_tokenizer(STORIES, 300), STORIES)
    for batch in islice(batches(stories, 40, 100, seed=0), 30):
        sizes = [len(ids) - 1 for ids in batch]
        assert sum(sizes[:-1]) < 100 <= sum(sizes)

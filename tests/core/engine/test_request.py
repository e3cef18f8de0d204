"""A request without an engine: how logits become tokens and text, when a sample ends, and what is held back."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import pytest

from paged_ref.core.engine.outputs import RequestOutput, SequenceOutput, TokenOutput
from paged_ref.core.engine.request import Request, Sample
from paged_ref.core.engine.sampling import SamplingParams, random_generator
from paged_ref.core.engine.sequence import Group, Sequence
from paged_ref.core.model.loading import load
from paged_ref.core.model.tokenizer import TextStream

TOKENIZER = load("tiny").tokenizer
VOCAB_SIZE = load("tiny").config.vocab_size
PROMPT = TOKENIZER.encode("Four score and seven years ago our")
EOS = 0


class Host:
    """What a request asks of the engine, written down."""

    def __init__(self) -> None:
        self.eos_token_ids = frozenset({EOS})
        self.next_seq_id = 10
        self.forks: list[tuple[int, int]] = []
        self.ended: list[tuple[int, str]] = []

    def fork(self, request: Request, parent: Sequence, child: Sequence) -> None:
        self.forks.append((parent.seq_id, child.seq_id))
        request.groups[0].seqs.append(child)

    def add_token(self, seq: Sequence, token_id: int) -> None:
        seq.tokens.append(token_id)

    def end_sequence(self, request: Request, seq: Sequence, reason: str) -> None:
        self.ended.append((seq.seq_id, reason))
        group = request.remove(seq)
        if group is not None:
            group.seqs.remove(seq)


def request(params: SamplingParams, max_len: int = 100) -> Request:
    seqs = [Sequence(i, PROMPT.copy(), len(PROMPT), max_len) for i in range(params.n)]
    output = RequestOutput(0, None, PROMPT, [SequenceOutput(i) for i in range(params.n)], arrival=0.0)
    samples = [
        Sample(seq, output.outputs[i], random_generator(params, i), TextStream(TOKENIZER, PROMPT))
        for i, seq in enumerate(seqs)
    ]
    by_id = {sample.seq.seq_id: sample for sample in samples}
    return Request(output, params, [Group(seqs[:1], params.n)], by_id, to_fork=samples[1:])


def logits_for(token_id: int) -> np.ndarray:
    logits = np.zeros(VOCAB_SIZE, np.float32)
    logits[token_id] = 100
    return logits


def say(params: SamplingParams, ids: SequenceOf[int], max_len: int = 100) -> tuple[list[TokenOutput], Request, Host]:
    """Each of these tokens in its turn, until the sample ends."""
    made, host = request(params, max_len), Host()
    tokens: list[TokenOutput] = []
    for token_id in ids:
        tokens += made.take_logits(host, made.samples[0].seq, logits_for(token_id))
        if host.ended:
            break
    return tokens, made, host


def test_tokens_become_text() -> None:
    ids = TOKENIZER.encode(" fathers brought forth")
    tokens, made, host = say(SamplingParams(), ids)
    assert [token.token_id for token in tokens] == made.output.outputs[0].token_ids == ids
    assert "".join(token.text for token in tokens) == made.output.outputs[0].text == " fathers brought forth"
    assert {token.finish_reason for token in tokens} == {None}
    assert host.ended == []


def test_a_token_id_alone_is_enough_where_no_logits_are_needed() -> None:
    made, host = request(SamplingParams()), Host()
    (token,) = made.take_logits(host, made.samples[0].seq, np.array(7))
    assert token.token_id == 7
    assert not made.needs_logits
    assert request(SamplingParams(temperature=1.0)).needs_logits
    assert request(SamplingParams(logits_hook=lambda tokens, logits: logits)).needs_logits


@pytest.mark.parametrize(
    ("params", "reason", "text"),
    [
        (SamplingParams(), "stop", " fathers"),
        (SamplingParams(ignore_eos=True), None, " fathers brought"),
        (SamplingParams(ignore_eos=True, stop_token_ids=[EOS]), "stop", " fathers"),
    ],
)
def test_the_end_of_sequence_ends_a_sample_and_is_no_text(params: SamplingParams, reason: str, text: str) -> None:
    ids = [*TOKENIZER.encode(" fathers"), EOS, *TOKENIZER.encode(" brought")]
    tokens, made, host = say(params, ids)
    output = made.output.outputs[0]
    assert (output.finish_reason, output.text) == (reason, text)
    assert tokens[-1].finish_reason == reason
    assert host.ended == ([(0, "stop")] if reason else [])


def test_the_length_ends_a_sample() -> None:
    ids = TOKENIZER.encode(" fathers brought forth")
    tokens, made, host = say(SamplingParams(), ids, max_len=len(PROMPT) + 2)
    assert (len(tokens), made.output.outputs[0].finish_reason) == (2, "length")
    assert host.ended == [(0, "length")]
    assert made.unfinished() == []


@pytest.mark.parametrize("stop", ["brought", "ers b", " fathers brought f", "forth", "zzz", "fa"])
def test_text_before_a_stop_string_is_shown_and_nothing_of_the_string(stop: str) -> None:
    whole = " fathers brought forth"
    tokens, made, _ = say(SamplingParams(stop=[stop, "never"]), [*TOKENIZER.encode(whole), EOS])
    assert "".join(token.text for token in tokens) == made.output.outputs[0].text == whole.partition(stop)[0]
    assert made.output.outputs[0].finish_reason == "stop"


def test_text_that_may_begin_a_stop_string_waits() -> None:
    for stops, piece, shown, hit in ((["end", "e"], "the en", "th", "e"), (["then", "the"], "then", "", "then")):
        made = request(SamplingParams(stop=stops))
        assert made.release_text(made.samples[0], piece, last=False) == (shown, hit)
    made = request(SamplingParams(stop=["end"]))
    assert made.release_text(made.samples[0], "the en", last=False) == ("the ", None)
    assert made.release_text(made.samples[0], "ough", last=False) == ("enough", None)
    assert made.release_text(made.samples[0], " en", last=False) == (" ", None)
    assert made.release_text(made.samples[0], "", last=True) == ("en", None)


def test_samples_begin_with_the_leaders_first_logits() -> None:
    made, host = request(SamplingParams(n=3, temperature=1.0, seed=3)), Host()
    leader = made.samples[0].seq
    assert [seq.seq_id for seq in made.unfinished()] == [1, 2, 0]
    tokens = made.take_logits(host, leader, np.zeros(VOCAB_SIZE, np.float32))
    assert [token.index for token in tokens] == [0, 1, 2]
    assert host.forks == [(0, 1), (0, 2)]
    assert len({token.token_id for token in tokens}) > 1  # each draws with random numbers of its own
    for i, token in enumerate(tokens):
        alone, other = request(SamplingParams(temperature=1.0, seed=3 + i)), Host()
        (single,) = alone.take_logits(other, alone.samples[0].seq, np.zeros(VOCAB_SIZE, np.float32))
        assert single.token_id == token.token_id
    assert len(made.take_logits(host, leader, logits_for(5))) == 1


def test_a_sample_that_never_began_leaves_no_group() -> None:
    made = request(SamplingParams(n=2))
    child = made.to_fork[0].seq
    assert made.remove(child) is None
    assert [seq.seq_id for seq in made.unfinished()] == [0]
    assert made.remove(made.samples[0].seq) is made.groups[0]

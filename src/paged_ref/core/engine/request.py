"""A request inside the engine: its sequences, and what turns logits into its tokens and text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..model.tokenizer import TextStream
from .outputs import FinishReason, RequestOutput, SequenceOutput, TokenOutput
from .sampling import SamplingParams, apply_logits_hook, draw
from .sequence import Group, Sequence


class RequestHost(Protocol):
    """What a request asks of the engine that runs it."""

    eos_token_ids: frozenset[int]
    next_seq_id: int  # of a sequence that is new

    def fork(self, request: Request, parent: Sequence, child: Sequence) -> None:
        """`child` goes on from where `parent` is, and shares the memory of `parent`."""

    def add_token(self, seq: Sequence, token_id: int) -> None:
        """The sequence has one more token."""

    def end_sequence(self, request: Request, seq: Sequence, reason: str) -> None:
        """Free the memory of the sequence. The request ends with its last sequence."""


@dataclass(eq=False, slots=True)
class Sample:
    """A sequence, its output so far, and what its next tokens need."""

    seq: Sequence
    output: SequenceOutput
    rng: np.random.Generator
    text: TextStream
    held_back: str = ""  # the end of the text, while it might be the beginning of a stop string

    def release_text(self, fresh: str, stops: Collection[str], last: bool) -> tuple[str, bool]:
        """Add `fresh` text. Returns what can be shown now, and whether a stop string ended it."""
        text = self.held_back + fresh
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], True
        keep = 0 if last else max((_overlap(text, stop) for stop in stops), default=0)
        self.held_back = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


@dataclass(eq=False)
class Request:
    """An unfinished request, whose samples draw their tokens one by one.

    The samples are sequences of one group where the manager can fork, else each is a group of its own.
    """

    output: RequestOutput
    params: SamplingParams
    groups: list[Group]
    samples: dict[int, Sample] = field(default_factory=dict)  # by seq_id, unfinished
    to_fork: list[Sample] = field(default_factory=list)  # begin when the leader's prompt is computed

    @property
    def needs_logits(self) -> bool:
        """False: only the place of the largest logit matters."""
        return self.params.temperature != 0 or self.params.logits_hook is not None

    def take_logits(self, host: RequestHost, seq: Sequence, logits: np.ndarray) -> list[TokenOutput]:
        """The next token of `seq`, from `logits [vocab_size]`, or from the token id alone if no logits are needed."""
        samples = [self.samples[seq.seq_id], *self.to_fork]
        for sibling in self.to_fork:  # the siblings share the prompt's blocks from here on
            host.fork(self, seq, sibling.seq)
        self.to_fork = []
        tokens = []
        for sample in samples:
            if logits.ndim == 0:
                token_id = int(logits)
            else:
                token_id = draw(apply_logits_hook(logits, sample.seq, self.params), self.params, sample.rng)
            tokens.append(self._accept(host, sample, token_id))
        return tokens

    def _accept(self, host: RequestHost, sample: Sample, token_id: int) -> TokenOutput:
        """Append a token to a sample, bring its text up to date, and end the sample if this was its last token."""
        params, seq, output = self.params, sample.seq, sample.output
        host.add_token(seq, token_id)
        output.token_ids.append(token_id)
        reason: FinishReason | None = None
        if (token_id in host.eos_token_ids and not params.ignore_eos) or token_id in params.stop_token_ids:
            reason = "stop"
        elif len(seq.tokens) >= seq.max_len:
            reason = "length"
        fresh = "" if reason == "stop" else sample.text.push(token_id)
        if reason is not None:
            fresh += sample.text.flush()
        text, hit = sample.release_text(fresh, params.stop, last=reason is not None)
        output.text += text
        if hit:
            reason = "stop"
        if reason is not None:
            output.finish_reason = reason
            host.end_sequence(self, seq, reason)
        return TokenOutput(self.output.request_id, output.index, token_id, text, reason)

    def unfinished(self) -> list[Sequence]:
        """The sequences that have not ended, those that have not begun first."""
        return [*(sample.seq for sample in self.to_fork), *(seq for group in self.groups for seq in group.seqs)]

    def remove(self, seq: Sequence) -> Group | None:
        """Forget a sequence; return the group that it has to leave, None if it never joined one."""
        sample = self.samples.pop(seq.seq_id, None)
        if sample in self.to_fork:
            self.to_fork = [other for other in self.to_fork if other is not sample]
            return None
        return next(group for group in self.groups if seq in group.seqs)

"""Beam search: a kind of request, whose sequences are the beams.

The rules are those of transformers' generate(num_beams=k, early_stopping=False). The blocks of the KV cache follow by
reference counts: a beam that goes on twice is forked, a beam that does not go on is freed (Kwon et al. 2023, §4.4,
Fig. 9).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from ..core.engine.outputs import FinishReason, RequestOutput, SequenceOutput, TokenOutput
from ..core.engine.request import Request, RequestHost
from ..core.engine.sampling import apply_logits_hook
from ..core.engine.sequence import Group, Sequence
from ..core.model.tokenizer import TextStream, Tokenizer
from .sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A beam that came to its end."""

    score: float  # log-probability / length ** length_penalty
    tokens: list[int]  # generated, the end of sequence included
    stopped: bool  # by an end-of-sequence token, not by the length


@dataclass(frozen=True, slots=True)
class Continuation:
    """A beam, by its place among the beams, and the token that it goes on with."""

    beam: int
    token_id: int
    log_probability: float  # of all generated tokens


@dataclass(slots=True)
class BeamSearch:
    """The search of one request. `log_probabilities` has one entry for each running beam."""

    width: int
    length_penalty: float
    log_probabilities: list[float] = field(default_factory=lambda: [0.0])
    finished: list[Hypothesis] = field(default_factory=list)  # the best first, at most `width`

    def step(
        self, logits: SequenceOf[np.ndarray], generated: SequenceOf[list[int]], eos: Collection[int], is_last: bool
    ) -> list[Continuation]:
        """Choose the beams that go on, the best first; [] when the search is over.

        `logits` [vocab_size] and `generated` tokens of each running beam; `is_last`: the length ends here.
        """
        scores = np.stack([
            log_softmax(row) + so_far for row, so_far in zip(logits, self.log_probabilities, strict=True)
        ])  # [beams, vocab_size]  # fmt: skip
        # Enough candidates that `width` of them go on even if all the others end.
        best = np.argsort(-scores, axis=None, kind="stable")[: (len(eos) + 1) * self.width]
        going_on: list[Continuation] = []
        length = len(generated[0]) + 1
        for rank, place in enumerate(best):
            beam, token_id = (int(i) for i in np.unravel_index(place, scores.shape))
            score = float(scores[beam, token_id])
            if score == -math.inf:
                break  # a hook forbids this token, and those behind it: fewer beams go on
            stopped = token_id in eos
            if not (stopped or is_last):
                going_on.append(Continuation(beam, token_id, score))
            elif rank < self.width:
                tokens = [*generated[beam], token_id]
                self.finished.append(Hypothesis(score / length**self.length_penalty, tokens, stopped))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self.width :]
        going_on = going_on[: self.width]
        if not going_on:
            return []
        if len(self.finished) == self.width:
            possible = going_on[0].log_probability / length**self.length_penalty
            if possible <= self.finished[-1].score:
                return []
        self.log_probabilities = [continuation.log_probability for continuation in going_on]
        return going_on


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    log_probabilities: np.ndarray = wide - np.log(np.exp(wide).sum())
    return log_probabilities


class BeamRequest(Request):
    """A request that is searched. Its only group has one sequence for each beam, in the order of their rank."""

    def __init__(
        self,
        output: RequestOutput,
        params: SamplingParams,
        group: Group,
        tokenizer: Tokenizer,
        on_reordered: Callable[[list[tuple[Sequence, Sequence]]], None] | None = None,
    ) -> None:
        """`on_reordered` is called with the pairs (beam of the last step, sequence that goes on from it)."""
        super().__init__(output, params, [group])
        self.search = BeamSearch(group.width, params.length_penalty)
        self.tokenizer = tokenizer
        self.on_reordered = on_reordered
        self._logits: dict[int, np.ndarray] = {}  # by seq_id, until all beams have theirs

    @property
    def needs_logits(self) -> bool:
        return True

    def take_logits(self, host: RequestHost, seq: Sequence, logits: np.ndarray) -> list[TokenOutput]:
        """Once every beam has its logits: choose which go on, or end the search and give the results."""
        self._logits[seq.seq_id] = apply_logits_hook(logits, seq, self.params)
        beams = self.groups[0].seqs.copy()
        if len(self._logits) < len(beams):
            return []
        self.output.first_token = self.output.first_token or time.perf_counter()
        chosen = self.search.step(
            [self._logits[seq.seq_id] for seq in beams],
            [seq.tokens[seq.prompt_len :] for seq in beams],
            {*self.params.stop_token_ids, *(() if self.params.ignore_eos else host.eos_token_ids)},
            is_last=len(beams[0].tokens) + 1 >= beams[0].max_len,
        )
        self._logits.clear()
        if not chosen:
            return self._finish(host)
        self._go_on(host, beams, chosen)
        return []

    def _go_on(self, host: RequestHost, beams: list[Sequence], chosen: list[Continuation]) -> None:
        """Fork the beams that go on more than once, free those that do not, and append the tokens."""
        parents = [beams[continuation.beam] for continuation in chosen]
        going_on: list[Sequence] = []
        for parent in parents:
            seq = parent
            if parent in going_on:  # it goes on once more
                seq = Sequence(host.next_seq_id, parent.tokens.copy(), parent.prompt_len, parent.max_len)
                host.fork(self, parent, seq)
            going_on.append(seq)
        for seq in beams:
            if seq not in going_on:
                host.end_sequence(self, seq, "beam dropped")
        if self.on_reordered:
            self.on_reordered(list(zip(parents, going_on, strict=True)))
        for seq, continuation in zip(going_on, chosen, strict=True):
            host.add_token(seq, continuation.token_id)
        self.groups[0].seqs.sort(key=going_on.index)  # the log-probabilities are in this order

    def _finish(self, host: RequestHost) -> list[TokenOutput]:
        outputs, request_id = self.output.outputs, self.output.request_id
        outputs += [self._output(index, hypothesis) for index, hypothesis in enumerate(self.search.finished)]
        for seq in self.unfinished():
            host.end_sequence(self, seq, "beam search ended")
        return [
            TokenOutput(request_id, output.index, output.token_ids[-1], output.text, output.finish_reason)
            for output in outputs
        ]

    def _output(self, index: int, hypothesis: Hypothesis) -> SequenceOutput:
        text = TextStream(self.tokenizer, self.output.prompt_token_ids)
        shown = hypothesis.tokens[:-1] if hypothesis.stopped else hypothesis.tokens
        pieces = [text.push(token_id) for token_id in shown]
        reason: FinishReason = "stop" if hypothesis.stopped else "length"
        return SequenceOutput(index, "".join(pieces) + text.flush(), hypothesis.tokens, reason, hypothesis.score)

"""Requests that ask for more than the core's do: changed logits, log-probabilities, other ends and other text.

Only these requests cost anything: a step without one of them is the core's step. What is remembered of a sequence is
made from its tokens, so preemption, swaps, forks and an undone step need no care here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import tokenizers

from ..core.device import Array, xp
from ..core.engine.outputs import TokenOutput
from ..core.engine.request import Request, RequestHost, Sample, overlap
from ..core.engine.scheduler import Scheduler, StepPlan
from ..core.engine.sequence import Group
from ..core.engine.sequence import Sequence as TokenSequence
from ..core.model.llama import StepInputs
from ..core.model.tokenizer import TextStream, Tokenizer
from .logits import Row, shape_logits
from .logprobs import token_logprobs
from .memory_limit import require_memory
from .prefix_cache import CachingBlockPool
from .sampling_params import SamplingParams
from .transaction import TransactionalEngine

ENTRY_BYTES = 200  # that one log-probability takes: an entry of a dict, its numbers, its text


class WholeText(Tokenizer):
    """A tokenizer whose text shows special tokens."""

    def decode(self, ids: Iterable[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=False)


class Vocabulary:
    """The tokens of a model, as parameters name them."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        """`size`: of the model's vocabulary, beyond which no token id is known."""
        self.tokenizer, self.size = tokenizer, size
        added = tokenizer.inner.get_added_tokens_decoder()
        self.special = {token.content: token_id for token_id, token in added.items() if token.special}
        self._texts: dict[int, str | None] = {}

    def text(self, token_id: int) -> str | None:
        """The text of one token alone; None where there is no tokenizer."""
        if token_id not in self._texts:
            inner: tokenizers.Tokenizer = self.tokenizer.inner
            known = inner.get_vocab_size() > 0
            self._texts[token_id] = inner.decode([token_id], skip_special_tokens=False) if known else None
        return self._texts[token_id]

    def check(self, params: SamplingParams, prompt_len: int, max_len: int) -> None:
        """Raise ValueError for a token id, or a number of tokens, that this vocabulary does not have, and for more
        log-probabilities than fit in memory: `max_len` is the length at which a sequence ends."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            unknown = [i for i in getattr(params, name) or () if not 0 <= i < self.size]
            if unknown:
                raise ValueError(f"{name} holds token id {unknown[0]}; known are 0 to {self.size - 1}")
        places = {"logprobs": params.n * (max_len - prompt_len), "prompt_logprobs": prompt_len}
        for name, num_tokens in places.items():
            count = getattr(params, name)
            if count is None:
                continue
            if count > self.size:
                raise ValueError(f"{name} is {count}; the vocabulary has {self.size} tokens")
            entries = num_tokens * (self.size if count < 0 else count + 1)
            require_memory(f"{name} is {count}, for {num_tokens} tokens: a request of this size", ENTRY_BYTES * entries)

    def special_stops(self, params: SamplingParams) -> dict[int, str]:
        """Token id -> stop text, of the stop texts that are special tokens.

        Where special tokens are no text, a stop text that holds one among other characters is refused, since no output
        could ever contain it: ValueError.
        """
        if not params.skip_special_tokens:
            return {}
        found = {self.special[stop]: stop for stop in params.stop if stop in self.special}
        for stop in params.stop:
            inside = [content for content in self.special if content in stop and stop not in found.values()]
            if inside:
                raise ValueError(
                    f"stop holds {stop!r}, which contains the special token {inside[0]!r}; no text contains it unless "
                    "skip_special_tokens is False"
                )
        return found

    def bad_words(self, params: SamplingParams) -> list[list[int]]:
        """The tokens of each bad word, and where it has other tokens after a space, of that form too."""
        found: list[list[int]] = []
        for word in params.bad_words:
            plain, spaced = (self._encode(f"{space}{word.lstrip()}") for space in ("", " "))
            if not plain:
                raise ValueError(f"bad_words holds {word!r}, which has no tokens")
            found.append(plain)
            if spaced[-len(plain) :] != plain:
                found.append(spaced)
        return found

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.inner.encode(text, add_special_tokens=False).ids
        return ids


class ShapedRequest(Request):
    """A request with parameters that the core does not have."""

    logits_from = "the model and what allowed_token_ids, bad_words, min_tokens and logit_bias leave"

    def __init__(self, plain: Request, params: SamplingParams, vocabulary: Vocabulary, eos: Collection[int]) -> None:
        """`plain` is the same request as the core makes it. Raises ValueError as Vocabulary does."""
        self._special_stops = vocabulary.special_stops(params)
        self.bad_words = vocabulary.bad_words(params)
        self.shaping = params  # `params` with the special tokens among the stop texts as token ids
        texts = tuple(stop for stop in params.stop if stop not in self._special_stops.values())
        params = replace(params, stop=texts, stop_token_ids=(*params.stop_token_ids, *self._special_stops))
        super().__init__(plain.output, params, plain.groups, plain.samples, plain.to_fork)
        self.shows_stop_token = params.include_stop_str_in_output
        ends = {i for i in (*params.stop_token_ids, *eos) if i < vocabulary.size}
        self.stop_ids = np.array(sorted(ends), dtype=np.int64)
        self.prompt_ids = np.unique(plain.output.prompt_token_ids).astype(np.int64)
        allowed = params.allowed_token_ids
        self.allowed = None if allowed is None else np.array(sorted(set(allowed)), dtype=np.int64)
        self._counts: dict[int, tuple[int, dict[int, int]]] = {}  # by seq_id: the length and the tokens of the output
        # The sequence whose prompt is scored, until all of it is.
        self.to_score: TokenSequence | None = None
        if params.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None]
            self.to_score = self.groups[0].leader if len(self.output.prompt_token_ids) > 1 else None
        for sample in self.samples.values():
            if params.logprobs is not None:
                sample.output.logprobs, sample.output.cumulative_logprob = [], 0.0
            if not params.skip_special_tokens:
                sample.text = TextStream(WholeText(vocabulary.tokenizer.inner), self.output.prompt_token_ids)

    def row(self, place: int, seq: TokenSequence) -> Row:
        """What is asked of the row of logits at `place`, from which `seq` gets its next token."""
        output = seq.tokens[seq.prompt_len :]
        # A step that is undone takes back only tokens that are not counted yet.
        length, counts = self._counts.get(seq.seq_id, (0, {}))
        for token_id in output[length:]:
            counts[token_id] = counts.get(token_id, 0) + 1
        self._counts[seq.seq_id] = len(output), counts
        return Row(place, self.shaping, self.allowed, self.stop_ids, self.bad_words, self.prompt_ids, counts, output)

    def _accept(self, host: RequestHost, sample: Sample, token_id: int) -> TokenOutput:
        token = super()._accept(host, sample, token_id)
        reason = sample.output.stop_reason
        if isinstance(reason, int):
            sample.output.stop_reason = self._special_stops.get(reason, reason)
        return token

    def release_text(self, sample: Sample, fresh: str, last: bool) -> tuple[str, str | None]:
        if len(sample.output.token_ids) <= self.shaping.min_tokens:  # no stop text ends here, but one may begin
            text = sample.held_back + fresh
            keep = 0 if last else max((overlap(text, stop) for stop in self.params.stop), default=0)
            sample.held_back = text[len(text) - keep :]
            return text[: len(text) - keep], None
        text, stop = super().release_text(sample, fresh, last)
        return text + stop if stop and self.shaping.include_stop_str_in_output else text, stop


class ScoringScheduler(Scheduler):
    """A scheduler for prompts that are scored: the prefix cache must not skip them, since their logits are wanted."""

    def __init__(self, pool: CachingBlockPool | None, *parts: Any) -> None:
        super().__init__(*parts)
        self.pool = pool
        self.is_scored: Callable[[TokenSequence], bool] = lambda seq: False

    def _admit(self, group: Group, plan: StepPlan) -> None:
        with self.pool.unread() if self.pool and self.is_scored(group.leader) else nullcontext():
            super()._admit(group, plan)


class ShapingEngine(TransactionalEngine):
    """An engine that runs shaped requests among others."""

    def __init__(self, vocabulary: Vocabulary, *parts: Any) -> None:
        super().__init__(*parts)
        self.vocabulary = vocabulary
        self._shaped: dict[int, ShapedRequest] = {}  # by request_id
        self._scored: list[tuple[ShapedRequest, int]] = []  # a row of prompt logits for each place of a prompt
        if isinstance(self.scheduler, ScoringScheduler):
            self.scheduler.is_scored = self._is_scored

    def add(self, request: Request) -> None:
        super().add(request)
        if isinstance(request, ShapedRequest):
            self._shaped[request.output.request_id] = request

    def _is_scored(self, seq: TokenSequence) -> bool:
        request = self.request_of[seq.seq_id]
        return isinstance(request, ShapedRequest) and request.to_score is seq

    def prepare_inputs(self, plan: StepPlan) -> StepInputs:
        inputs = super().prepare_inputs(plan)
        return self._with_prompt_rows(plan, inputs) if self._shaped else inputs

    def _sample(self, plan: StepPlan, logits: Array) -> list[TokenOutput]:
        return self._shape(plan, logits) if self._shaped else super()._sample(plan, logits)

    def _with_prompt_rows(self, plan: StepPlan, inputs: StepInputs) -> StepInputs:
        """Ask for the logits of the prompts that are scored too, after those of the tokens to come."""
        self._shaped = {i: request for i, request in self._shaped.items() if i in self.requests}
        rows: list[int] = []
        self._scored, first = [], 0
        for seq, num_tokens in plan.chunks:
            request = self._shaped.get(self.request_of[seq.seq_id].output.request_id)
            if request and request.to_score is seq and request.output.prompt_logprobs:
                begin = len(request.output.prompt_logprobs) - 1  # this position's logits score the next token
                end = min(seq.num_computed + num_tokens, seq.prompt_len - 1)
                rows += range(first + begin - seq.num_computed, first + end - seq.num_computed)
                self._scored += [(request, position + 1) for position in range(begin, end)]
            first += num_tokens
        if not rows:
            return inputs
        return replace(inputs, logits_rows=np.concatenate([inputs.logits_rows, np.array(rows, dtype=np.int32)]))

    def _shape(self, plan: StepPlan, logits: Array) -> list[TokenOutput]:
        num_rows = len(logits) - len(self._scored)
        self._score_prompts(logits[num_rows:])
        logits = logits[:num_rows]
        ready = [seq for seq, _ in plan.chunks if seq.num_uncomputed == 0]
        rows: list[Row] = []
        scored: dict[tuple[int, int], int] = {}  # (request, sample) -> its row, of those that want log-probabilities
        for place, seq in enumerate(ready):
            request = self._shaped.get(self.request_of[seq.seq_id].output.request_id)
            if request is None:
                continue
            rows.append(request.row(place, seq))
            if request.params.logprobs is not None:  # type: ignore[attr-defined]
                for sample in (request.samples[seq.seq_id], *request.to_fork):
                    scored[request.output.request_id, sample.output.index] = place
        untouched = logits[xp.asarray(np.array([*scored.values()], dtype=np.int64))]
        shape_logits(logits, rows)
        tokens = super()._sample(plan, logits)
        self._note_logprobs(untouched, {key: row for row, key in enumerate(scored)}, tokens)
        return tokens

    def _score_prompts(self, logits: Array) -> None:
        """Add the log-probabilities of the prompts' tokens that this step scores."""
        if not self._scored:
            return
        chosen = [request.output.prompt_token_ids[place] for request, place in self._scored]
        counts = [request.shaping.prompt_logprobs or 0 for request, _ in self._scored]
        found = token_logprobs(logits, chosen, counts, self.vocabulary.text)
        for (request, place), entry in zip(self._scored, found, strict=True):
            assert request.output.prompt_logprobs is not None
            request.output.prompt_logprobs.append(entry)
            if place == len(request.output.prompt_token_ids) - 1:
                request.to_score = None

    def _note_logprobs(self, logits: Array, row_of: dict[tuple[int, int], int], tokens: list[TokenOutput]) -> None:
        """Add the log-probabilities of the step's new `tokens` to them and to their samples."""
        places = [i for i, token in enumerate(tokens) if (token.request_id, token.index) in row_of]
        if not places:
            return
        scored = [tokens[i] for i in places]
        requests = [self._shaped[token.request_id] for token in scored]
        counts = [request.shaping.logprobs or 0 for request in requests]
        rows = [row_of[token.request_id, token.index] for token in scored]
        if rows != list(range(len(logits))):
            logits = logits[xp.asarray(np.array(rows))]
        found = token_logprobs(logits, [token.token_id for token in scored], counts, self.vocabulary.text)
        for i, token, request, entry in zip(places, scored, requests, found, strict=True):
            tokens[i] = replace(token, logprobs=entry)
            output = request.output.outputs[token.index]
            assert output.logprobs is not None
            output.logprobs.append(entry)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + entry[token.token_id].logprob

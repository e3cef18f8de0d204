"""One step of the engine, from the scheduler's plan to the next tokens: the whole path of a token.

`EngineCore` works on requests that llm.py has made; it is the place to read how the parts fit together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...beyond_device.kv import StreamedKV
from ...extras.beam import Hypothesis
from ...extras.sanitizer import KVSanitizer
from ...timeline.events import (
    BeamsReordered,
    Log,
    SequenceFinished,
    StepPlanned,
    StepTimed,
    TokenNamed,
    TokenSampled,
)
from ..device import Array, on_gpu, synchronize, to_host, xp
from ..memory.manager import BlockTables, Contiguous, KVCacheManager, Snapshot, Transfer
from ..model.config import ModelConfig
from ..model.llama import Llama, StepInputs, attend
from ..model.tokenizer import Tokenizer
from .outputs import FinishReason, RequestOutput, SequenceOutput, StepRecord, TokenOutput
from .request import Request, Sample
from .sampling import SamplingParams, draw, hooked
from .scheduler import Scheduler, StepPlan
from .sequence import Sequence as TokenSequence


class EngineCore:
    """A model, its KV cache and the unfinished requests."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        model: Llama,
        manager: KVCacheManager,
        scheduler: Scheduler,
        storage: Any,
        *,
        backend: str = "auto",
        sanitize: bool = False,
        log: Log | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        long_context: StreamedKV | None = None,
    ) -> None:
        """The parts, made to fit each other. `long_context` stands for the caches and for attention, if it is there."""
        self.config = config
        self.tokenizer = tokenizer
        self.model = model
        self.manager = manager
        self.scheduler = scheduler
        self.storage = storage
        self.long_context = long_context
        self.sanitizer: KVSanitizer | None = None
        if sanitize and long_context is None:
            self.sanitizer = KVSanitizer(manager, storage)
        self.log = log
        self.on_step = on_step
        self._attend = partial(attend, backend=backend)
        self._eos = frozenset(config.eos_token_ids)
        self._requests: dict[int, Request] = {}  # by request_id, unfinished
        self._request_of: dict[int, Request] = {}  # by seq_id, unfinished
        self._next_seq = 0
        self._num_steps = 0
        self._named: set[int] = set()  # token ids whose text the log knows

    def output_of(self, request_id: int) -> RequestOutput:
        """The output of an unfinished request. The object is filled as the request goes on."""
        return self._requests[request_id].output

    def abort(self, request_id: int) -> None:
        """Stop a request where it is and free its memory. A request that has finished is left alone."""
        if request_id in self._requests:
            self._end_request(self._requests[request_id], "abort")

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    # --- one step ----------------------------------------------------------------------------------

    def step(self) -> list[TokenOutput]:
        """Schedule, move, compute, sample: one step for every sequence that runs. [] when nothing is left."""
        if not self._requests:
            return []
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        if self.log:
            self._log_plan(plan, self.log)
        if not plan.chunks:
            raise RuntimeError("no sequence can run, though some wait: a bug in the scheduler")
        self.storage.apply(plan.transfers)
        if self.sanitizer:
            reads = [(seq.seq_id, seq.tokens, seq.num_computed, count) for seq, count in plan.chunks]
            self.sanitizer.before_step(plan.transfers, reads)
        if self.long_context:
            self.long_context.begin_step(plan)
        kv = self.long_context or self.storage.layers
        logits = self.model.forward(self._inputs(plan), kv, self._attend)
        for seq, num_tokens in plan.chunks:
            seq.num_computed += num_tokens
            self.manager.commit(seq.seq_id, seq.tokens, seq.num_computed)
        record = self._record(plan) if self.on_step else None
        tokens = self._sample(plan, logits)
        if self.on_step and record:
            synchronize()
            self.on_step(StepRecord(*record, time.perf_counter() - began))
        if self.log:
            synchronize()
            self.log(StepTimed(self._num_steps, round(1e6 * (time.perf_counter() - began))))
        self._num_steps += 1
        return tokens

    def _inputs(self, plan: StepPlan) -> StepInputs:
        """The step as the model sees it: all new tokens in one row, and where each sequence's K and V are."""
        token_ids: list[int] = []
        positions: list[int] = []
        slot_mapping: list[int] = []
        query_start_loc, logits_rows = [0], []
        for seq, num_tokens in plan.chunks:
            first, last = seq.num_computed, seq.num_computed + num_tokens
            token_ids += seq.tokens[first:last]
            positions += range(first, last)
            slot_mapping += self.manager.slots(seq.seq_id, first, num_tokens)
            query_start_loc.append(len(token_ids))
            if last == len(seq.tokens):  # it has caught up, so its last token says what comes next
                logits_rows.append(len(token_ids) - 1)
        ids = [seq.seq_id for seq, _ in plan.chunks]
        block_tables = starts = None
        if isinstance(self.manager, BlockTables):
            tables = [self.manager.block_table(seq_id) for seq_id in ids]
            padded = np.full((len(ids), max(map(len, tables))), -1, dtype=np.int32)
            for row, table in zip(padded, tables, strict=True):
                row[: len(table)] = table
            block_tables = padded
        elif isinstance(self.manager, Contiguous):
            starts = _ints([self.manager.start(seq_id) for seq_id in ids])
        return _to_device(
            token_ids=_ints(token_ids),
            positions=_ints(positions),
            slot_mapping=_ints(slot_mapping),
            seq_lens=_ints([seq.num_computed + num_tokens for seq, num_tokens in plan.chunks]),
            query_start_loc=_ints(query_start_loc),
            logits_rows=_ints(logits_rows),
            block_tables=block_tables,
            starts=starts,
        )

    def _sample(self, plan: StepPlan, logits: Array) -> list[TokenOutput]:
        """A token for each sequence that has caught up; then beams are chosen, and samples begin."""
        ready = [seq for seq, _ in plan.chunks if seq.num_uncomputed == 0]
        # On a GPU, greedy needs only the winner of each row; the rows travel where more is asked.
        simple = all(_only_winner(self._request_of[seq.seq_id].params) for seq in ready)
        rows = to_host(logits.argmax(axis=-1) if simple and on_gpu else logits)
        if self.sanitizer:
            self.sanitizer.after_step([seq.seq_id for seq in ready], rows)
        tokens: list[TokenOutput] = []
        for row, seq in zip(rows, ready, strict=True):
            request = self._request_of.get(seq.seq_id)
            if request is None:
                continue  # ended in this very step, by an error in a sibling's hook
            try:
                tokens += self._take_row(request, seq, row)
            except Exception as error:
                request.output.error = error  # generate() raises it; the other requests go on
                self._end_request(request, "error")
        return tokens

    def _take_row(self, request: Request, seq: TokenSequence, row: np.ndarray) -> list[TokenOutput]:
        if request.beams is not None:
            request.beam_logits[seq.seq_id] = hooked(row, seq.tokens, request.params)
            return self._step_beams(request)
        samples = [request.samples[seq.seq_id], *request.to_fork]
        for sibling in request.to_fork:  # they share the prompt's blocks from here on
            self.scheduler.fork(request.groups[0], seq, sibling.seq)
        request.to_fork = []
        tokens = []
        for sample in samples:
            params = request.params
            if row.ndim == 0:
                token_id = int(row)
            else:
                token_id = draw(hooked(row, sample.seq.tokens, params), params, sample.rng)
            tokens.append(self._accept(request, sample, token_id))
        return tokens

    def _accept(self, request: Request, sample: Sample, token_id: int) -> TokenOutput:
        """Append a token to a sample, bring its text up to date, and end it if this was the last one."""
        params, seq, output = request.params, sample.seq, sample.output
        seq.tokens.append(token_id)
        output.token_ids.append(token_id)
        if self.log:
            self._name_tokens([token_id], self.log)
            self.log(TokenSampled(seq.seq_id, token_id))
        if request.output.first_token is None:
            request.output.first_token = time.perf_counter()
        reason: FinishReason | None = None
        if (token_id in self._eos and not params.ignore_eos) or token_id in params.stop_token_ids:
            reason = "stop"
        elif len(seq.tokens) >= seq.max_tokens:
            reason = "length"
        fresh = "" if reason == "stop" else sample.text.push(token_id)
        if reason is not None:
            fresh += sample.text.flush()
        text, hit = sample.release_text(fresh, tuple(params.stop), last=reason is not None)
        output.text += text
        if hit:
            reason = "stop"
        if reason is not None:
            output.finish_reason = reason
            self._end_sequence(request, seq, reason)
        return TokenOutput(request.output.request_id, output.index, token_id, text, reason)

    def _step_beams(self, request: Request) -> list[TokenOutput]:
        """Once every beam has its logits: choose who goes on. Dropped beams are freed, doubled ones forked."""
        group, params = request.groups[0], request.params
        beams = group.seqs.copy()
        if request.beams is None or len(request.beam_logits) < len(beams):
            return []
        if request.output.first_token is None:
            request.output.first_token = time.perf_counter()
        eos = {*params.stop_token_ids, *(() if params.ignore_eos else self._eos)}
        chosen = request.beams.step(
            [request.beam_logits[seq.seq_id] for seq in beams],
            [seq.tokens[seq.prompt_len :] for seq in beams],
            eos,
            is_last=len(beams[0].tokens) + 1 >= beams[0].max_tokens,
        )
        request.beam_logits.clear()
        if not chosen:
            return self._finish_beams(request)
        parents = [beams[continuation.beam] for continuation in chosen]
        going_on: list[TokenSequence] = []
        for parent in parents:
            if parent in going_on:  # it goes on a second time
                tokens, limit = parent.tokens.copy(), parent.max_tokens
                child = TokenSequence(self._next_seq, tokens, parent.prompt_len, limit)
                self._next_seq += 1
                self.scheduler.fork(group, parent, child)
                self._request_of[child.seq_id] = request
                going_on.append(child)
            else:
                going_on.append(parent)
        for seq in beams:
            if seq not in going_on:
                self._end_sequence(request, seq, "beam dropped")
        for seq, continuation in zip(going_on, chosen, strict=True):
            seq.tokens.append(continuation.token_id)
        group.seqs.sort(key=going_on.index)  # the log-probabilities are in this order
        if self.log:
            pairs = zip(parents, going_on, strict=True)
            self.log(BeamsReordered(tuple((parent.seq_id, seq.seq_id) for parent, seq in pairs)))
            self._name_tokens([seq.tokens[-1] for seq in going_on], self.log)
            for seq in going_on:
                self.log(TokenSampled(seq.seq_id, seq.tokens[-1]))
        return []

    def _finish_beams(self, request: Request) -> list[TokenOutput]:
        assert request.beams is not None
        for index, hypothesis in enumerate(request.beams.finished):
            request.output.outputs.append(self._beam_output(request, index, hypothesis))
        self._end_request(request, "beam search ended")
        return [
            TokenOutput(
                request.output.request_id,
                output.index,
                output.token_ids[-1],
                output.text,
                output.finish_reason,
            )
            for output in request.output.outputs
        ]

    def _beam_output(self, request: Request, index: int, hypothesis: Hypothesis) -> SequenceOutput:
        text = self.tokenizer.stream(request.output.prompt_token_ids)
        shown = hypothesis.tokens[:-1] if hypothesis.stopped else hypothesis.tokens
        pieces = [text.push(token_id) for token_id in shown]
        reason: FinishReason = "stop" if hypothesis.stopped else "length"
        return SequenceOutput(index, "".join(pieces) + text.flush(), hypothesis.tokens, reason, hypothesis.score)

    # --- ends --------------------------------------------------------------------------------------

    def _end_sequence(self, request: Request, seq: TokenSequence, reason: str) -> None:
        """Give the sequence's memory back. The request ends with its last sequence."""
        if request.samples.pop(seq.seq_id, None) in request.to_fork:
            request.to_fork = [sample for sample in request.to_fork if sample.seq is not seq]
        else:
            group = next(group for group in request.groups if seq in group.seqs)
            self.scheduler.finish(group, seq)
        del self._request_of[seq.seq_id]
        if self.log:
            self.log(SequenceFinished(seq.seq_id, reason))
        if not request.samples and not any(group.seqs for group in request.groups):
            request.output.num_preemptions = sum(group.num_preemptions for group in request.groups)
            request.output.finished = time.perf_counter()
            del self._requests[request.output.request_id]

    def _end_request(self, request: Request, reason: str) -> None:
        """End all that is left of a request."""
        for sample in list(request.samples.values()):
            sample.output.finish_reason = "error" if reason == "error" else "abort"
        unbegun = [sample.seq for sample in request.to_fork]
        for seq in [*unbegun, *(seq for group in request.groups for seq in group.seqs.copy())]:
            self._end_sequence(request, seq, reason)

    # --- for those who watch -----------------------------------------------------------------------

    def _name_tokens(self, token_ids: Sequence[int], log: Log) -> None:
        """Tell the text of ids that come for the first time, so that a log can be read without the model."""
        for token_id in token_ids:
            if token_id not in self._named:
                self._named.add(token_id)
                log(TokenNamed(token_id, self.tokenizer.token_text(token_id)))

    def _log_plan(self, plan: StepPlan, log: Log) -> None:
        log(
            StepPlanned(
                self._num_steps,
                tuple((seq.seq_id, num_tokens) for seq, num_tokens in plan.chunks),
                tuple(seq.seq_id for group in plan.preempted for seq in group.seqs),
                tuple(seq.seq_id for group in self.scheduler.waiting for seq in group.seqs),
            )
        )

    def _record(self, plan: StepPlan) -> tuple[list[tuple[int, int]], int, list[Transfer], int, int, Snapshot]:
        """The fields of a StepRecord, less the time: taken before sequences end."""
        waiting = self.scheduler.waiting
        leader = waiting[0].leader if waiting else None
        return (
            [(seq.seq_id, num_tokens) for seq, num_tokens in plan.chunks],
            len(plan.preempted),
            plan.transfers,
            sum(len(group.seqs) for group in self.scheduler.running),
            sum(len(group.seqs) for group in waiting),
            self.manager.snapshot((len(leader.tokens), leader.max_slots) if leader else None),
        )


def _only_winner(params: SamplingParams) -> bool:
    """Greedy, so that of all logits only the place of the largest matters."""
    return params.temperature == 0 and params.beam_width is None and params.logits_hook is None


def _ints(values: list[int]) -> np.ndarray:
    """As int32, which every kernel takes."""
    return np.array(values, dtype=np.int32)


def _to_device(**arrays: np.ndarray | None) -> StepInputs:
    """The inputs where the model is: to a GPU by one copy of all."""
    if not on_gpu:
        return StepInputs(**arrays)
    given = {name: array for name, array in arrays.items() if array is not None}
    flat, at = xp.asarray(np.concatenate([array.ravel() for array in given.values()])), 0
    placed = {}
    for name, array in given.items():
        placed[name] = flat[at : at + array.size].reshape(array.shape)
        at += array.size
    return StepInputs(**placed)

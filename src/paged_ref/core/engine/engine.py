"""One step of the engine, from the scheduler's plan to the next tokens: the whole path of a token."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import numpy as np

from ..attention.attention import Addresses
from ..device import Array, on_gpu, to_host, xp
from ..memory.kv import KV
from ..model.llama import Llama, StepInputs
from .outputs import TokenOutput
from .request import Request
from .sampling import RequestError, no_likeliest_token
from .scheduler import Scheduler, StepPlan
from .sequence import Sequence


class Observer:
    """Sees what the engine does, and changes nothing: without observers, no token is another one."""

    def request_added(self, request: Request) -> None:
        """A request was accepted."""

    def before_step(self, plan: StepPlan, inputs: StepInputs) -> None:
        """A step is planned, and nothing of it is computed. `inputs` lie in host memory."""

    def token_sampled(self, seq: Sequence, token_id: int) -> None:
        """A sequence has one more token, `seq.tokens[-1]`."""

    def sequence_finished(self, seq: Sequence, reason: str) -> None:
        """A sequence came to its end, and its memory is free."""

    def after_step(self, plan: StepPlan, tokens: list[TokenOutput]) -> None:
        """A step is over."""


class Engine:
    """A model, its KV cache, and the unfinished requests."""

    def __init__(
        self,
        model: Llama,
        kv: KV,
        scheduler: Scheduler,
        eos_token_ids: Iterable[int] = (),
        observers: Iterable[Observer] = (),
    ) -> None:
        self.model = model
        self.kv = kv
        self.scheduler = scheduler
        self.manager = scheduler.manager
        self.eos_token_ids = frozenset(eos_token_ids)
        self.observers = list(observers)
        self.requests: dict[int, Request] = {}  # by request_id, unfinished
        self.request_of: dict[int, Request] = {}  # by seq_id, unfinished
        self.next_seq_id = 0
        self.num_steps = 0  # made, and so the number of the step under way

    # --- one step --------------------------------------------------------------------------------------

    def step(self) -> list[TokenOutput]:
        """Schedule, copy, compute, sample: one step for every sequence that runs. [] when nothing is left."""
        if not self.requests:
            return []
        plan = self.scheduler.schedule()
        if not plan.chunks:
            raise RuntimeError("no sequence can run, though some wait: a bug in the scheduler")
        inputs = self.prepare_inputs(plan)
        for observer in self.observers:
            observer.before_step(plan, inputs)
        self.kv.begin_step(plan, inputs)
        logits = self.model.forward(to_device(inputs), self.kv)  # [num_rows, vocab_size]
        for seq, num_tokens in plan.chunks:
            seq.num_computed += num_tokens
            self.manager.commit(seq.seq_id, seq.tokens, seq.num_computed)
        tokens = self._sample(plan, logits)
        for observer in self.observers:
            observer.after_step(plan, tokens)
        self.num_steps += 1
        return tokens

    def prepare_inputs(self, plan: StepPlan) -> StepInputs:
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
        placements = [self.manager.placement(seq.seq_id) for seq, _ in plan.chunks]
        addresses = Addresses(
            seq_lens=_ints([seq.num_computed + num_tokens for seq, num_tokens in plan.chunks]),
            query_start_loc=_ints(query_start_loc),
            block_tables=_padded(placements) if self.manager.paged else None,
            starts=None if self.manager.paged else _ints([start for (start,) in placements]),
            slot_mapping=_ints(slot_mapping),
        )
        return StepInputs(_ints(token_ids), _ints(positions), _ints(logits_rows), addresses)

    def _sample(self, plan: StepPlan, logits: Array) -> list[TokenOutput]:
        """A token for each sequence that has caught up."""
        ready = [seq for seq, _ in plan.chunks if seq.num_uncomputed == 0]
        if not any(self.request_of[seq.seq_id].needs_logits for seq in ready):
            # From a GPU, only the places and the values of the largest logits travel, together, as float64.
            ids, largest = to_host(xp.stack([logits.argmax(axis=-1), logits.max(axis=-1)]))  # [num_rows] each
            rows = ids.astype(np.int64)
        else:
            rows = to_host(logits)
            largest = rows.max(axis=-1)  # NaN if one of a row is
        tokens: list[TokenOutput] = []
        for row, highest, seq in zip(rows, largest.tolist(), ready, strict=True):
            request = self.request_of.get(seq.seq_id)
            if request is None:
                continue  # the request ended in this step, by an error in the hook of another of its sequences
            try:
                if not math.isfinite(highest):
                    raise no_likeliest_token(seq, highest, request.logits_from)
                tokens += request.take_logits(self, seq, row)
            except RequestError as error:  # generate() raises it; the other requests go on
                request.output.error = error.__cause__ or ValueError(f"step {self.num_steps}: {error}")
                self.end_request(request, "error")
        return tokens

    # --- requests --------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request whose sequences have the ids from `next_seq_id` on. Raises ValueError, and changes
        nothing, if it can never fit."""
        for group in request.groups:
            self.scheduler.add(group)  # the first one refuses, before anything is kept
        seqs = request.unfinished()
        self.requests[request.output.request_id] = request
        self.request_of.update((seq.seq_id, request) for seq in seqs)
        self.next_seq_id += len(seqs)
        for observer in self.observers:
            observer.request_added(request)

    def fork(self, request: Request, parent: Sequence, child: Sequence) -> None:
        """`child` goes on from where `parent` is, and shares the memory of `parent`."""
        self.scheduler.fork(request.groups[0], parent, child)
        self.request_of[child.seq_id] = request
        self.next_seq_id = max(self.next_seq_id, child.seq_id + 1)

    def add_token(self, seq: Sequence, token_id: int) -> None:
        """The sequence has one more token; its K and V are computed in a later step."""
        seq.tokens.append(token_id)
        output = self.request_of[seq.seq_id].output
        output.first_token = output.first_token or time.perf_counter()
        for observer in self.observers:
            observer.token_sampled(seq, token_id)

    def end_sequence(self, request: Request, seq: Sequence, reason: str) -> None:
        """Free the memory of the sequence. The request ends with its last sequence."""
        group = request.remove(seq)
        if group is not None:
            self.scheduler.finish(group, seq)
        del self.request_of[seq.seq_id]
        for observer in self.observers:
            observer.sequence_finished(seq, reason)
        if not request.unfinished():
            request.output.num_preemptions = sum(group.num_preemptions for group in request.groups)
            request.output.finished = time.perf_counter()
            del self.requests[request.output.request_id]

    def abort(self, request_id: int) -> None:
        """Stop a request where it is and free its memory. A request that has finished is left alone."""
        if request_id in self.requests:
            self.end_request(self.requests[request_id], "abort")

    def end_request(self, request: Request, reason: str) -> None:
        """End all that is left of a request."""
        for sample in request.samples.values():
            sample.output.finish_reason = "error" if reason == "error" else "abort"
        for seq in request.unfinished():
            self.end_sequence(request, seq, reason)


def _ints(values: list[int]) -> np.ndarray:
    """As int32, which every kernel takes."""
    return np.array(values, dtype=np.int32)


def _padded(tables: list[list[int]]) -> np.ndarray:
    """Block tables as rows of one array: [num_seqs, longest table], with -1 past the end of a table."""
    rows = np.full((len(tables), max(map(len, tables))), -1, dtype=np.int32)
    for row, table in zip(rows, tables, strict=True):
        row[: len(table)] = table
    return rows


def to_device(inputs: StepInputs) -> StepInputs:
    """The inputs where the model is: to a GPU by one copy of all."""
    if not on_gpu:
        return inputs
    where = inputs.addresses
    placements = where.block_tables if where.starts is None else where.starts
    arrays = [inputs.token_ids, inputs.positions, inputs.logits_rows]
    arrays += [where.seq_lens, where.query_start_loc, where.slot_mapping, placements]
    flat = xp.asarray(np.concatenate([array.ravel() for array in arrays]))
    ends = np.cumsum([array.size for array in arrays])
    ids, positions, rows, seq_lens, loc, slots, placed = (
        flat[end - array.size : end].reshape(array.shape) for array, end in zip(arrays, ends, strict=True)
    )
    tables, starts = (placed, None) if where.starts is None else (None, placed)
    return StepInputs(ids, positions, rows, Addresses(seq_lens, loc, tables, starts, slots))

"""The engine: requests in, tokens out. One `step()` is the whole path of a token through the system."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import kv_bytes_per_token
from ..device import Array, on_gpu, synchronize, to_host, xp
from ..kernels import why_not
from ..memory.events import (
    BeamsReordered,
    Log,
    ModelOpened,
    RequestArrived,
    SequenceFinished,
    StepPlanned,
    TokenNamed,
    TokenSampled,
)
from ..memory.factory import WATERMARK, ManagerName, make_manager
from ..memory.managers import BlockTables, Contiguous, Forkable, Snapshot
from ..memory.sanitizer import KVSanitizer
from ..memory.standard import Reserve
from ..memory.storage import KVStorage
from ..model.llama import Llama, StepInputs, attend
from ..model.loading import load
from .beam import BeamSearch, Hypothesis
from .outputs import FinishReason, RequestOutput, SequenceOutput, StepRecord, TokenOutput
from .request import Request, Sample
from .sampling import SamplingParams, draw, generator, hooked
from .scheduler import Preemption, Scheduler, StepPlan
from .sequence import Group
from .sequence import Sequence as TokenSequence

DEFAULT_KV_TOKENS = 4096
Prompt = str | Sequence[int]


class LLM:
    """A model, its KV cache and a batch of requests.

    Errors are ValueErrors with the argument, the value and the bound; a refused request changes nothing.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        *,
        manager: ManagerName = "paged",
        block_size: int = 16,
        kv_cache_tokens: int | None = None,
        kv_cache_bytes: int | None = None,
        host_kv_tokens: int | None = None,
        max_model_len: int | None = None,
        max_batch_tokens: int = 512,
        max_batch_seqs: int = 256,
        reserve: Reserve = "max",
        preemption: Preemption | None = None,
        prefix_cache: bool = False,
        watermark: float = WATERMARK,
        free_order: Sequence[int] | None = None,
        backend: str = "auto",
        dtype: str = "float32",
        sanitize: bool = False,
        log: Log | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        """`model` is "tiny" (embedded) or a Hugging Face directory.

        The KV cache holds `kv_cache_tokens` slots (default 4096), or what fits in `kv_cache_bytes`; both
        round down to whole blocks. `max_model_len` (default: the model's context, if the cache holds it)
        bounds prompt and output together. A step computes at most `max_batch_tokens` tokens of at most
        `max_batch_seqs` sequences.

        `preemption` is "recompute" or "swap" (the swapping manager's default), to a host pool of
        `host_kv_tokens` (default for swap: as large as the cache). `reserve` is for the standard manager;
        `block_size`, `free_order` (the order in which blocks are handed out), `prefix_cache` and `watermark`
        (the share of the blocks that admission leaves) are for the paged one.

        `sanitize` checks every read of the cache; `log` is told all that happens (memory/events.py);
        `on_step` gets a StepRecord after each step. None of the three changes a token.
        """
        if backend != "auto" and (reason := why_not(backend)) is not None:
            raise ValueError(f"backend {backend!r} does not work on this machine: {reason}")
        checkpoint = load(model)
        self.config = config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        if kv_cache_bytes is not None:
            if kv_cache_tokens is not None:
                raise ValueError("kv_cache_tokens and kv_cache_bytes are both given; give one of them")
            kv_cache_tokens = kv_cache_bytes // kv_bytes_per_token(config, dtype)
        num_slots = DEFAULT_KV_TOKENS if kv_cache_tokens is None else kv_cache_tokens
        if preemption is None:
            preemption = "swap" if manager == "swapping" else "recompute"
        if host_kv_tokens is None:
            host_kv_tokens = num_slots if preemption == "swap" else 0
        context = config.max_position_embeddings
        if max_model_len is not None and not 1 <= max_model_len <= context:
            raise ValueError(f"max_model_len is {max_model_len}; 1 to the model's context of {context} can be had")
        if max_model_len is None:
            usable = num_slots - num_slots % block_size if manager == "paged" and block_size > 0 else num_slots
            max_model_len = max(1, min(context, usable))
        self.max_model_len = max_model_len
        self.log = log
        self.manager = make_manager(
            manager,
            num_slots,
            max_model_len=max_model_len,
            block_size=block_size,
            num_host_slots=host_kv_tokens,
            reserve=reserve,
            free_order=free_order,
            watermark=watermark,
            prefix_cache=prefix_cache,
            log=log,
        )
        self.scheduler = Scheduler(self.manager, max_batch_tokens, max_batch_seqs, preemption)
        self.model = Llama(config, checkpoint.weights, dtype)
        unit = block_size if self.manager.paged else 1
        shape = (config.num_layers, num_slots // unit, unit, config.num_kv_heads, config.head_size)
        self.storage = KVStorage(*shape, dtype, num_host_blocks=host_kv_tokens // unit)
        self.sanitizer = KVSanitizer(self.manager, self.storage) if sanitize else None
        self.on_step = on_step
        self._attend = partial(attend, backend=backend)
        self._eos = frozenset(config.eos_token_ids)
        self._requests: dict[int, Request] = {}  # by request_id, unfinished
        self._request_of: dict[int, Request] = {}  # by seq_id, unfinished
        self._loops: dict[int, deque[TokenOutput]] = {}  # by request_id: the tokens of who waits in a loop
        self._next_request = 0
        self._next_seq = 0
        self._num_steps = 0
        self._named: set[int] = set()  # token ids whose text the log knows
        if log:
            log(ModelOpened(Path(model).name, kv_bytes_per_token(config, dtype)))

    # --- requests in -------------------------------------------------------------------------------

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a prompt (text, or token ids taken as they are) and return its request id.

        Raises ValueError, and changes nothing, for a prompt that is empty, holds unknown token ids, or
        could never fit in the context or in the KV cache.
        """
        params = params or SamplingParams()
        ids = self._prompt_ids(prompt)
        width = params.beam_width or params.n
        shares = isinstance(self.manager, Forkable)
        if params.beam_width is not None and not shares:
            raise ValueError("beam_width is set; beams share blocks, and only the paged manager can share")
        output = RequestOutput(
            self._next_request, prompt if isinstance(prompt, str) else None, ids, [], time.perf_counter()
        )
        max_tokens = min(len(ids) + params.max_tokens, self.max_model_len)
        num_seqs = 1 if params.beam_width else width
        seqs = [TokenSequence(self._next_seq + i, ids.copy(), len(ids), max_tokens) for i in range(num_seqs)]
        groups = [Group(seqs[:1], width)] if shares else [Group([seq]) for seq in seqs]
        request = Request(output, params, groups, samples={})
        if params.beam_width:
            request.beams = BeamSearch(params.beam_width, params.length_penalty)
        else:
            for i, seq in enumerate(seqs):
                sample = Sample(seq, SequenceOutput(i), generator(params, i), self.tokenizer.stream(ids))
                request.samples[seq.seq_id] = sample
                output.outputs.append(sample.output)
            if shares:
                request.to_fork = [request.samples[seq.seq_id] for seq in seqs[1:]]
        for group in groups:
            self.scheduler.add(group)  # the first refuses what can never fit, before anything is kept
        self._requests[output.request_id] = request
        self._request_of.update((seq.seq_id, request) for seq in seqs)
        self._next_request += 1
        self._next_seq += num_seqs
        if self.log:
            self._name_tokens(ids, self.log)
            self.log(RequestArrived(output.request_id, tuple(seq.seq_id for seq in seqs), tuple(ids)))
        return output.request_id

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids:
            raise ValueError("the prompt is empty: it has no tokens, and this tokenizer adds none")
        unknown = [i for i in ids if not 0 <= i < self.config.vocab_size]
        if unknown:
            raise ValueError(f"the prompt holds token id {unknown[0]}; known are 0 to {self.config.vocab_size - 1}")
        if len(ids) >= self.max_model_len:
            context, why = self.config.max_position_embeddings, ""
            if self.max_model_len < context:
                why = f" (the model's own is {context}; the KV cache holds {self.manager.num_slots} tokens)"
            raise ValueError(
                f"the prompt has {len(ids)} tokens; the context of {self.max_model_len} has no room for more{why}"
            )
        return ids

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

    # --- tokens out --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_token: Callable[[TokenOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Run the prompts to their end; one RequestOutput for each, in order.

        `params` is one for all, or one for each. `on_token` is called with each new token. If it or a hook
        raises, these requests are aborted and nothing stays behind.
        """
        requests = self._queue(prompts, params)
        with closing(self._run(requests)) as tokens:
            next(tokens)
            for token in tokens:
                if on_token is not None:
                    on_token(token)
        return [request.output for request in requests]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[TokenOutput]:
        """Like generate(), but yields each token as it comes. Leaving the loop aborts what is unfinished."""
        tokens = self._run(self._queue(prompts, params))
        next(tokens)
        return tokens

    def _queue(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))
        batch: list[Any] = [prompts] if single else list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(batch)
        if len(each) != len(batch):
            raise ValueError(f"params has {len(each)} entries for {len(batch)} prompts; give one, or one for each")
        ids: list[int] = []
        try:
            for prompt, its_params in zip(batch, each, strict=True):
                ids.append(self.add_request(prompt, its_params))
        except BaseException:
            for request_id in ids:
                self.abort(request_id)
            raise
        return [self._requests[request_id] for request_id in ids]

    def _run(self, requests: list[Request]) -> Generator[Any, None, None]:
        """The tokens of these requests. None comes first: who has taken it is inside `try`, so that dropping
        the loop aborts the requests even before their first token."""
        mine = {request.output.request_id for request in requests}
        fresh: deque[TokenOutput] = deque()  # tokens for this loop; the step of another's loop may bring some
        self._loops.update(dict.fromkeys(mine, fresh))
        try:
            yield None
            while True:
                while fresh:
                    yield fresh.popleft()
                for request in requests:
                    if request.output.error is not None:
                        raise request.output.error
                if not any(request_id in self._requests for request_id in mine):
                    return
                for token in self.step():
                    if token.request_id in self._loops:
                        self._loops[token.request_id].append(token)
        finally:
            for request_id in mine:
                del self._loops[request_id]
                self.abort(request_id)

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
        logits = self.model.forward(self._inputs(plan), self.storage.layers, self._attend)
        for seq, num_tokens in plan.chunks:
            seq.num_computed += num_tokens
            self.manager.commit(seq.seq_id, seq.tokens, seq.num_computed)
        record = self._record(plan) if self.on_step else None
        tokens = self._sample(plan, logits)
        if self.on_step and record:
            synchronize()
            self.on_step(StepRecord(*record, time.perf_counter() - began))
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
            block_tables = xp.asarray(padded)
        elif isinstance(self.manager, Contiguous):
            starts = _ints([self.manager.start(seq_id) for seq_id in ids])
        return StepInputs(
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

    def _record(self, plan: StepPlan) -> tuple[list[tuple[int, int]], int, list[Any], int, int, Snapshot]:
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


def _ints(values: list[int]) -> Array:
    """To the device as int32, which every kernel takes."""
    return xp.asarray(np.array(values, dtype=np.int32))

"""The engine: requests in, tokens out. One `step()` is the whole path of a token through the system."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import kv_bytes_per_token
from ..device import Array, on_gpu, synchronize, to_host, xp
from ..kernels import why_not
from ..memory.managers import Forkable, KVCacheManager, Snapshot
from ..memory.paged import PagedManager
from ..memory.standard import Reserve, StandardManager
from ..memory.storage import KVStorage
from ..model.llama import Llama, StepInputs, attend
from ..model.loading import load
from ..model.tokenizer import TextStream
from .outputs import FinishReason, RequestOutput, SequenceOutput, StepRecord, TokenOutput
from .sampling import SamplingParams, draw, generator
from .scheduler import Scheduler, StepPlan
from .sequence import Sequence as TokenSequence

DEFAULT_KV_TOKENS = 4096
Prompt = str | Sequence[int]


@dataclass(eq=False, slots=True)
class _Sample:
    """A sequence in the scheduler, and the text and random numbers that belong to it."""

    seq: TokenSequence
    output: SequenceOutput
    request: _Request
    rng: np.random.Generator
    stream: TextStream
    held_back: str = ""  # the end of the text, while it might be the beginning of a stop string


@dataclass(eq=False, slots=True)
class _Request:
    output: RequestOutput
    params: SamplingParams
    samples: list[_Sample] = field(default_factory=list)
    to_fork: list[_Sample] = field(default_factory=list)  # begin when the first sample's prompt is computed


class LLM:
    """A model, its KV cache and a batch of requests.

    Errors are ValueErrors with the argument, the value and the bound; a refused request changes nothing.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        *,
        manager: Literal["paged", "standard"] = "paged",
        block_size: int = 16,
        kv_cache_tokens: int | None = None,
        kv_cache_bytes: int | None = None,
        max_model_len: int | None = None,
        max_batch_tokens: int = 512,
        max_batch_seqs: int = 256,
        reserve: Reserve = "max",
        free_order: Sequence[int] | None = None,
        backend: str = "auto",
        dtype: str = "float32",
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        """`model` is "tiny" (embedded) or a Hugging Face directory.

        The KV cache holds `kv_cache_tokens` slots (default 4096), or what fits in `kv_cache_bytes`; both
        round down to whole blocks. `max_model_len` (default: the model's context, if the cache holds it)
        bounds prompt and output together. A step computes at most `max_batch_tokens` tokens of at most
        `max_batch_seqs` sequences. `reserve` is for the standard manager, `block_size` and `free_order`
        (the order in which blocks are handed out) for the paged one.
        """
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; at least 1 is needed")
        if backend != "auto" and (reason := why_not(backend)) is not None:
            raise ValueError(f"backend {backend!r} does not work on this machine: {reason}")
        checkpoint = load(model)
        self.config = config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        dtype_bytes = kv_bytes_per_token(config, dtype)
        if kv_cache_tokens is not None and kv_cache_bytes is not None:
            raise ValueError("kv_cache_tokens and kv_cache_bytes are both given; give one of them")
        if kv_cache_bytes is not None:
            kv_cache_tokens = kv_cache_bytes // dtype_bytes
        num_slots = DEFAULT_KV_TOKENS if kv_cache_tokens is None else kv_cache_tokens
        unit = block_size if manager == "paged" else 1
        if num_slots < unit:
            raise ValueError(
                f"the KV cache has room for {num_slots} tokens ({dtype_bytes} bytes each); "
                f"at least one block of {unit} is needed"
            )
        num_blocks = num_slots // unit
        context = config.max_position_embeddings
        if max_model_len is not None and not 1 <= max_model_len <= context:
            raise ValueError(
                f"max_model_len is {max_model_len}; 1 to the model's context of {context} can be had"
            )
        self.max_model_len = min(context, num_blocks * unit) if max_model_len is None else max_model_len

        self.manager: KVCacheManager
        if manager == "paged":
            self.manager = PagedManager(num_blocks, block_size, free_order)
        elif manager == "standard":
            self.manager = StandardManager(num_blocks, self.max_model_len, reserve)
        else:
            raise ValueError(f"manager is {manager!r}; known are paged, standard")
        self.scheduler = Scheduler(self.manager, max_batch_tokens, max_batch_seqs)
        self.model = Llama(config, checkpoint.weights, dtype)
        self.storage = KVStorage(
            config.num_layers, num_blocks, unit, config.num_kv_heads, config.head_size, dtype
        )
        self._attend = partial(attend, backend=backend)
        self.on_step = on_step
        self._eos = frozenset(config.eos_token_ids)
        self._samples: dict[int, _Sample] = {}  # by seq_id, unfinished
        self._requests: dict[int, _Request] = {}  # by request_id, unfinished
        self._next_request = 0
        self._next_seq = 0

    # --- requests in -------------------------------------------------------------------------------

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a prompt (text, or token ids taken as they are) and return its request id.

        Raises ValueError, and changes nothing, for a prompt that is empty, holds unknown token ids, or
        could never fit in the context or in the KV cache.
        """
        params = params or SamplingParams()
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids:
            raise ValueError("the prompt is empty: it has no tokens, and this tokenizer adds none")
        unknown = [i for i in ids if not 0 <= i < self.config.vocab_size]
        if unknown:
            raise ValueError(
                f"the prompt holds token id {unknown[0]}; known are 0 to {self.config.vocab_size - 1}"
            )
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; the context of {self.max_model_len} has no room for more"
                + self._why_this_length()
            )
        max_tokens = min(len(ids) + params.max_tokens, self.max_model_len)
        output = RequestOutput(self._next_request, text, ids, [], time.perf_counter())
        request = _Request(output, params)
        for i in range(params.n):
            seq = TokenSequence(self._next_seq + i, ids.copy(), len(ids), max_tokens)
            sample = _Sample(
                seq, SequenceOutput(i), request, generator(params, i), self.tokenizer.stream(ids)
            )
            request.samples.append(sample)
            output.outputs.append(sample.output)
        shares = isinstance(self.manager, Forkable)
        for sample in request.samples[:1] if shares else request.samples:
            self.scheduler.add(sample.seq)  # the first refuses what can never fit, before anything is kept
        request.to_fork = request.samples[1:] if shares else []
        self._samples.update((sample.seq.seq_id, sample) for sample in request.samples)
        self._requests[output.request_id] = request
        self._next_request += 1
        self._next_seq += params.n
        return output.request_id

    def _why_this_length(self) -> str:
        context = self.config.max_position_embeddings
        if self.max_model_len == context:
            return ""
        return f" (the model's own context is {context}; the KV cache holds {self.manager.num_slots} tokens)"

    def abort(self, request_id: int) -> None:
        """Stop a request where it is and free its memory. A request that has finished is left alone."""
        request = self._requests.get(request_id)
        for sample in request.samples if request else ():
            if sample.output.finish_reason is None:
                self._finish(sample, "abort")

    def output_of(self, request_id: int) -> RequestOutput:
        """The output of an unfinished request. The object is filled as the request goes on."""
        return self._requests[request_id].output

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

        `params` is one for all, or one for each. `on_token` is called with each new token. If anything
        raises on the way, these requests are aborted and nothing stays behind.
        """
        requests = self._queue(prompts, params)
        for token in self._run(requests):
            if on_token is not None:
                on_token(token)
        return [request.output for request in requests]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[TokenOutput]:
        """Like generate(), but yields each token as it comes. Leaving the loop aborts what is unfinished."""
        return self._run(self._queue(prompts, params))

    def _queue(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[_Request]:
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))
        batch: list[Any] = [prompts] if single else list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(batch)
        if len(each) != len(batch):
            raise ValueError(
                f"params has {len(each)} entries for {len(batch)} prompts; give one, or one for each"
            )
        ids: list[int] = []
        try:
            for prompt, its_params in zip(batch, each, strict=True):
                ids.append(self.add_request(prompt, its_params))
        except BaseException:
            for request_id in ids:
                self.abort(request_id)
            raise
        return [self._requests[request_id] for request_id in ids]

    def _run(self, requests: list[_Request]) -> Iterator[TokenOutput]:
        mine = {request.output.request_id for request in requests}
        try:
            while any(request_id in self._requests for request_id in mine):
                for token in self.step():
                    if token.request_id in mine:
                        yield token
        finally:
            for request_id in mine:
                self.abort(request_id)

    # --- one step ----------------------------------------------------------------------------------

    def step(self) -> list[TokenOutput]:
        """Schedule, move, compute, sample: one step for every sequence that runs. [] when nothing is left."""
        began = time.perf_counter()
        if not self._requests:
            return []
        plan = self.scheduler.schedule()
        if not plan.chunks:
            raise RuntimeError("no sequence can run, though some wait: a bug in the scheduler")
        self.storage.apply(plan.copies)
        logits = self.model.forward(
            self._inputs(plan), self.storage.layers, self._attend
        )  # [num_rows, vocab_size]
        for seq, num_tokens in plan.chunks:
            seq.num_computed += num_tokens
        num_running = len(self.scheduler.running)
        snapshot = self._snapshot() if self.on_step is not None else None
        tokens = self._sample(plan, logits)
        if self.on_step is not None and snapshot is not None:
            synchronize()
            chunks = [(seq.seq_id, num_tokens) for seq, num_tokens in plan.chunks]
            seconds = time.perf_counter() - began
            num_waiting = len(self.scheduler.waiting)
            self.on_step(StepRecord(chunks, len(plan.preempted), num_running, num_waiting, snapshot, seconds))
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
        seq_lens = [seq.num_computed + num_tokens for seq, num_tokens in plan.chunks]
        block_tables = starts = None
        if isinstance(self.manager, PagedManager):
            tables = [self.manager.block_table(seq_id) for seq_id in ids]
            padded = np.full((len(ids), max(map(len, tables))), -1, dtype=np.int32)
            for row, table in zip(padded, tables, strict=True):
                row[: len(table)] = table
            block_tables = xp.asarray(padded)
        elif isinstance(self.manager, StandardManager):
            starts = _ints([self.manager.start(seq_id) for seq_id in ids])
        return StepInputs(
            token_ids=_ints(token_ids),
            positions=_ints(positions),
            slot_mapping=_ints(slot_mapping),
            seq_lens=_ints(seq_lens),
            query_start_loc=_ints(query_start_loc),
            logits_rows=_ints(logits_rows),
            block_tables=block_tables,
            starts=starts,
        )

    def _sample(self, plan: StepPlan, logits: Array) -> list[TokenOutput]:
        """Draw a token for each sequence that has caught up, the samples that begin here included."""
        ready = [self._samples[seq.seq_id] for seq, _ in plan.chunks if seq.num_uncomputed == 0]
        # On a GPU, greedy needs only the winner of each row; the rows travel where a random draw needs them.
        greedy = all(sample.request.params.temperature == 0 for sample in ready)
        rows = to_host(logits.argmax(axis=-1) if greedy and on_gpu else logits)
        tokens = []
        for row, sample in zip(rows, ready, strict=True):
            siblings = sample.request.to_fork
            sample.request.to_fork = []
            for sibling in siblings:  # they share the prompt's blocks from here on
                self.scheduler.fork(sample.seq, sibling.seq)
            for each in (sample, *siblings):
                token_id = int(row) if rows.ndim == 1 else draw(row, each.request.params, each.rng)
                tokens.append(self._accept(each, token_id))
        return tokens

    def _accept(self, sample: _Sample, token_id: int) -> TokenOutput:
        """Append a token to a sample, bring its text up to date, and end it if this was the last one."""
        params, seq, output = sample.request.params, sample.seq, sample.output
        seq.tokens.append(token_id)
        output.token_ids.append(token_id)
        if sample.request.output.first_token is None:
            sample.request.output.first_token = time.perf_counter()
        reason: FinishReason | None = None
        if (token_id in self._eos and not params.ignore_eos) or token_id in params.stop_token_ids:
            reason = "stop"
        elif len(seq.tokens) >= seq.max_tokens:
            reason = "length"
        fresh = "" if reason == "stop" else sample.stream.push(token_id)
        if reason is not None:
            fresh += sample.stream.flush()
        text, hit = self._release_text(sample, fresh, last=reason is not None)
        output.text += text
        if hit:
            reason = "stop"
        if reason is not None:
            self._finish(sample, reason)
        return TokenOutput(sample.request.output.request_id, output.index, token_id, text, reason)

    def _release_text(self, sample: _Sample, fresh: str, last: bool) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string ended it."""
        text = sample.held_back + fresh
        stops = sample.request.params.stop
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], True
        keep = 0 if last else max((_overlap(text, stop) for stop in stops), default=0)
        sample.held_back = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def _finish(self, sample: _Sample, reason: FinishReason) -> None:
        request = sample.request
        if sample in request.to_fork:
            request.to_fork.remove(sample)  # it never began, so the scheduler does not know it
        else:
            self.scheduler.finish(sample.seq)
        sample.output.finish_reason = reason
        request.output.num_preemptions += sample.seq.num_preemptions
        del self._samples[sample.seq.seq_id]
        if all(each.output.finish_reason is not None for each in request.samples):
            request.output.finished = time.perf_counter()
            del self._requests[request.output.request_id]

    def _snapshot(self) -> Snapshot:
        waiting = self.scheduler.waiting
        return self.manager.snapshot((len(waiting[0].tokens), waiting[0].max_slots) if waiting else None)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def _ints(values: list[int]) -> Array:
    """To the device as int32, which every kernel takes."""
    return xp.asarray(np.array(values, dtype=np.int32))

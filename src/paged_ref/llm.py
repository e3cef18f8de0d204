"""The face of the engine: prompts in, text out. What a step does is in core.py."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from .beyond_device.kv import StreamedKV
from .beyond_device.options import LongOptions
from .beyond_device.relevance import Attend
from .beyond_device.streaming import Eviction
from .core.engine.engine import EngineCore
from .core.engine.outputs import RequestOutput, SequenceOutput, StepRecord, TokenOutput
from .core.engine.request import Request, Sample
from .core.engine.sampling import SamplingParams, generator
from .core.engine.scheduler import Preemption, Scheduler
from .core.engine.sequence import Group
from .core.engine.sequence import Sequence as TokenSequence
from .core.memory.kv import KVStorage
from .core.memory.manager import Forkable
from .core.memory.standard import Allocator, Reserve
from .core.model.config import kv_bytes_per_token
from .core.model.llama import Llama
from .core.model.loading import load
from .extras.beam import BeamSearch
from .extras.managers import WATERMARK, ManagerName, make_manager
from .kernels import why_not
from .timeline.events import Log, ModelOpened, RequestArrived

DEFAULT_KV_TOKENS = 4096
Prompt = str | Sequence[int]


class LLM(EngineCore):
    """A model, its KV cache and a batch of requests: prompts in, text out.

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
        allocator: Allocator = "first fit",
        preemption: Preemption | None = None,
        prefix_cache: bool = False,
        watermark: float = WATERMARK,
        free_order: Sequence[int] | None = None,
        device_blocks: int | None = None,
        host_blocks: int | None = None,
        attend: Attend = "all",
        evict: Eviction | None = None,
        full_layers: int | None = None,
        staging_pages: int | None = None,
        beyond_context: bool = False,
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
        `host_kv_tokens` (default for swap: as large as the cache). `reserve` and `allocator` are for the standard
        manager; `block_size`, `free_order` (the order in which blocks are handed out), `prefix_cache` and `watermark`
        (the share of the blocks that admission leaves) are for the paged one.

        `device_blocks`, in place of kv_cache_tokens, lets sequences be longer than the device: their pages stream in
        from `host_blocks` (default: enough for one sequence), and attention runs over all of them, or, for each new
        token, over those that matter (`attend`: "all", a budget in blocks, or a share of them). For `evict`,
        `full_layers` and `staging_pages` see LongOptions. `beyond_context` lets `max_model_len` exceed the context
        that the model was trained for; what it says out there is its own affair.

        `sanitize` checks every read of the cache; `log` is told all that happens (memory/events.py);
        `on_step` gets a StepRecord after each step. None of the three changes a token.
        """
        if backend != "auto" and (reason := why_not(backend)) is not None:
            raise ValueError(f"backend {backend!r} does not work on this machine: {reason}")
        checkpoint = load(model)
        config = checkpoint.config
        context = config.max_position_embeddings
        if max_model_len is not None and not 1 <= max_model_len <= (max_model_len if beyond_context else context):
            raise ValueError(f"max_model_len is {max_model_len}; 1 to the model's context of {context} can be had")
        long_context: StreamedKV | None = None
        if device_blocks is not None:
            _refuse_together(
                f"device_blocks is {device_blocks}",
                kv_cache_tokens=kv_cache_tokens, kv_cache_bytes=kv_cache_bytes, host_kv_tokens=host_kv_tokens,
                manager=None if manager == "paged" else manager, preemption=preemption, free_order=free_order,
                prefix_cache=prefix_cache or None,
            )  # fmt: skip
            if host_blocks is None:
                host_blocks = -(-(max_model_len or context) // max(1, block_size))
            options = LongOptions(device_blocks, host_blocks, staging_pages, attend, evict, full_layers)
            _, long_context = options.make(config, block_size, dtype, max_batch_tokens, backend, sanitize, log)
            kv_cache_tokens = long_context.manager.num_slots
        else:
            _refuse_together(
                "device_blocks is not given", host_blocks=host_blocks, staging_pages=staging_pages, evict=evict,
                full_layers=full_layers, attend=None if attend == "all" else attend,
            )  # fmt: skip
        if kv_cache_bytes is not None:
            if kv_cache_tokens is not None:
                raise ValueError("kv_cache_tokens and kv_cache_bytes are both given; give one of them")
            kv_cache_tokens = kv_cache_bytes // kv_bytes_per_token(config, dtype)
        num_slots = DEFAULT_KV_TOKENS if kv_cache_tokens is None else kv_cache_tokens
        if preemption is None:
            preemption = "swap" if manager == "swapping" else "recompute"
        if host_kv_tokens is None:
            host_kv_tokens = num_slots if preemption == "swap" else 0
        if max_model_len is None:
            usable = num_slots - num_slots % block_size if manager == "paged" and block_size > 0 else num_slots
            max_model_len = max(1, min(context, usable))
        kv_manager = (
            long_context.manager
            if long_context
            else make_manager(
                manager,
                num_slots,
                max_model_len=max_model_len,
                block_size=block_size,
                num_host_slots=host_kv_tokens,
                reserve=reserve,
                allocator=allocator,
                free_order=free_order,
                watermark=watermark,
                prefix_cache=prefix_cache,
                log=log,
            )
        )
        unit = block_size if kv_manager.paged else 1
        shape = (config.num_layers, num_slots // unit, unit, config.num_kv_heads, config.head_size)
        decoder = Llama(config, checkpoint.weights, dtype)
        super().__init__(
            config,
            checkpoint.tokenizer,
            decoder,
            kv_manager,
            Scheduler(kv_manager, max_batch_tokens, max_batch_seqs, preemption),
            long_context.storage if long_context else KVStorage(*shape, dtype, num_host_blocks=host_kv_tokens // unit),
            backend=backend,
            sanitize=sanitize,
            log=log,
            on_step=on_step,
            long_context=long_context,
        )
        self.max_model_len = max_model_len
        self._loops: dict[int, deque[TokenOutput]] = {}  # by request_id: the tokens of who waits in a loop
        self._next_request = 0
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


def _refuse_together(why: str, **given: object) -> None:
    """Raise ValueError for the first argument that was given although it does not go with another."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is {value!r}, and {why}; the two do not go together")

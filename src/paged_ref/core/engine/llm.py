"""The face of the core: prompts in, text out. What a step does is in engine.py."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import plural, require
from ..memory.block_pool import BlockPool
from ..memory.kv import KVCache
from ..memory.manager import KVCacheManager
from ..memory.paged import PagedManager
from ..model.config import ModelConfig
from ..model.llama import Llama
from ..model.loading import load
from ..model.tokenizer import TextStream, Tokenizer
from .engine import Engine
from .outputs import RequestOutput, SequenceOutput, TokenOutput
from .request import Request, Sample
from .sampling import SamplingParams, random_generator
from .scheduler import Scheduler
from .sequence import Group, Sequence

Prompt = str | SequenceOf[int]


class LLM:
    """A model, its KV cache and a batch of requests: prompts in, text out.

    Errors are ValueErrors with the argument, the value and the bound; a refused request changes nothing.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        *,
        manager: KVCacheManager | None = None,
        block_size: int = 16,
        kv_cache_tokens: int = 4096,
        max_batch_tokens: int = 512,
        max_batch_seqs: int = 256,
        backend: str = "auto",
        dtype: str = "float32",
    ) -> None:
        """`model` is "tiny" (embedded) or a directory that loading.py reads. `manager` is the KV cache's, by default
        a paged one with `kv_cache_tokens // block_size` blocks of `block_size` tokens."""
        require(block_size=(block_size, 1))
        checkpoint = load(model)
        config = checkpoint.config
        decoder = Llama(config, checkpoint.weights, dtype)
        if manager is None:
            manager = PagedManager(BlockPool(kv_cache_tokens // block_size), block_size)
        num_blocks = manager.num_slots // manager.block_size
        sizes = (config.num_layers, num_blocks, manager.block_size, config.num_kv_heads, config.head_size)
        kv = KVCache(*sizes, dtype, backend=backend)
        scheduler = Scheduler(manager, max_batch_tokens, max_batch_seqs)
        engine = Engine(decoder, kv, scheduler, config.eos_token_ids)
        self.open(engine, config, checkpoint.tokenizer, min(config.max_position_embeddings, manager.num_slots))

    def open(self, engine: Engine, config: ModelConfig, tokenizer: Tokenizer, max_model_len: int) -> None:
        """Begin with an engine that is made already. `max_model_len` bounds prompt and output together."""
        self.engine = engine
        self.config = config
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._next_request_id = 0

    # --- requests in -----------------------------------------------------------------------------------

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a prompt (text, or token ids taken as they are) and return its request id.

        Raises ValueError, and changes nothing, for a prompt that is empty, holds unknown token ids, or could never
        fit in the context or in the KV cache.
        """
        request_id = self._next_request_id
        self._next_request_id += 1  # first: no other request gets this id, even if an interrupt comes below
        ids = self._prompt_ids(prompt)
        text = prompt if isinstance(prompt, str) else None
        output = RequestOutput(request_id, text, ids, [], arrival=time.perf_counter())
        self.engine.add(self.make_request(output, params or SamplingParams()))
        return request_id

    def make_request(self, output: RequestOutput, params: SamplingParams) -> Request:
        """The sequences of a request: one for each of its `n` samples."""
        ids, first_id = output.prompt_token_ids, self.engine.next_seq_id
        max_len = self.longest(len(ids), params)
        seqs = [Sequence(first_id + i, ids.copy(), len(ids), max_len) for i in range(params.n)]
        output.outputs += [SequenceOutput(i) for i in range(params.n)]
        samples = [
            Sample(seq, output.outputs[i], random_generator(params, i), TextStream(self.tokenizer, ids))
            for i, seq in enumerate(seqs)
        ]
        by_id = {sample.seq.seq_id: sample for sample in samples}
        if self.engine.manager.can_fork:
            return Request(output, params, [Group(seqs[:1], params.n)], by_id, to_fork=samples[1:])
        return Request(output, params, [Group([seq]) for seq in seqs], by_id)

    def longest(self, prompt_len: int, params: SamplingParams) -> int:
        """The length at which a sequence of such a request ends at the latest."""
        return min(prompt_len + (params.max_tokens or self.max_model_len), self.max_model_len)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids:
            raise ValueError("the prompt is empty: it has no tokens, and this tokenizer adds none")
        unknown = [i for i in ids if not 0 <= i < self.config.vocab_size]
        if unknown:
            raise ValueError(f"the prompt holds token id {unknown[0]}; known are 0 to {self.config.vocab_size - 1}")
        if len(ids) >= self.max_model_len:
            context, slots = self.config.max_position_embeddings, self.engine.manager.num_slots
            raise ValueError(
                f"the prompt has {plural(len(ids), 'token')}; the context of {self.max_model_len} has no room for more "
                f"(the model's own is {context}; the KV cache holds {slots} tokens)"
            )
        return ids

    # --- tokens out ------------------------------------------------------------------------------------

    def step(self) -> list[TokenOutput]:
        """One step for every sequence that runs; [] when nothing is left."""
        return self.engine.step()

    def generate(
        self, prompts: Prompt | SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Run the prompts to their end; one RequestOutput for each, in order. `params` is one for all, or one for each.

        If a hook raises, these requests are aborted and nothing stays behind.
        """
        requests = self.queue(prompts, params)
        try:
            while any(request.output.finished is None for request in requests):
                self.step()
                for request in requests:
                    if request.output.error is not None:
                        raise request.output.error
        finally:
            for request in requests:
                self.engine.abort(request.output.request_id)
        return [request.output for request in requests]

    def queue(
        self, prompts: Prompt | SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None
    ) -> list[Request]:
        """Add a request for each prompt: all of them, or none and ValueError."""
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))
        batch: list[Any] = [prompts] if single else list(prompts)
        each = list(params) if isinstance(params, SequenceOf) else [params] * len(batch)
        if len(each) != len(batch):
            raise ValueError(f"params has length {len(each)}, and prompts {len(batch)}; give one, or one for each")
        ids: list[int] = []
        try:
            for prompt, wanted in zip(batch, each, strict=True):
                ids.append(self.add_request(prompt, wanted))
            return [self.engine.requests[request_id] for request_id in ids]
        except BaseException:
            for request_id in ids:
                self.engine.abort(request_id)
            raise

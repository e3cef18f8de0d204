"""`paged_ref.LLM`: the core's LLM with every option.

The parts are built here, and what cannot be combined is refused here. What an option does is in the one file from which
its part is imported.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import timeline
from .beyond_device.options import LongOptions
from .beyond_device.relevance import Attend
from .beyond_device.streaming import Eviction
from .core.checks import require_one_of
from .core.device import on_gpu
from .core.engine.engine import Observer
from .core.engine.outputs import RequestOutput
from .core.engine.request import Request
from .core.engine.sampling import SamplingParams as CoreSamplingParams
from .core.engine.scheduler import Preemption, Scheduler
from .core.engine.sequence import Group
from .core.engine.sequence import Sequence as TokenSequence
from .core.memory.kv import KV, KVCache
from .core.memory.manager import KVCacheManager
from .core.memory.standard import Reserve
from .core.model.config import ModelConfig, kv_bytes_per_token
from .extras.beam import BeamRequest
from .extras.formatted_kv import FORMATS, FormattedKV
from .extras.managers import WATERMARK, Allocator, ManagerName, make_manager
from .extras.memory_limit import require_memory
from .extras.sampling_params import SamplingParams, whole_number
from .extras.sanitizer import SanitizedKV
from .extras.step_records import StepRecord, StepRecords
from .extras.streams import StreamingLLM
from .extras.transaction import TransactionalEngine
from .interop.architectures import build_model
from .interop.checkpoints import load
from .interop.hf_tokenizer import MissingTokenizer
from .interop.model_memory import SAME_SIZE, SAMPLE_BYTES, require_kv_memory
from .kernels import why_not
from .tuned import launching
from .tuned.decoder import FusedDecoder
from .tuned.kv import TunedFormattedKV, TunedKV
from .tuned.linear import linear
from .tuned.threads import blas_threads

if TYPE_CHECKING:
    from .timeline.events import Log

DEFAULT_KV_TOKENS = 4096


class Parts(NamedTuple):
    """What the options make of memory."""

    manager: KVCacheManager
    kv: KV
    preemption: Preemption


class LLM(StreamingLLM):
    """A model, its KV cache and a batch of requests: prompts in, text out.

    Errors are ValueErrors with the argument, the value and the bound; a refused request changes nothing.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        *,
        manager: ManagerName | KVCacheManager = "paged",
        block_size: int = 16,
        kv_cache_tokens: int | None = None,
        kv_cache_bytes: int | None = None,
        kv_dtype: str | None = None,
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
        """`model` is "tiny" (embedded) or a Hugging Face directory; `dtype`, "float32" or "float16", its numbers'.

        Memory. `manager` is "paged", "standard", "swapping", or a KVCacheManager that is made already. The KV cache has
        `kv_cache_tokens` slots (default 4096), or as many as fit in `kv_cache_bytes`, rounded down to whole blocks, in
        the model's dtype or in `kv_dtype` ("bfloat16", "int8", "float8"). `block_size`, `free_order` (the order in
        which blocks are handed out), `prefix_cache` and `watermark` (the share of the blocks that admission leaves) are
        for the paged manager, `reserve` and `allocator` for the standard one. `preemption` is "recompute" or "swap"
        (the default of the swapping manager), to a host pool of `host_kv_tokens` (default: as large as the cache).

        Batches. `max_model_len` (default: the model's context, if the cache holds it) bounds prompt and output
        together; with `beyond_context` it may exceed the context that the model was trained for, where output is
        usually nonsense. A step computes at most `max_batch_tokens` tokens of at most `max_batch_seqs` sequences.

        Contexts longer than the device. `device_blocks` takes the place of kv_cache_tokens: pages stream in from
        `host_blocks` (default: enough for one sequence). For `attend`, `evict`, `full_layers` and `staging_pages` see
        LongOptions.

        `backend` names the attention backend. `sanitize` checks every read of the cache; `log` is called with every
        event (timeline/events.py), `on_step` with a StepRecord after each step. None of these three changes a token.
        """
        _require_types(
            log, on_step, block_size=block_size, kv_cache_tokens=kv_cache_tokens, kv_cache_bytes=kv_cache_bytes,
            host_kv_tokens=host_kv_tokens, max_model_len=max_model_len, max_batch_tokens=max_batch_tokens,
            max_batch_seqs=max_batch_seqs, device_blocks=device_blocks, host_blocks=host_blocks,
            staging_pages=staging_pages, full_layers=full_layers,
        )  # fmt: skip
        if backend != "auto" and (reason := why_not(backend)) is not None:
            raise ValueError(f"backend {backend!r} does not work on this machine: {reason}")
        require_one_of(("float16", "float32"), dtype=dtype)
        require_one_of((dtype, *FORMATS), kv_dtype=kv_dtype or dtype)
        checkpoint = load(model)
        config = checkpoint.config
        context = config.max_position_embeddings
        if max_model_len is not None and not 1 <= max_model_len <= (max_model_len if beyond_context else context):
            raise ValueError(f"max_model_len is {max_model_len}; 1 to the model's context of {context} is allowed")
        if device_blocks is not None:
            _refuse_together(
                f"device_blocks is {device_blocks}",
                kv_cache_tokens=kv_cache_tokens, kv_cache_bytes=kv_cache_bytes, host_kv_tokens=host_kv_tokens,
                manager=None if manager == "paged" else manager, preemption=preemption, free_order=free_order,
                prefix_cache=prefix_cache or None, kv_dtype=kv_dtype,
            )  # fmt: skip
            if host_blocks is None:
                host_blocks = -(-(max_model_len or context) // max(1, block_size))
            options = LongOptions(device_blocks, host_blocks, staging_pages, attend, evict, full_layers)
            long_manager, long_kv = options.make(config, block_size, dtype, max_batch_tokens, backend, sanitize, log)
            parts = Parts(long_manager, long_kv, "recompute")
        else:
            _refuse_together(
                "device_blocks is not given", host_blocks=host_blocks, staging_pages=staging_pages, evict=evict,
                full_layers=full_layers, attend=None if attend == "all" else attend,
            )  # fmt: skip
            preemption = preemption or ("swap" if manager == "swapping" else "recompute")
            num_slots = _num_slots(config, kv_dtype or dtype, kv_cache_tokens, kv_cache_bytes)
            if host_kv_tokens is None:
                host_kv_tokens = num_slots if preemption == "swap" else 0
            held = manager.num_slots if isinstance(manager, KVCacheManager) else num_slots
            sizes = ("kv_cache_tokens", held), ("host_kv_tokens", host_kv_tokens)
            require_kv_memory(config, dtype, kv_dtype or dtype, *sizes)
            if not isinstance(manager, KVCacheManager):
                unit = block_size if manager == "paged" and block_size > 0 else 1
                manager = make_manager(
                    manager, num_slots, max_model_len=max_model_len or max(1, min(context, num_slots // unit * unit)),
                    block_size=block_size, num_host_slots=host_kv_tokens, reserve=reserve, allocator=allocator,
                    free_order=free_order, watermark=watermark, prefix_cache=prefix_cache,
                )  # fmt: skip
            kv = _make_kv(config, manager, dtype, kv_dtype, host_kv_tokens, backend, sanitize)
            if log:
                manager = timeline.logged.LoggedManager(manager, log)
            parts = Parts(manager, kv, preemption)
        scheduler = Scheduler(parts.manager, max_batch_tokens, max_batch_seqs, parts.preemption)
        observers: list[Observer] = [StepRecords(scheduler, on_step)] if on_step else []
        self._log_steps = timeline.logged.LoggedSteps(log, checkpoint.tokenizer, scheduler) if log else None
        if self._log_steps:
            observers.append(self._log_steps)
        decoder = build_model(config, checkpoint.weights, dtype, linear)
        if launching.unavailable() is None:
            decoder = FusedDecoder(decoder)
        engine = TransactionalEngine(decoder, parts.kv, scheduler, config.eos_token_ids, observers)
        longest = max_model_len or max(1, min(context, parts.manager.num_slots))
        self.open(engine, config, checkpoint.tokenizer, longest)
        self.around_step = blas_threads
        if self._log_steps:
            self._log_steps.model_opened(Path(model).name, kv_bytes_per_token(config, dtype))

    def make_request(self, output: RequestOutput, params: CoreSamplingParams) -> Request:
        if params.stop and isinstance(self.tokenizer, MissingTokenizer):
            raise ValueError(f"stop is {params.stop}, a text; {self.tokenizer.directory} has no tokenizer.json")
        width, most = _width(params), self.engine.scheduler.max_batch_seqs
        if self.engine.manager.can_fork and width > most:  # before so many are made
            raise ValueError(f"a request of {width} sequences; at most max_batch_seqs = {most} can run")
        require_memory(f"a request of {width} sequences", SAMPLE_BYTES * width)
        if not isinstance(params, SamplingParams) or params.beam_width is None:
            return super().make_request(output, params)
        if not self.engine.manager.can_fork:
            raise ValueError("beam_width is set; beams share blocks, and only the paged manager can share")
        ids = output.prompt_token_ids
        max_len = self.longest(len(ids), params)
        group = Group([TokenSequence(self.engine.next_seq_id, ids.copy(), len(ids), max_len)], params.beam_width)
        on_reordered = self._log_steps.beams_reordered if self._log_steps else None
        return BeamRequest(output, params, group, self.tokenizer, on_reordered)

    def longest(self, prompt_len: int, params: CoreSamplingParams) -> int:
        if params.max_tokens is not None:
            return super().longest(prompt_len, params)

        def slots(length: int) -> int:  # the last token's K and V are never needed
            return self.engine.manager.max_slots_needed(prompt_len, length - 1, _width(params))

        lengths = range(prompt_len + 1, self.max_model_len + 1)
        return prompt_len + max(1, bisect_right(lengths, self.engine.manager.num_slots, key=slots))


def _width(params: CoreSamplingParams) -> int:
    """Sequences that a request has at the same time."""
    return getattr(params, "beam_width", None) or params.n


def _num_slots(config: ModelConfig, dtype: str, tokens: int | None, size: int | None) -> int:
    """Slots of the KV cache, from its size in tokens or in bytes."""
    if size is None:
        return DEFAULT_KV_TOKENS if tokens is None else tokens
    if tokens is not None:
        raise ValueError("kv_cache_tokens and kv_cache_bytes are both given; give one of them")
    return size // kv_bytes_per_token(config, SAME_SIZE.get(dtype, dtype))


def _make_kv(
    config: ModelConfig,
    manager: KVCacheManager,
    dtype: str,
    kv_dtype: str | None,
    host_kv_tokens: int,
    backend: str,
    sanitize: bool,
) -> KV:
    """The arrays that the manager speaks of, in the format that is asked for, watched or not."""
    unit = manager.block_size
    sizes = (config.num_layers, manager.num_slots // unit, unit, config.num_kv_heads, config.head_size)
    num_host_blocks = host_kv_tokens // unit
    kv: KVCache
    if kv_dtype is not None and kv_dtype != dtype:
        kv = (TunedFormattedKV if on_gpu else FormattedKV)(*sizes, kv_dtype, num_host_blocks, backend)
    else:
        kv = (TunedKV if on_gpu else KVCache)(*sizes, dtype, num_host_blocks, backend)
    return SanitizedKV(manager, kv) if sanitize else kv


def _require_types(log: object, on_step: object, **sizes: object) -> None:
    """Raise ValueError for the first size that is no whole number, and for a log or on_step that cannot be called."""
    for name, value in sizes.items():
        if value is not None:
            whole_number(name, value)
    for name, value in (("log", log), ("on_step", on_step)):
        if value is not None and not callable(value):
            raise ValueError(f"{name} is {value!r}; a function is needed")


def _refuse_together(why: str, **given: object) -> None:
    """Raise ValueError for the first argument that was given although it does not go with another."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is {value!r}, and {why}; the two do not go together")

"""`paged_ref.LLM`: the core's LLM with every option. The parts are built here, and what cannot be combined is refused
here; each option is carried out in the one file that the import of its part names."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from .beyond_device.options import LongOptions
from .beyond_device.relevance import Attend
from .beyond_device.streaming import Eviction
from .core.device import on_gpu
from .core.engine.engine import Engine, Observer
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
from .extras.beam import BeamRequest, SamplingParams
from .extras.managers import WATERMARK, Allocator, ManagerName, make_manager
from .extras.sanitizer import SanitizedKV
from .extras.step_records import StepRecord, StepRecords
from .extras.streams import StreamingLLM
from .interop.architectures import build_model
from .interop.checkpoints import load
from .kernels import why_not
from .timeline.events import Log
from .timeline.logged import LoggedManager, LoggedSteps
from .tuned.fused import OPERATIONS
from .tuned.kv import TunedKV

DEFAULT_KV_TOKENS = 4096


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

        | option | meaning | default |
        |---|---|---|
        | `manager` | "paged", "standard", "swapping", or a KVCacheManager that is made already | "paged" |
        | `kv_cache_tokens` | slots of the KV cache, rounded down to whole blocks | 4096 |
        | `kv_cache_bytes` | in place of it: as many slots as fit | |
        | `max_model_len` | bound of prompt and output together | the model's context, if the cache holds it |
        | `beyond_context` | `max_model_len` may exceed the model's context; the output there is usually nonsense | False |
        | `max_batch_tokens`, `max_batch_seqs` | the most that a step computes | 512, 256 |
        | `preemption` | "recompute" or "swap" | "recompute"; "swap" for the swapping manager |
        | `host_kv_tokens` | slots of the host pool for swapping | as many as the cache has |
        | `reserve`, `allocator` | of the standard manager: how much, and how a place is found | "max", "first fit" |
        | `block_size`, `free_order`, `watermark`, `prefix_cache` | of the paged manager: see extras/managers.py | 16 |
        | `device_blocks` | in place of kv_cache_tokens: sequences may be longer than the device | |
        | `host_blocks`, `staging_pages`, `attend`, `evict`, `full_layers` | of these: beyond_device/options.py | |
        | `backend` | of attention: a name of paged_ref.kernels.backends(), or "auto" | "auto" |
        | `dtype` | of weights and KV cache: "float32" or "float16" | "float32" |
        | `sanitize` | every read of the KV cache is checked (extras/sanitizer.py) | False |
        | `log` | called with every event (timeline/events.py) | |
        | `on_step` | called with a StepRecord after each step (extras/step_records.py) | |

        `sanitize`, `log` and `on_step` change no token.
        """
        if backend != "auto" and (reason := why_not(backend)) is not None:
            raise ValueError(f"backend {backend!r} does not work on this machine: {reason}")
        checkpoint = load(model)
        config = checkpoint.config
        _check_context(max_model_len, config, beyond_context)
        if device_blocks is not None:
            _refuse_together(
                f"device_blocks is {device_blocks}",
                kv_cache_tokens=kv_cache_tokens, kv_cache_bytes=kv_cache_bytes, host_kv_tokens=host_kv_tokens,
                manager=None if manager == "paged" else manager, preemption=preemption, free_order=free_order,
                prefix_cache=prefix_cache or None,
            )  # fmt: skip
            if host_blocks is None:
                host_blocks = -(-(max_model_len or config.max_position_embeddings) // max(1, block_size))
            options = LongOptions(device_blocks, host_blocks, staging_pages, attend, evict, full_layers)
            parts = options.make(config, block_size, dtype, max_batch_tokens, backend, sanitize, log)
            kv_manager: KVCacheManager = parts[0]
            kv: KV = parts[1]
            preemption = "recompute"
        else:
            _refuse_together(
                "device_blocks is not given", host_blocks=host_blocks, staging_pages=staging_pages, evict=evict,
                full_layers=full_layers, attend=None if attend == "all" else attend,
            )  # fmt: skip
            num_slots = _num_slots(config, dtype, kv_cache_tokens, kv_cache_bytes)
            preemption = preemption or ("swap" if manager == "swapping" else "recompute")
            if host_kv_tokens is None:
                host_kv_tokens = num_slots if preemption == "swap" else 0
            if isinstance(manager, KVCacheManager):
                kv_manager = manager
            else:
                unit = block_size if manager == "paged" and block_size > 0 else 1
                longest = max_model_len or max(1, min(config.max_position_embeddings, num_slots - num_slots % unit))
                kv_manager = make_manager(
                    manager, num_slots, max_model_len=longest, block_size=block_size, num_host_slots=host_kv_tokens,
                    reserve=reserve, allocator=allocator, free_order=free_order, watermark=watermark,
                    prefix_cache=prefix_cache,
                )  # fmt: skip
            kv = _make_kv(config, kv_manager, dtype, host_kv_tokens, backend, sanitize)
            if log:
                kv_manager = LoggedManager(kv_manager, log)
        scheduler = Scheduler(kv_manager, max_batch_tokens, max_batch_seqs, preemption)
        observers: list[Observer] = []
        self._log_steps: LoggedSteps | None = None
        if log:
            self._log_steps = LoggedSteps(log, checkpoint.tokenizer, scheduler)
            observers.append(self._log_steps)
        if on_step:
            observers.append(StepRecords(scheduler, on_step))
        decoder = build_model(config, checkpoint.weights, dtype, OPERATIONS)
        engine = Engine(decoder, kv, scheduler, config.eos_token_ids, observers)
        longest = max_model_len or max(1, min(config.max_position_embeddings, kv_manager.num_slots))
        self.open(engine, config, checkpoint.tokenizer, longest)
        self._loops: dict[int, deque] = {}
        if self._log_steps:
            self._log_steps.model_opened(Path(model).name, kv_bytes_per_token(config, dtype))

    def make_request(self, output: RequestOutput, params: CoreSamplingParams) -> Request:
        if not isinstance(params, SamplingParams) or params.beam_width is None:
            return super().make_request(output, params)
        if not self.engine.manager.can_fork:
            raise ValueError("beam_width is set; beams share blocks, and only the paged manager can share")
        ids = output.prompt_token_ids
        max_len = min(len(ids) + params.max_tokens, self.max_model_len)
        group = Group([TokenSequence(self.engine.next_seq_id, ids.copy(), len(ids), max_len)], params.beam_width)
        on_reordered = self._log_steps.beams_reordered if self._log_steps else None
        return BeamRequest(output, params, group, self.tokenizer, on_reordered)


def _check_context(max_model_len: int | None, config: ModelConfig, beyond_context: bool) -> None:
    context = config.max_position_embeddings
    if max_model_len is not None and not 1 <= max_model_len <= (max_model_len if beyond_context else context):
        raise ValueError(f"max_model_len is {max_model_len}; 1 to the model's context of {context} is allowed")


def _num_slots(config: ModelConfig, dtype: str, tokens: int | None, size: int | None) -> int:
    """Slots of the KV cache, from its size in tokens or in bytes."""
    if size is None:
        return DEFAULT_KV_TOKENS if tokens is None else tokens
    if tokens is not None:
        raise ValueError("kv_cache_tokens and kv_cache_bytes are both given; give one of them")
    return size // kv_bytes_per_token(config, dtype)


def _make_kv(
    config: ModelConfig, manager: KVCacheManager, dtype: str, host_kv_tokens: int, backend: str, sanitize: bool
) -> KV:
    unit = manager.block_size
    sizes = (config.num_layers, manager.num_slots // unit, unit, config.num_kv_heads, config.head_size)
    kv = (TunedKV if on_gpu else KVCache)(*sizes, dtype, host_kv_tokens // unit, backend)
    return SanitizedKV(manager, kv) if sanitize else kv


def _refuse_together(why: str, **given: object) -> None:
    """Raise ValueError for the first argument that was given although it does not go with another."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is {value!r}, and {why}; the two do not go together")

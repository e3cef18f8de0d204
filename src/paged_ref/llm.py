"""`paged_ref.LLM`: the core's LLM with every option.

The parts are built here, and what cannot be combined is refused here. What an option does is in the one file from which
its part is imported.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

from . import timeline
from .beyond_device.options import LongOptions
from .beyond_device.relevance import Attend
from .beyond_device.streaming import Eviction
from .core.checks import require_one_of
from .core.device import on_gpu
from .core.engine.engine import Observer
from .core.engine.outputs import RequestOutput, TokenOutput
from .core.engine.request import Request
from .core.engine.sampling import SamplingParams as CoreSamplingParams
from .core.engine.scheduler import Preemption
from .core.engine.sequence import Group
from .core.engine.sequence import Sequence as TokenSequence
from .core.memory.kv import KV, KVCache
from .core.memory.manager import KVCacheManager
from .core.memory.paged import PagedManager
from .core.memory.standard import Reserve
from .core.model.config import ModelConfig, kv_bytes_per_token
from .core.model.tokenizer import Tokenizer
from .distributed.group import Group as RankGroup
from .distributed.plan import Leader
from .distributed.split import Part, heads_of_ranks, split_products
from .extras import streams
from .extras.arguments import refuse_unknown, require_flag, shown, whole_number
from .extras.beam import BeamRequest
from .extras.formats import MAX_VALUE
from .extras.formatted_kv import ALIASES, FORMATS, FormattedKV, Scales, format_of, read_scales
from .extras.managers import WATERMARK, Allocator, ManagerName, make_manager
from .extras.memory_limit import require_memory
from .extras.prefix_cache import CachingBlockPool
from .extras.sampling_params import SamplingParams
from .extras.sanitizer import SanitizedKV
from .extras.shaping import ScoringScheduler, ShapedRequest, ShapingEngine, Vocabulary, WholeText
from .extras.step_records import StepRecord, StepRecords
from .extras.streams import Params, StreamingLLM
from .interop.architectures import attention_variants, build_model
from .interop.chat_template import Message
from .interop.checkpoints import load
from .interop.hf_tokenizer import MissingTokenizer, chat_prompts
from .interop.model_memory import SAMPLE_BYTES, format_bytes_per_token, require_kv_memory
from .kernels import why_not
from .tuned.decoder import with_few_calls
from .tuned.kv import TunedFormattedKV, TunedKV
from .tuned.linear import linear
from .tuned.threads import blas_threads

if TYPE_CHECKING:
    from .timeline.events import Log

DEFAULT_KV_TOKENS = 4096
INSTEAD = {  # of vLLM's words
    "enable_prefix_caching": "give prefix_cache", "kv_cache_dtype": "give kv_dtype",
    "max_num_batched_tokens": "give max_batch_tokens", "max_num_seqs": "give max_batch_seqs",
    "gpu_memory_utilization": "give kv_cache_bytes or kv_cache_tokens", "kv_cache_memory_bytes": "give kv_cache_bytes",
    "num_gpu_blocks_override": "give kv_cache_tokens", "swap_space": "give preemption='swap' and host_kv_tokens",
    "attention_backend": "give backend", "seed": "SamplingParams has it", "tokenizer": "model has its own",
    "tensor_parallel_size": "run `paged-ref generate --tensor-parallel N`, or give group",
    "data_parallel_size": "run `paged-ref generate --replicas N`", "enable_chunked_prefill": "it is always on",
}  # fmt: skip
KVScales = Sequence[Any] | Mapping[int, Any]  # a pair for each layer (extras/formatted_kv.py)


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
        kv_scales: KVScales | None = None,
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
        group: RankGroup | None = None,
        **unknown: Never,
    ) -> None:
        """`model` is "tiny" (embedded), a Hugging Face directory or NAME.gguf; `dtype`, of its numbers, is "float32" or
        "float16".

        Memory. `manager` is "paged", "standard", "swapping", or a KVCacheManager that is made already. The KV cache has
        `kv_cache_tokens` slots (default 4096), or as many as fit in `kv_cache_bytes`, rounded down to whole blocks, in
        the model's dtype or in `kv_dtype`: "bfloat16", "int8", "float8" or, the same, vLLM's "fp8". int8 and float8
        have scales for each layer and KV head: `kv_scales`, or those that the first step's tokens ask for.
        `block_size`, `free_order` (the order in which blocks are handed out), `prefix_cache` and `watermark` (the share
        of the blocks that admission leaves) are for the paged manager, `reserve` and `allocator` for the standard one.
        `preemption` is "recompute" or "swap" (the default of the swapping manager), to a host pool of `host_kv_tokens`
        (default: as large as the cache).

        Batches. `max_model_len` (default: the model's context, if the cache holds it) bounds prompt and output
        together; with `beyond_context` it may exceed the context that the model was trained for, where output is
        usually nonsense. A step computes at most `max_batch_tokens` tokens of at most `max_batch_seqs` sequences.

        Contexts longer than the device. `device_blocks` takes the place of kv_cache_tokens: pages stream in from
        `host_blocks` (default: enough for one sequence). For `attend`, `evict`, `full_layers` and `staging_pages` see
        LongOptions.

        `backend` names the attention backend. `sanitize` checks every read of the cache; `log` is called with every
        event (timeline/events.py), `on_step` with a StepRecord after each step. None of these three changes a token.

        `group` (distributed/group.py): this is one of several ranks, each of which has its part of the weights, K and
        V, and an LLM with the same arguments. Rank 0 takes the requests; `distributed.plan.follow` is the others'.
        `kv_cache_bytes` are those of each rank, and `sanitize` watches the heads of rank 0.
        """
        _require_types(locals())
        refuse_unknown("LLM", unknown, [*signature(LLM).parameters][:-1], INSTEAD)
        if not isinstance(backend, str):
            raise ValueError(f"backend is {backend!r}; a name is needed")
        if backend != "auto" and (reason := why_not(backend)) is not None:
            raise ValueError(f"backend {backend!r} does not work on this machine: {reason}")
        require_one_of(("float16", "float32"), dtype=dtype)
        require_one_of((dtype, *FORMATS, *ALIASES), kv_dtype=dtype if kv_dtype is None else kv_dtype)
        if kv_scales is not None and (kv_dtype is None or format_of(kv_dtype) not in MAX_VALUE):
            raise ValueError(f"kv_scales are given, and kv_dtype is {kv_dtype!r}; only int8 and float8 have scales")
        if group is not None and not isinstance(group, RankGroup):
            raise ValueError(f"group is {shown(group)}; a Group of distributed/group.py is needed")
        checkpoint = load(model)
        config, weights = checkpoint.config, checkpoint.weights
        scales = () if kv_scales is None else read_scales(kv_scales, config.num_layers, config.num_kv_heads)
        kv: KV
        pool: CachingBlockPool | None = None
        if group is not None:
            weights = part = Part(config, weights, group.rank, group.size)
            first, end = heads_of_ranks(config, group.size)[1][group.rank]
            scales = [(keys[first:end], values[first:end]) for keys, values in scales]
            config = part.config
        context = config.max_position_embeddings
        if max_model_len is not None and not 1 <= max_model_len <= (max_model_len if beyond_context else context):
            raise ValueError(f"max_model_len is {max_model_len}; 1 to the model's context of {context} is allowed")
        if device_blocks is not None:
            _refuse_together(
                f"device_blocks is {device_blocks}",
                kv_cache_tokens=kv_cache_tokens, kv_cache_bytes=kv_cache_bytes, host_kv_tokens=host_kv_tokens,
                manager=None if manager == "paged" else manager, preemption=preemption, free_order=free_order,
                prefix_cache=prefix_cache or None, kv_dtype=kv_dtype, group=group,
            )  # fmt: skip
            if any(attention_variants(config)):
                raise ValueError(
                    f"device_blocks is {device_blocks}; streamed attention has no softcap, which this model needs"
                )
            if host_blocks is None:
                host_blocks = -(-(max_model_len or context) // max(1, block_size))
            options = LongOptions(device_blocks, host_blocks, staging_pages, attend, evict, full_layers)
            manager, kv = options.make(config, block_size, dtype, max_batch_tokens, backend, sanitize, log)
            preemption = "recompute"
        else:
            _refuse_together(
                "device_blocks is not given", host_blocks=host_blocks, staging_pages=staging_pages, evict=evict,
                full_layers=full_layers, attend=None if attend == "all" else attend,
            )  # fmt: skip
            if preemption is None:
                preemption = "swap" if manager == "swapping" else "recompute"
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
            watched = sanitize and (group is None or group.rank == 0)
            kv = _make_kv(config, manager, dtype, kv_dtype, scales, host_kv_tokens, backend, watched)
            if isinstance(manager, PagedManager) and isinstance(manager.pool, CachingBlockPool):
                pool = manager.pool
            if log:
                manager = timeline.logged.LoggedManager(manager, log)
        longest = max_model_len or max(1, min(context, manager.num_slots))
        scheduler = ScoringScheduler(pool, manager, max_batch_tokens, max_batch_seqs, preemption)
        observers: list[Observer] = [StepRecords(scheduler, on_step)] if on_step else []
        self._log_steps = timeline.logged.LoggedSteps(log, checkpoint.tokenizer, scheduler) if log else None
        if self._log_steps:
            observers.append(self._log_steps)
        decoder = build_model(config, weights, dtype, linear, longest)
        if group is not None:
            split_products(decoder, group)
            observers.insert(0, Leader(group))
        decoder = with_few_calls(decoder)
        self.vocabulary = Vocabulary(checkpoint.tokenizer, config.vocab_size)
        engine = ShapingEngine(self.vocabulary, decoder, kv, scheduler, config.eos_token_ids, observers)
        self.open(engine, checkpoint.config, checkpoint.tokenizer, longest)
        self.around_step = blas_threads
        if self._log_steps:
            self._log_steps.model_opened(Path(model).name, kv_bytes_per_token(checkpoint.config, dtype))
        if log and group is not None:
            log(timeline.events.RanksOpened(*heads_of_ranks(checkpoint.config, group.size)))

    def make_request(self, output: RequestOutput, params: CoreSamplingParams) -> Request:
        for name in ("stop", "bad_words"):
            if isinstance(self.tokenizer, MissingTokenizer) and (texts := getattr(params, name, ())):
                raise ValueError(f"{name} is {texts}, a text; {self.tokenizer.directory} has no tokenizer.json")
        width, most = _width(params), self.engine.scheduler.max_batch_seqs
        if self.engine.manager.can_fork and width > most:  # before so many are made
            raise ValueError(f"a request of {width} sequences; at most max_batch_seqs = {most} can run")
        require_memory(f"a request of {width} sequences", SAMPLE_BYTES * width)
        if not isinstance(params, SamplingParams):
            return super().make_request(output, params)
        prompt_len = len(output.prompt_token_ids)
        self.vocabulary.check(params, prompt_len, self.longest(prompt_len, params))
        if params.beam_width is None:
            plain = super().make_request(output, params)
            if not params.shapes and params.skip_special_tokens and not self.vocabulary.special_stops(params):
                return plain
            return ShapedRequest(plain, params, self.vocabulary, self.engine.eos_token_ids)
        if not self.engine.manager.can_fork:
            raise ValueError("beam_width is set; beams share blocks, and only the paged manager can share")
        ids = output.prompt_token_ids
        max_len = self.longest(len(ids), params)
        group = Group([TokenSequence(self.engine.next_seq_id, ids.copy(), len(ids), max_len)], params.beam_width)
        on_reordered = self._log_steps.beams_reordered if self._log_steps else None
        tokenizer = self.tokenizer if params.skip_special_tokens else WholeText(self.tokenizer.inner)
        return BeamRequest(output, params, group, tokenizer, on_reordered)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_token: Callable[[TokenOutput], None] | None = None,
        **unknown: Never,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, written in the form that the model was trained on.

        `messages` are dicts with role and content. The form is the checkpoint's chat template, or `chat_template`.
        `continue_final_message` goes on inside the last message. The rest is as in generate().
        """
        refuse_unknown("chat", unknown, [*signature(self.chat).parameters][:-1], streams.INSTEAD)
        prompts = chat_prompts(
            self.tokenizer, messages, chat_template, chat_template_kwargs, add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message, tools=tools,
        )  # fmt: skip
        return self.generate(prompts, params, on_token=on_token)

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer: `encode(text)` to token ids, `decode(ids)` to text."""
        return self.tokenizer

    def reset_prefix_cache(self) -> bool:
        """Forget what the prefix cache keeps. False, and nothing is forgotten, while a request is unfinished."""
        with self._turns.taken("reset_prefix_cache"):
            if not self.has_unfinished:
                self.engine.manager.clear()
            return not self.has_unfinished

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
    require_memory(f"kv_cache_bytes is {size}: a KV cache of this size", size, device=True)
    return size // format_bytes_per_token(config, dtype)


def _make_kv(
    config: ModelConfig,
    manager: KVCacheManager,
    dtype: str,
    kv_dtype: str | None,
    scales: Scales,
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
        kv = (TunedFormattedKV if on_gpu else FormattedKV)(*sizes, kv_dtype, num_host_blocks, backend, scales)
        if backend != "auto":
            kv.try_backend(config.num_heads, dtype)
    else:
        kv = (TunedKV if on_gpu else KVCache)(*sizes, dtype, num_host_blocks, backend)
    for layer, variant in enumerate(attention_variants(config)):
        if variant is not None:
            given = kv.variants[layer] or variant
            kv.variants[layer] = replace(variant, key_scales=given.key_scales, value_scales=given.value_scales)
    return SanitizedKV(manager, kv) if sanitize else kv


def _require_types(given: Mapping[str, object]) -> None:
    """Raise ValueError for the first argument of LLM that is not of the type in the signature: a whole number, True or
    False, a function."""
    for name, kind in LLM.__init__.__annotations__.items():
        value = given.get(name)
        if value is None and kind.endswith("None"):
            continue
        if kind.startswith("int"):
            whole_number(name, value)
        elif kind == "bool":
            require_flag(name, value)
        elif kind.startswith(("Log", "Callable")) and not callable(value):
            raise ValueError(f"{name} is {shown(value)}; a function is needed")


def _refuse_together(why: str, **given: object) -> None:
    """Raise ValueError for the first argument that was given although it does not go with another."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is {shown(value)}, and {why}; the two do not go together")

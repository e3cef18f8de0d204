"""The same decisions in the words of other servers: what to write into their options, and what they can do.

Names and defaults were looked up in the version that each entry states, here; a later one may have others:
  vLLM          docs.vllm.ai/en/v0.29.0/api/vllm/config/cache (CacheConfig), its V1 guide for preemption
  SGLang        docs.sglang.io, advanced_features: server_arguments, hyperparameter_tuning, hicache_best_practices
  TensorRT-LLM  nvidia.github.io/TensorRT-LLM/1.3.0rc27/llm-api/reference: KvCacheConfig, SchedulerConfig
  transformers  generation/configuration_utils.py, ContinuousBatchingConfig
"""

from __future__ import annotations

from dataclasses import dataclass

from .assess import Assessment
from .hardware import GIB

Options = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Server:
    """One server: the options for an assessment, and what it supports, a sentence each."""

    name: str
    version: str  # that was looked at
    start: str  # what the options follow
    options: Options
    supports: tuple[str, ...]

    @property
    def command(self) -> str:
        """The options as they are written: `--option value` on a command line, `name=value` in Python."""
        if self.start.endswith("("):
            return (
                self.start + ", ".join(f"{name}={value}" for name, value in self.options) + ")" * self.start.count("(")
            )
        return " ".join([self.start, *(f"{name} {value}".strip() for name, value in self.options)])


def servers(a: Assessment) -> tuple[Server, ...]:
    """vLLM, SGLang, TensorRT-LLM and Hugging Face continuous batching, set up as the assessment advises."""
    return _vllm(a), _sglang(a), _tensorrt_llm(a), _transformers(a)


def _swaps(a: Assessment) -> bool:
    """Swapping beats computing again for sequences of the mean length."""
    return a.swap_from is not None and a.swap_from <= a.mean_length


def _host_gib(a: Assessment) -> str:
    """As much host memory as the device has for K and V."""
    return f"{a.kv_bytes / GIB:.0f}" if a.kv_bytes >= GIB else f"{a.kv_bytes / GIB:.2f}"


def _of_free_memory(a: Assessment) -> str:
    """The share of what the weights leave, for servers that count from there."""
    return f"{a.kv_bytes / (a.gpu.memory_bytes - a.model.weight_bytes):.2f}"


def _parallel(a: Assessment, option: str) -> Options:
    return ((option, str(a.gpu.count)),) if a.gpu.count > 1 else ()


def _vllm(a: Assessment) -> Server:
    return Server(
        name="vLLM",
        version="0.29",
        start=f"vllm serve {a.model.name}",
        options=(
            ("--gpu-memory-utilization", f"{a.constants.memory_share:g}"),
            ("--block-size", f"{a.block_size}"),
            ("--max-model-len", f"{a.max_model_len}"),
            ("--max-num-seqs", f"{max(1, a.paged.sequences)}"),
            *((("--kv-cache-dtype", "fp8"),) if a.model.kv_bits == 8 else ()),
            *_parallel(a, "--tensor-parallel-size"),
            *((("--kv-offloading-size", _host_gib(a)),) if _swaps(a) else ()),
        ),
        supports=(
            "Pages of 16 tokens unless told; which sizes work depends on the attention backend. The share of "
            "memory (default 0.92) has to hold activations, too.",
            "Prefix cache on from the start, whole blocks by hash (--no-enable-prefix-caching).",
            "Preempts by computing again; --kv-offloading-size (GiB) keeps blocks on the host that are given up.",
        ),
    )


def _sglang(a: Assessment) -> Server:
    return Server(
        name="SGLang",
        version="server arguments of main, 2026",
        start=f"python -m sglang.launch_server --model-path {a.model.name}",
        options=(
            ("--mem-fraction-static", f"{a.constants.memory_share:g}"),
            ("--page-size", f"{a.block_size}"),
            ("--context-length", f"{a.max_model_len}"),
            ("--max-running-requests", f"{max(1, a.paged.sequences)}"),
            *((("--kv-cache-dtype", "fp8_e4m3"),) if a.model.kv_bits == 8 else ()),
            *_parallel(a, "--tp-size"),
            *((("--enable-hierarchical-cache", ""), ("--hicache-size", _host_gib(a))) if _swaps(a) else ()),
        ),
        supports=(
            "Pages of 1 token unless told. The share holds weights and K, V; by default it is chosen by the GPU.",
            "Prefix cache on from the start, a radix tree that shares single pages (--disable-radix-cache).",
            "Preempts by computing again (it says: retract); HiCache keeps a second tier on the host.",
        ),
    )


def _tensorrt_llm(a: Assessment) -> Server:
    host = ((("host_cache_size", f"{a.kv_bytes}"),)) if _swaps(a) else ()
    return Server(
        name="TensorRT-LLM",
        version="1.3.0rc27",
        start="KvCacheConfig(",
        options=(
            ("free_gpu_memory_fraction", _of_free_memory(a)),
            ("tokens_per_block", f"{a.block_size}"),
            ("enable_block_reuse", "True"),
            *((("dtype", "'fp8'"),) if a.model.kv_bits == 8 else ()),
            *host,
        ),
        supports=(
            f"Beside it: LLM(max_seq_len={a.max_model_len}, max_batch_size={max(1, a.paged.sequences)}, "
            f"tensor_parallel_size={a.gpu.count}).",
            "Pages of 32 tokens unless told, a power of two. The share is of the memory that the weights leave.",
            "Prefix cache on from the start, a radix tree, blocks in part too (enable_partial_reuse).",
            "By default a request starts only if it can end (GUARANTEED_NO_EVICT), so none is preempted; that "
            "gives away part of what paging brings. capacity_scheduler_policy MAX_UTILIZATION pauses instead.",
        ),
    )


def _transformers(a: Assessment) -> Server:
    no_fp8 = ("It keeps K and V in the model's dtype: the 8 bits assumed here cannot be had.",)
    return Server(
        name="Hugging Face transformers, continuous batching",
        version="5.24.0",
        start="ContinuousBatchingConfig(",
        options=(
            ("page_size", f"{a.block_size}"),
            ("max_memory_percent", _of_free_memory(a)),
            ("max_requests_per_batch", f"{max(1, a.paged.sequences)}"),
            ("allow_block_sharing", "True"),
            *((("cpu_offload_space", f"{a.kv_bytes / GIB:.1f}"),) if _swaps(a) else ()),
        ),
        supports=(
            "For model.generate_batch; pages of 256 tokens unless told. The share is of the memory that the "
            "weights leave.",
            "Prefix cache on from the start (allow_block_sharing).",
            "Preempts by computing again; with cpu_offload_space (GiB) by swapping.",
            *(no_fp8 if a.model.kv_bits == 8 else ()),
        ),
    )

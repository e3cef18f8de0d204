"""`paged-ref bench model`: whole-model decoding on a GPU, against the speed of its memory and against a CPU run.

First the embedded model: greedy tokens in float16 on the GPU, compared with float32 on the CPU. A token may differ
where two logits are nearer than float16 tells apart. Then a Llama of about a billion random parameters, float16, a
batch of equal prompts: each decode step must read all weights and all K and V once, and a bound of a step is these
bytes over the bandwidth of a copy, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from ..core.device import on_gpu, reason
from ..core.model.config import ModelConfig, kv_bytes_per_token
from ..extras.sampling_params import SamplingParams
from ..extras.step_records import StepRecord
from ..interop.architectures import num_weights
from ..llm import LLM
from ..views.common import options
from ..views.common.console import Console
from ..views.common.versions import describe_device
from .gpu_clock import GpuClock
from .random_model import repeated_weights, require_prompt_memory, save_checkpoint
from .results import table_of, write_results

# The sizes of Llama 3.2 1B: 1.24 billion parameters.
ONE_BILLION = ModelConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8,
    head_size=64, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
)  # fmt: skip
PROMPTS = (
    "Four score and seven years ago our",
    "Once upon a time, there was a little girl named",
    "Tom and Lily went to the park. They saw",
    "The dog was very happy because",
    "One day, a big bear",
    "It was raining, so",
)
NEW_TOKENS = 64
NEAR = 0.05  # two logits that float16 may put in another order: a rounding of each step on the way to them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.integer(parser, "--batch", 32, "sequences in a batch")
    options.integer(parser, "--prompt-tokens", 1024)
    options.integer(parser, "--new-tokens", 64, least=3)  # the first steps of decoding are not counted
    options.json_output(parser)


def main(args: argparse.Namespace) -> int:
    if not on_gpu:
        raise ValueError(f"this benchmark needs a GPU: {reason}")
    same = compared(cpu_tokens())
    bandwidth = GpuClock().copy_bandwidth()
    results = decode_speed(ONE_BILLION, "float16", args, bandwidth)
    report(Console(), same, results, bandwidth)
    agreement = [one._asdict() for one in same]
    write_results(args.json, copy_bytes_per_second=bandwidth, against_cpu_float32=agreement, decode=results)
    return 0 if all(one.gap <= NEAR for one in same) else 1


# ---- the embedded model: the same tokens as on a CPU


class Agreement(NamedTuple):
    """How far a continuation agrees with the one of the CPU."""

    tokens: int  # that agree before the first that differs
    gap: float  # there: the logit of the token that was chosen over the one of the CPU's token; 0 where none differs


def greedy_run(dtype: str) -> tuple[list[list[int]], list[list[np.ndarray]]]:
    """The embedded model's continuations of PROMPTS, and the logits from which each token was chosen."""
    logits: list[list[np.ndarray]] = [[] for _ in PROMPTS]

    def keep(kept: list[np.ndarray], tokens: Sequence[int], row: np.ndarray) -> np.ndarray:
        kept.append(np.array(row))
        return row

    params = [
        SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, logits_hook=partial(keep, kept)) for kept in logits
    ]
    return [output.outputs[0].token_ids for output in LLM("tiny", dtype=dtype).generate(list(PROMPTS), params)], logits


def cpu_tokens() -> list[list[int]]:
    """The continuations in float32 on the CPU: another process, because the device is chosen at import."""
    code = f"import json; from {__name__} import greedy_run; print(json.dumps(greedy_run('float32')[0]))"
    environment = {**os.environ, "PAGED_REF_DEVICE": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"the run on the CPU failed: {run.stderr.strip().splitlines()[-1]}")
    tokens: list[list[int]] = json.loads(run.stdout)
    return tokens


def compared(want: list[list[int]]) -> list[Agreement]:
    """For each prompt, how far a float16 run agrees with `want`. Up to the first difference both read the same tokens,
    so the float16 logits there say how near the two choices were."""
    tokens, all_logits = greedy_run("float16")
    found = []
    for mine, wanted, logits in zip(tokens, want, all_logits, strict=True):
        count = next((i for i, (a, b) in enumerate(zip(mine, wanted, strict=True)) if a != b), len(wanted))
        gap = float(logits[count][mine[count]] - logits[count][wanted[count]]) if count < len(wanted) else 0.0
        found.append(Agreement(count, gap))
    return found


# ---- a large model: the speed of memory


def decode_speed(config: ModelConfig, dtype: str, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """Decode a batch of random prompts: the median step, and the bound as a share of it."""
    rng = np.random.default_rng(0)
    require_prompt_memory(args.batch, args.prompt_tokens)
    prompts = rng.integers(3, config.vocab_size, size=(args.batch, args.prompt_tokens)).tolist()
    length = args.prompt_tokens + args.new_tokens
    steps: list[StepRecord] = []
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), config, repeated_weights(config, dtype))
        llm = LLM(
            folder, dtype=dtype, max_model_len=length, max_batch_tokens=4096,
            kv_cache_tokens=args.batch * (length + 16), on_step=steps.append,
        )  # fmt: skip
        llm.generate(prompts, SamplingParams(max_tokens=args.new_tokens, ignore_eos=True))
    decode = [step for step in steps if len(step.chunks) == args.batch == sum(n for _, n in step.chunks)]
    seconds = median(step.seconds for step in decode[1:])  # the first compiles what is missing
    keys = args.prompt_tokens + args.new_tokens // 2
    weights_bytes = weights_read(config) * np.dtype(dtype).itemsize
    kv_bytes = args.batch * keys * kv_bytes_per_token(config, dtype)
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": args.batch / seconds,
        "weights_bytes": weights_bytes,
        "kv_bytes": kv_bytes,
        "share_of_bound": (weights_bytes + kv_bytes) / bandwidth / seconds,
        "batch": args.batch,
        "keys": keys,
        "steps": len(decode) - 1,
    }


def weights_read(config: ModelConfig) -> int:
    """How many weights a decode step reads: all; but where the embeddings are not also the head, only the few rows of
    the step's tokens, which are not counted."""
    count = num_weights(config)
    return count - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)


# ---- what is printed


def report(console: Console, same: list[Agreement], result: dict[str, Any], bandwidth: float) -> None:
    """Print the results."""
    whole = sum(one.tokens == NEW_TOKENS for one in same)
    console.print(
        f"Embedded model, float16: {whole} of {len(same)} continuations of {NEW_TOKENS} tokens are those of float32 on "
        "the CPU"
    )
    for number, one in enumerate(same, start=1):
        if one.tokens < NEW_TOKENS:
            near = "too near for float16" if one.gap <= NEAR else f"float16 should tell them apart (bound {NEAR})"
            console.print(f"  prompt {number}: token {one.tokens + 1} differs; two logits {one.gap:.4f} apart: {near}")
    milliseconds, share = f"{1e3 * result['seconds_per_step']:.2f}", f"{result['share_of_bound']:.0%}"
    row = (milliseconds, f"{result['tokens_per_second']:.0f}", share)
    title = f"Decoding, batch {result['batch']}, {result['keys']} keys, {describe_device()}"
    console.print(table_of(("ms per step", "tokens/s", "of the bound"), [row], title=title, title_justify="left"))
    console.print(
        f"The bound: {result['weights_bytes'] / 1e9:.2f} GB of weights and {result['kv_bytes'] / 1e9:.2f} GB of "
        f"K and V for each step, at {bandwidth / 1e9:.0f} GB/s, which a copy reaches. "
        "Steps are timed from schedule to tokens."
    )

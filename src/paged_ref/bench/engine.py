"""`paged-ref bench engine`: tokens per second of this engine, and of transformers with the same weights.

A Llama of 15 million random parameters continues one batch of prompts of equal length, greedily and without an end
of sequence: the work is the same for all. The runs take turns, and the medians are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from ..core.model.config import ModelConfig
from ..extras.managers import ManagerName
from ..extras.sampling_params import SamplingParams
from ..interop.architectures import random_weights
from ..llm import LLM
from ..views.common import options
from ..views.common.console import Console
from ..views.common.versions import describe_device
from .random_model import require_prompt_memory, save_checkpoint
from .results import table_of, take_turns, write_results

Run = Callable[[], list[list[int]]]  # the new tokens of each sequence
TRANSFORMERS = "transformers generate"
CONFIG = ModelConfig(
    vocab_size=32000, hidden_size=288, intermediate_size=768, num_layers=6, num_heads=6, num_kv_heads=6, head_size=48,
    max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_ids=(2,),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.integer(parser, "--batch", 8, "sequences in a batch")
    options.integer(parser, "--prompt-tokens", 32)
    options.integer(parser, "--new-tokens", 64)
    options.integer(parser, "--rounds", 5, "times that each takes its turn")
    options.json_output(parser)


def main(args: argparse.Namespace) -> int:
    console = Console()
    require_prompt_memory(args.batch, args.prompt_tokens)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, CONFIG.vocab_size, size=(args.batch, args.prompt_tokens)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), CONFIG, random_weights(CONFIG))
        managers: tuple[ManagerName, ...] = ("paged", "standard")
        runs: dict[str, Run] = {manager: _ours(folder, manager, prompts, args) for manager in managers}
        if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
            runs[TRANSFORMERS] = _transformers(folder, prompts, args)
        outputs = {name: run() for name, run in runs.items()}  # compiles and warms up
        turns = take_turns(runs.values(), args.rounds)

    seconds = {name: median(t.seconds for t in times) for name, times in zip(runs, turns, strict=True)}
    baseline = list(runs)[-1]
    results = [
        {
            "name": name,
            "tokens_per_second": args.batch * args.new_tokens / taken,
            f"times_{baseline}": seconds[baseline] / taken,
            "same_sequences": sum(a == b for a, b in zip(outputs[name], outputs["paged"], strict=True)),
        }
        for name, taken in seconds.items()
    ]
    rows = (
        (name, f"{rate:.0f}", f"{ratio:.2f}", f"{same}/{args.batch}")
        for name, rate, ratio, same in (result.values() for result in results)
    )
    title = f"Batch {args.batch}, {args.prompt_tokens} + {args.new_tokens} tokens, {describe_device()}"
    console.print(table_of(("", "tokens per second", f"times {baseline}", "same tokens"), rows, title=title))
    if baseline != TRANSFORMERS:
        console.print("transformers is not installed: the extra `compare` adds it to the comparison.")
    write_results(args.json, results=results)
    return 0


def _ours(folder: str, manager: ManagerName, prompts: list[list[int]], args: argparse.Namespace) -> Run:
    length = args.prompt_tokens + args.new_tokens
    llm = LLM(folder, manager=manager, max_model_len=length, kv_cache_tokens=args.batch * (length + 16))
    params = SamplingParams(max_tokens=args.new_tokens, ignore_eos=True)
    return lambda: [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def _transformers(folder: str, prompts: list[list[int]], args: argparse.Namespace) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    batch = torch.tensor(prompts)

    def run() -> list[list[int]]:
        with torch.inference_mode():
            tokens = model.generate(
                batch, attention_mask=torch.ones_like(batch), max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens, do_sample=False, pad_token_id=0,
            )  # fmt: skip
        new: list[list[int]] = tokens[:, batch.shape[1] :].tolist()
        return new

    return run

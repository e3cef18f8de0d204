"""`paged-ref bench engine`: tokens per second of this engine, and of transformers with the same weights.

A Llama of 15 million random parameters, or a checkpoint, continues batches of random prompts of equal length, greedily
and without an end of sequence: the work is the same for all. The runs take turns, and the medians are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

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
from .results import median_ratio, table_of, take_turns, write_results

Run = Callable[[list[list[int]]], list[list[int]]]  # from prompts to the new tokens of each sequence
TRANSFORMERS = "transformers generate"
CONFIG = ModelConfig(
    vocab_size=32000, hidden_size=288, intermediate_size=768, num_layers=6, num_heads=6, num_kv_heads=6, head_size=48,
    max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_ids=(2,),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "Hugging Face directory, or NAME.gguf (default: random weights)"
    parser.add_argument("--model", metavar="DIR", help=text)
    options.integer(parser, "--batch", [8], "sequences in a batch; several numbers: one batch after another", nargs="+")
    options.integer(parser, "--prompt-tokens", 32)
    options.integer(parser, "--new-tokens", 64)
    options.integer(parser, "--rounds", 5, "times that each takes its turn")
    options.json_output(parser)


def main(args: argparse.Namespace) -> int:
    console = Console()
    require_prompt_memory(max(args.batch), args.prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        managers: tuple[ManagerName, ...] = ("paged", "standard") if args.model is None else ("paged",)
        if args.model is None:
            save_checkpoint(Path(folder), CONFIG, random_weights(CONFIG))
        model = folder if args.model is None else args.model
        llms = {manager: _llm(model, manager, args) for manager in managers}
        runs: dict[str, Run] = {manager: _ours(llm, args) for manager, llm in llms.items()}
        if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
            runs[TRANSFORMERS] = _transformers(Path(model), args)
        vocab_size = llms["paged"].config.vocab_size
        results = [row for batch in args.batch for row in _compared(runs, batch, vocab_size, args)]

    baseline = list(runs)[-1]
    rows = (
        (f"{one['batch']}", one["name"], f"{one['tokens_per_second']:.0f}", f"{one['times_baseline']:.2f}",
         f"{one['same_sequences']}/{one['batch']}")
        for one in results
    )  # fmt: skip
    title = f"{args.prompt_tokens} + {args.new_tokens} tokens, {describe_device()}"
    columns = ("batch", "", "tokens per second", f"times {baseline}", "same tokens")
    console.print(table_of(columns, rows, title=title))
    if baseline != TRANSFORMERS:
        console.print("transformers is not installed: the extra `compare` adds it to the comparison.")
    write_results(args.json, baseline=baseline, results=results)
    return 0


def _compared(runs: dict[str, Run], batch: int, vocab_size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One batch: a row for each of `runs`, the last of which is the baseline."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(min(3, vocab_size - 1), vocab_size, size=(batch, args.prompt_tokens)).tolist()
    outputs = {name: run(prompts) for name, run in runs.items()}  # compiles and warms up
    turns = take_turns([lambda run=run: run(prompts) for run in runs.values()], args.rounds)  # type: ignore[misc]
    seconds = [[times.seconds for times in turn] for turn in turns]
    return [
        {
            "batch": batch,
            "name": name,
            "tokens_per_second": batch * args.new_tokens / median(taken),
            "times_baseline": median_ratio(seconds[-1], taken),
            "same_sequences": sum(a == b for a, b in zip(outputs[name], outputs["paged"], strict=True)),
        }
        for name, taken in zip(runs, seconds, strict=True)
    ]


def _llm(model: str, manager: ManagerName, args: argparse.Namespace) -> LLM:
    length = args.prompt_tokens + args.new_tokens
    return LLM(model, manager=manager, max_model_len=length, kv_cache_tokens=max(args.batch) * (length + 16))


def _ours(llm: LLM, args: argparse.Namespace) -> Run:
    params = SamplingParams(max_tokens=args.new_tokens, ignore_eos=True)
    return lambda prompts: [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def _transformers(path: Path, args: argparse.Namespace) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    of_file = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if of_file else path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **of_file)

    def run(prompts: list[list[int]]) -> list[list[int]]:
        batch = torch.tensor(prompts)
        with torch.inference_mode():
            tokens = model.generate(
                batch, attention_mask=torch.ones_like(batch), max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens, do_sample=False, pad_token_id=0,
            )  # fmt: skip
        new: list[list[int]] = tokens[:, batch.shape[1] :].tolist()
        return new

    return run
